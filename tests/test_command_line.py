"""All scripts: imports, misspelt flags, signals, and a closed or full standard output."""

import os
import signal
import subprocess
import sys
from unittest import mock

from common import distributed, errors
from common.command_line import Parser

import pytest
from conftest import ROOT

from training.signals import StopSignals

needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")


def python(code, **settings):
    settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **settings)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--epoch", "3"], "there is no flag --epoch; did you mean --epochs?"),
        (["--lr=1"], "there is no flag --lr; did you mean --base-lr?"),
        (["--zzz"], "there is no flag --zzz ("),
        (["three"], "unexpected argument three ("),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x' ("),
    ],
)
def test_a_wrong_flag_is_a_one_line_error_with_similar_flags(capsys, flags, answer):
    parser = Parser("trains")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--base-lr")
    parser.add_argument("--resume", action="store_true")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(flags)
    assert end.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {answer}")
    assert stderr.count("\n") == 1


@needs_signals
@pytest.mark.parametrize(("script", "handler"), [(ROOT / "dense.py", "SIG_DFL"), ("", "default_int_handler")])
def test_importing_common_makes_ctrl_c_end_scripts_of_this_project_only(script, handler):
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's & ignores it
    code += f"sys.modules['__main__'].__file__ = {str(script)!r}; import common; "
    done = python(code + f"print(signal.getsignal(signal.SIGINT) == signal.{handler})")
    assert done.stdout == "True\n"
    assert end_of(lambda: signal.raise_signal(signal.SIGINT)) == 130


def end_of(main):
    with pytest.raises(SystemExit) as end:
        errors.run(main)
    return end.value.code


@needs_signals
def test_sighup_ends_a_script_but_not_under_nohup():
    assert end_of(lambda: signal.raise_signal(signal.SIGHUP)) == 129
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert end_of(lambda: signal.raise_signal(signal.SIGHUP)) is None
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP


@needs_signals
@pytest.mark.parametrize(("target", "status", "words"), [("pipe", 141, ""), ("/dev/full", 2, "standard output")])
def test_a_broken_stdout_ends_a_script_without_traceback(target, status, words):
    if target == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        output = os.fdopen(writer, "w")
    else:
        output = open(target, "w")  # noqa: SIM115
    with output:
        done = python("from common import errors; errors.run(lambda: print('x' * 100_000))", stdout=output)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_stdout_does_not_stop_a_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", mock.Mock(write=mock.Mock(side_effect=BrokenPipeError)))
    distributed.print_rank0("epoch 1")
    distributed.print_rank0("epoch 2")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["default", "user's count", "user's policy"],
)
def test_importing_common_sets_the_spin_count(settings, expected):
    """That scripts import it before torch is checked by ruff."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    done = python("import common, os; print(os.environ.get('GOMP_SPINCOUNT'))", env=environment | settings)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dataset", ("torch", "torchvision", "training")),
        ("models", ("common", "dataset", "training", "evaluation", "plotting", "utils")),
        ("utils", ("training", "evaluation", "plotting")),
        ("training.loop", ("evaluation", "plotting", "matplotlib")),
        ("predict", ("plotting", "matplotlib")),
        ("dense", ("evaluation", "plotting", "matplotlib")),  # matplotlib is imported when the main process plots
    ],
)
def test_a_package_does_not_import_what_is_above_it(module, absent):
    code = f"import sys, {module}; print(sorted({{name.split('.')[0] for name in sys.modules}} & set({absent})))"
    assert python(code).stdout.strip() == "[]"
