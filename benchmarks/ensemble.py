"""Measure everything: the time and the accuracies of the four commands, from scratch.

mobilenetv2.py, dense.py, resnext.py and main_ens.py run one after the other in a new folder, without caches of decoded
images or compiled kernels. Each is timed from the start of its process to its end. CIFAR-10 is downloaded before the
first command and is not timed. After Ctrl-C, SIGTERM or --time-limit, the same command continues the run, also in a
copy of --work on another machine; only the flags of scripts that have not started may change. Delete --work to measure
again. Windows has no such signals: this script does not run there.

--output is a folder. It gets result.json (the numbers), logits.npz (the members' logits for the test images), and the
histories and plots of the commands. --against runs nothing: it compares two such folders.

    python benchmarks/ensemble.py --output FOLDER --time-limit 3000 -- --recipe baseline    # again, until it is done
    python benchmarks/ensemble.py --output benchmarks/results/headline --against FOLDER
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors, files
from common.device import pick_precision, set_up_device
from common.errors import UserError

import numpy as np
import torch
from torch import Tensor

import dataset
import dense
import main_ens
import mobilenetv2
import resnext
from benchmarks import harness
from dataset import cifar10
from evaluation import metrics
from evaluation.logits import member_logits
from evaluation.members import read_all
from evaluation.text import difference_text
from models.ensemble import average_probs
from training.history import read_csv
from training.recipe import Recipe, flag_name, parse_flags
from training.signals import StopSignals

TRAINING = {"dense.py": dense, "mobilenetv2.py": mobilenetv2, "resnext.py": resnext}
IN_TURN = ("mobilenetv2.py", "dense.py", "resnext.py")  # the cheapest first: a mistake shows early
TESTING = "main_ens.py"
OF_ENSEMBLE = ("ensemble.json", "ensemble.png", "cost.png")
OWN_FLAGS = {"data", "name", "checkpoint_dir", "plot_dir", "resume", "overwrite"}  # set by this benchmark
COMPILE_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
PROGRESS = "progress.json"

POLL_SECONDS = 0.02
WRITE_SECONDS = 5  # how often the progress is written; a kill can lose this much of the measured time


def main() -> int:
    options = read_flags()
    output, work = Path(options.output), Path(options.work).absolute()
    if options.against:
        compare(output, Path(options.against))
        return 0
    flags = {name: [*options.flags, *getattr(options, Path(name).stem)] for name in TRAINING}
    recipes = {name: read_recipe(name, own) for name, own in flags.items()}
    device = set_up_device(recipes["dense.py"].device)
    setting = {"data": options.data, "flags": {name: shlex.join(own) for name, own in flags.items()}}
    progress = open_work(work, harness.provenance(device) | setting | {"parallel": options.parallel})
    data = link_data(options.data, recipes["dense.py"].data_url, work)
    progress.write(work)
    files.check_writable(output, "the results")
    commands = {name: [*own, "--data", data, "--resume"] for name, own in flags.items()}
    commands[TESTING] = ["--device", recipes["dense.py"].device]
    training = [list(TRAINING)] if options.parallel else [[name] for name in IN_TURN]
    timer = threading.Timer(options.time_limit, signal.raise_signal, [signal.SIGTERM])
    timer.daemon = True
    with Stop() as stop:
        timer.start()
        for together in [*training, [TESTING]]:
            run_together({name: commands[name] for name in together}, work, progress, stop)
    if left := [name for name in commands if name not in progress.finished]:
        print(f"stopped after {progress.elapsed:.1f} s, still to do: {', '.join(left)}; the same command continues")
        return 128 + stop.number
    report(write_output(output, work, recipes, progress, device))
    return 0


def read_flags() -> argparse.Namespace:
    parser = harness.make_parser(__doc__, "ensemble", data="cifar10")
    add = parser.add_argument
    add("--work", default="runs/ensemble", help="folder in which the commands run (default: %(default)s)")
    add("--time-limit", type=harness.above_zero, default=1e6, help="seconds until the run is saved and stops")
    add("--parallel", action="store_true", help="run the three training scripts at the same time")
    of_one = {"type": shlex.split, "default": [], "metavar": "FLAGS"}
    for name in TRAINING:
        add(f"--{Path(name).stem}", **of_one, help=f"flags for {name} only, in quotes")
    add("--against", metavar="FOLDER", help="run nothing; compare --output with the output of another run")
    add("flags", nargs="*", metavar="-- FLAGS", help="flags for all three training scripts; paths must be absolute")
    return parser.parse_args()


def read_recipe(name: str, flags: list[str]) -> Recipe:
    """The recipe of a training script with these flags. Raises UserError for one of `OWN_FLAGS`."""
    recipe = parse_flags(TRAINING[name].RECIPE, TRAINING[name].__doc__, flags)
    if own := OWN_FLAGS & recipe.given:
        raise UserError(f"{' and '.join(map(flag_name, sorted(own)))} for {name}: this benchmark sets it; remove it")
    return recipe


# ------------------------------------------------------------------------------------------------------- the commands


@dataclass
class Progress:
    """The progress of a run and the time it has used; stored in the work folder."""

    setting: dict[str, Any]  # provenance and flags, for result.json
    seconds: dict[str, float] = field(default_factory=dict)  # by command
    starts: dict[str, int] = field(default_factory=dict)  # by command; after the first start, the caches are filled
    devices: dict[str, list[str]] = field(default_factory=dict)  # by command; several if --work was copied
    elapsed: float = 0.0  # seconds; with --parallel less than the sum over the commands
    cpu_seconds: float = 0.0  # of all cores; unlike `elapsed`, not increased by other programs
    finished: list[str] = field(default_factory=list)  # commands

    def write(self, work: Path) -> None:
        harness.write_results(asdict(self), work / PROGRESS)


class Stop(StopSignals):
    """Ignores a second signal: timeout and make may both send one."""

    def _handle(self, number: int, _: object) -> None:
        self.number = number


def open_work(work: Path, setting: dict[str, Any]) -> Progress:
    """The progress of the run in `work`; a new one if the folder is empty or missing.

    Raises UserError if the folder holds anything else, or a run with another setting.
    """
    path = work / PROGRESS
    if not path.exists():
        if work.exists() and any(work.iterdir()):
            raise UserError(f"--work {work} is not empty and holds no run of this benchmark; use a new folder")
        return Progress(setting)
    progress = Progress(**json.loads(path.read_bytes()))
    before, now = (fixed(setting, list(progress.starts)) for setting in (progress.setting, setting))
    if changed := [f"{name}: {before[name]} there, {now[name]} now" for name in now if before[name] != now[name]]:
        raise UserError(f"--work {work} holds a run with another setting; use a new folder:\n  " + "\n  ".join(changed))
    progress.setting |= {name: setting[name] for name in ("command", "device", "flags")}
    return progress


def fixed(setting: dict[str, Any], started: list[str]) -> dict[str, Any]:
    """What must be the same when a run continues. "-dirty" does not count: the work folder itself may cause it."""
    own = {name: value for name, value in setting.items() if name not in ("command", "device")}
    flags = {name: flags for name, flags in setting["flags"].items() if name in started}
    return own | {"commit": (setting["commit"] or "").removesuffix("-dirty"), "flags": flags}


def link_data(data: str, data_url: str | None, work: Path) -> str:
    """Link the folder of --data into `work` (CIFAR-10 is downloaded if missing). Returns the value of --data there."""
    if data == "digits":
        return data
    is_cifar = data in cifar10.HOSTS
    source = (cifar10.find(data, Path("data"), data_url) if is_cifar else dataset.existing_folder(data)).resolve()
    link = work / ("data" if is_cifar else "images") / source.name
    files.check_writable(link.parent, "the work folder")
    if not link.exists():
        link.unlink(missing_ok=True)  # --work was copied from another machine
        link.symlink_to(source)
    return data if is_cifar else link.relative_to(work).as_posix()


def run_together(commands: dict[str, list[str]], work: Path, progress: Progress, stop: Stop) -> None:
    """Run the unfinished commands at the same time. When `stop` becomes true, they save and end.

    Raises UserError if one fails; then the others also save and end.
    """
    environment = os.environ | {name: str(work / "compiled" / name.lower()) for name in COMPILE_CACHES}
    running: dict[str, subprocess.Popen] = {}
    last = written = time.monotonic()

    def update_progress() -> None:
        """Add the time since the last call to the running commands."""
        nonlocal last, written
        passed, last = time.monotonic() - last, time.monotonic()
        progress.elapsed += passed
        progress.seconds |= {name: progress.seconds.get(name, 0.0) + passed for name in running}
        if last - written >= WRITE_SECONDS:
            progress.write(work)
            written = last

    cpu_before = sum(os.times()[2:4])  # user and system time of all ended child processes
    try:
        for name in [name for name in commands if name not in progress.finished and not stop]:
            command = [sys.executable, str(harness.ROOT / name), *commands[name]]
            # In its own session, so that the terminal's Ctrl-C reaches only this process.
            running[name] = subprocess.Popen(command, cwd=work, env=environment, start_new_session=True)
            progress.starts[name] = progress.starts.get(name, 0) + 1
            devices, device = progress.devices.setdefault(name, []), progress.setting["device"]
            devices += [] if device in devices else [device]
        while running and not stop:
            time.sleep(POLL_SECONDS)
            update_progress()
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if status := running.pop(name).returncode:
                    raise UserError(f"{name} ended with status {status}; see its output above")
                progress.finished.append(name)
    finally:
        for process in running.values():
            process.terminate()
        progress.finished += [name for name, process in running.items() if process.wait() == 0]
        update_progress()
        progress.cpu_seconds += sum(os.times()[2:4]) - cpu_before
        progress.write(work)


# -------------------------------------------------------------------------------------------------------- the results


def write_output(
    folder: Path, work: Path, recipes: dict[str, Recipe], progress: Progress, device: torch.device
) -> dict[str, Any]:
    """Write the files of --output, result.json last; returns the content of that.

    Losses and accuracies are those of main_ens.py. logits.npz has half precision, so its losses may differ slightly.
    """
    with contextlib.chdir(work):  # the paths of checkpoints, plots and data are relative to it
        members = read_all([recipe.checkpoint_path for recipe in recipes.values()])
        data = main_ens.load_data_of(members[0])
        images, precision = torch.from_numpy(data.test.images), pick_precision("auto", device)
        logits, _ = member_logits(members, images, device, precision=precision)  # main_ens.py has cached them
        histories = [read_csv(recipe.csv_path) for recipe in recipes.values()]
    paths = [path for recipe in recipes.values() for path in (recipe.csv_path, recipe.plot_path)]
    paths += [Path(recipes["dense.py"].plot_dir) / name for name in OF_ENSEMBLE]
    for path in paths:
        shutil.copy(work / path, folder)
    tested = json.loads((folder / "ensemble.json").read_bytes())
    rows = [
        {"name": row["name"], "script": script, "loss": row["loss"], "accuracy": row["accuracy"]}
        | {"epochs": len(history), "seconds": progress.seconds[script], "devices": progress.devices[script]}
        | {"precision": content["recipe"]["precision"]}
        | {"images_per_second": statistics.median(epoch["images_per_second"] for epoch in history)}
        for row, script, history, (_, content) in zip(tested["members"], recipes, histories, members, strict=True)
    ]
    training_seconds = sum(len(data.train) / epoch["images_per_second"] for history in histories for epoch in history)
    result = progress.setting | {
        "device": " and ".join(dict.fromkeys(device for used in progress.devices.values() for device in used)),
        "members": rows,
        "ensemble": tested["ensemble"],
        "num_images": {"train": len(data.train), "test": len(data.test)},
        "seconds": progress.seconds,
        "starts": progress.starts,
        "total_seconds": sum(progress.seconds.values()),
        "cpu_seconds": progress.cpu_seconds,
        # The fraction of the training scripts' time in which they start, load, test, save and plot.
        "not_training": 1 - training_seconds / sum(row["seconds"] for row in rows),
    }
    if result["parallel"]:
        result["training_together_seconds"] = progress.elapsed - progress.seconds[TESTING]
    own = {row["name"]: views[0].half().numpy() for row, views in zip(rows, logits, strict=True)}
    with files.atomic_write(folder / "logits.npz", "the results") as file:  # (N, C) by member, (N,) and (C,)
        np.savez(file, **own, labels=data.test.labels.astype(np.int16), classes=np.array(data.classes))
    harness.write_results(result, folder / "result.json")
    return result


def report(result: dict[str, Any]) -> None:
    cells = {}
    for row in [*result["members"], {"name": "ensemble", "seconds": result["seconds"][TESTING]} | result["ensemble"]]:
        accuracy, loss, seconds = f"{100 * row['accuracy']:.2f} %", f"{row['loss']:.4f}", f"{row['seconds']:.1f}"
        cells[row["name"]] = {"test accuracy": accuracy, "test loss": loss, "seconds": seconds}
    if result["parallel"]:
        cells["the three members in parallel"] = {"seconds": f"{result['training_together_seconds']:.1f}"}
    harness.print_table(cells | {"total": {"seconds": f"{result['total_seconds']:.1f}"}})
    print(f"\nNot training: {100 * result['not_training']:.1f} % of the training scripts' time")


# ------------------------------------------------------------------------------------------------- comparing two runs


def compare(output: Path, other: Path) -> None:
    """Write the differences between two folders, `output` minus `other`, to against.json, and print them.

    There is one row per member that both have, and one for the ensemble, with paired 95 % intervals over the test
    images. Raises UserError if the labels differ.
    """
    (scores, labels, classes), (other_scores, other_labels, other_classes) = read_scores(output), read_scores(other)
    if classes != other_classes or not torch.equal(labels, other_labels):
        raise UserError(f"{output} and {other} have different labels or classes; both need the same test images")
    rows = []
    for name in [name for name in scores if name in other_scores]:
        change = scores[name] - other_scores[name]
        row = {"name": name} | dict(zip(metrics.PER_IMAGE, change.mean(0).tolist(), strict=True))
        rows.append(row | {"intervals": metrics.intervals(metrics.bootstrap(change.numpy()))})
    harness.write_results({"against": str(other), "rows": rows}, output / "against.json")
    print(f"Differences from {other}, with paired 95 % intervals over the test images:")
    columns = {"test accuracy": "accuracy", "test loss": "loss"}
    harness.print_table(
        {row["name"]: {label: difference_text(row, name) for label, name in columns.items()} for row in rows}
    )


def read_scores(folder: Path) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """`metrics.per_image` by name, the ensemble last; labels, int64 (N,); class names.

    Raises UserError if the folder has no valid logits.npz.
    """
    path = folder / "logits.npz"
    try:
        with np.load(path) as arrays:
            logits = {name: torch.from_numpy(arrays[name])[None].double() for name in arrays if name != "classes"}
            labels, classes = logits.pop("labels")[0].long(), arrays["classes"].tolist()
    except Exception as error:  # numpy and zipfile raise many exception types for a damaged file
        raise UserError(f"{path}: not a file of this benchmark ({error})") from None
    logits["ensemble"] = torch.cat(list(logits.values()))
    return {name: metrics.per_image(average_probs(own), labels) for name, own in logits.items()}, labels, classes


if __name__ == "__main__":
    errors.run(main)
