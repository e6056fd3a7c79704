"""Measure the whole: the four commands from nothing, timed, with the accuracies.

dense.py, mobilenetv2.py, resnext.py and main_ens.py run one after the other, each timed from the start of its process
to its end, in a folder where nothing is decoded and nothing compiled yet. A download is not timed: CIFAR-10 is there
before the first command starts.

--output gets what it takes to judge the run and to compare another with it: result.json, the figures; logits.npz, the
members' logits for the test images; and the histories and pictures that the commands left.

    python benchmarks/ensemble.py --data cifar10 --output benchmarks/results/headline
    python benchmarks/ensemble.py --work FOLDER --time-limit 3000 -- --recipe baseline    # again, until it is done
    python benchmarks/ensemble.py --score benchmarks/results/headline --against benchmarks/results/baseline

Windows has neither the signals that time limits need nor the account of CPU time.
"""

import argparse
import contextlib
import io
import json
import math
import os
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has an augment.py as well

from common import errors, files
from common.command_line import Parser
from common.device import pick_precision, set_up_device
from common.errors import UserError

import dataset
import dense
import main_ens
import mobilenetv2
import resnext
from benchmarks import harness
from dataset import cifar10
from evaluation import metrics
from evaluation.logits import member_logits
from evaluation.members import names, read_all
from models.ensemble import average_probs
from training.history import read_csv
from training.recipe import Recipe, parse_flags, spelled
from training.signals import StopSignals

TRAINING = {"dense.py": dense, "mobilenetv2.py": mobilenetv2, "resnext.py": resnext}
TESTING = "main_ens.py"
OF_ENSEMBLE = ("ensemble.json", "ensemble.png", "cost.png")
OWN_FLAGS = ("data", "name", "checkpoint_dir", "plot_dir", "resume", "overwrite")  # decide where the files lie
COMPILE_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
PROGRESS = "progress.json"

TIME_IS_UP = 3  # exit status
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # status of a script asked to stop, the second before it listens
POLL_SECONDS = 0.02
WRITE_SECONDS = 5  # what a kill can take from the account of the time


def main() -> int:
    options = read_flags()
    baseline = read_scores(options.against) if options.against else None
    if options.score:
        print(differences_table(compare(read_scores(options.score), baseline)))
        return 0

    deadline = time.monotonic() + (options.time_limit or math.inf)
    recipes = read_recipes(options)
    source = find_data(options.data, recipes["dense.py"].data_url)
    files.check_writable(options.output, "the results")
    with contextlib.ExitStack() as stack:
        work = Path(options.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="ensemble-"))).absolute()
        progress = open_work(work, setting_of(options, recipes))
        commands = commands_of(options, recipes, link_data(options.data, source, work))
        with StopSignals() as signals:
            run_all(commands, options.parallel, work, progress, lambda: signals or time.monotonic() >= deadline)
        if left := [name for name in commands if name not in progress.finished]:
            ending = "the same command goes on" if options.work else "without --work nothing is kept"
            print(f"stopped after {progress.elapsed:.1f} s, still to do: {', '.join(left)}; {ending}")
            return 128 + signals.number if signals else TIME_IS_UP
        result = write_output(Path(options.output), work, recipes, progress)
    if baseline:
        result["against"] = compare(read_scores(options.output), baseline)
        harness.write_results(result, Path(options.output) / "result.json")
    report(result, options.output)
    return 0


# ------------------------------------------------------------------------------------------------------- the commands


@dataclass
class Progress:
    """How far a run is and what it has used; kept in the work folder."""

    setting: dict[str, Any]  # see setting_of
    seconds: dict[str, float] = field(default_factory=dict)  # by command
    starts: dict[str, int] = field(default_factory=dict)  # by command; each after the first finds its caches filled
    elapsed: float = 0.0  # seconds; with --parallel fewer than the commands' together
    cpu_seconds: float = 0.0  # of all cores; other programs on them make a run longer, but not this
    finished: list[str] = field(default_factory=list)  # commands

    def write(self, work: Path) -> None:
        harness.write_results(asdict(self), work / PROGRESS)


def setting_of(options: argparse.Namespace, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """What result.json says about how the run came to be."""
    flags = {name: shlex.join(flags_of(options, name)) for name in TRAINING}
    setting = {"data": options.data, "flags": flags, "parallel": options.parallel}
    return harness.provenance(set_up_device(recipes["dense.py"].device)) | setting


def open_work(work: Path, setting: dict[str, Any]) -> Progress:
    """The progress of the run in `work`, a fresh one where the folder is empty or missing.

    Raises UserError for a folder that holds anything else, or a run of another setting.
    """
    files.check_writable(work, "the work folder")
    path = work / PROGRESS
    if not path.exists():
        if any(work.iterdir()):
            raise UserError(f"--work {work} is not empty and holds no run of this benchmark; name a new folder")
        progress = Progress(setting)
        progress.write(work)
        return progress
    try:
        progress = Progress(**json.loads(path.read_bytes()))
        before, now = fixed(progress.setting), fixed(setting)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not what this benchmark writes ({error}); name a new folder as --work") from None
    if differences := [
        f"{name}: {before.get(name)} there, {now[name]} now" for name in now if before.get(name) != now[name]
    ]:
        raise UserError(
            f"--work {work} holds a run of another setting:\n  " + "\n  ".join(differences) + "\nGive the run's, or "
            "name a new folder"
        )
    return progress


def fixed(setting: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same when a run goes on. The work folder itself may be what makes the commit "-dirty"."""
    commit = (setting["commit"] or "").removesuffix("-dirty")
    return {name: value for name, value in setting.items() if name != "command"} | {"commit": commit}


def find_data(data: str, data_url: str | None) -> Path | None:
    """The folder that --data names, CIFAR-10 downloaded where it is missing; None for the digits."""
    if data == "digits":
        return None
    path = cifar10.find(data, Path("data"), data_url) if data in cifar10.ARCHIVES else dataset.existing_folder(data)
    return path.resolve()


def link_data(data: str, source: Path | None, work: Path) -> str:
    """Link `source`, which --data names, into the work folder; returns its --data there."""
    if source is None:
        return data
    link = work / ("data" if data in cifar10.ARCHIVES else "images") / source.name
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(source)
    return data if data in cifar10.ARCHIVES else link.relative_to(work).as_posix()


def commands_of(options: argparse.Namespace, recipes: dict[str, Recipe], data: str) -> dict[str, list[str]]:
    """The four commands, by script, as they run in the work folder."""
    flags = {}
    for name, recipe in recipes.items():
        reference = ["--reference", str(Path(recipe.reference).absolute())] if recipe.reference else []
        flags[name] = [*flags_of(options, name), *reference, "--data", data, "--resume"]
    flags[TESTING] = ["--device", recipes["dense.py"].device]
    return {name: [sys.executable, str(harness.ROOT / name), *flags[name]] for name in flags}


def run_all(
    commands: dict[str, list[str]], parallel: bool, work: Path, progress: Progress, stop: Callable[[], Any]
) -> None:
    """Run the commands that are not finished yet, until `stop` says so."""
    training = [list(TRAINING)] if parallel else [[name] for name in TRAINING]
    for together in [*training, [TESTING]]:
        left = {name: commands[name] for name in together if name not in progress.finished}
        if left and not stop():
            run_together(left, work, progress, stop)


def run_together(commands: dict[str, list[str]], work: Path, progress: Progress, stop: Callable[[], Any]) -> None:
    """Run commands at the same time, with `progress` as their account; when `stop` says so, have them save and end.

    Raises UserError if one fails; the others then save and end.
    """
    environment = os.environ | {name: str(work / "compiled" / name.lower()) for name in COMPILE_CACHES}
    before, elapsed_before = {name: progress.seconds.get(name, 0.0) for name in commands}, progress.elapsed
    started, written, asked, cpu_before = time.monotonic(), 0.0, False, cpu_seconds()
    running = {}
    try:
        for name, command in commands.items():
            # In a session of its own: the terminal's Ctrl-C comes to this process only.
            running[name] = subprocess.Popen(command, cwd=work, env=environment, start_new_session=True)
            progress.starts[name] = progress.starts.get(name, 0) + 1
        while running:
            time.sleep(POLL_SECONDS)
            statuses = {name: process.poll() for name, process in running.items()}
            elapsed = time.monotonic() - started
            progress.elapsed = elapsed_before + elapsed
            progress.seconds |= {name: before[name] + elapsed for name in statuses}
            for name, status in statuses.items():
                if status is not None:
                    del running[name]
                if status == 0:
                    progress.finished.append(name)
                elif status is not None and not (asked and status in STOPPED):
                    raise UserError(f"{name} ended with status {status}; what it said stands above")
            if not asked and stop():
                asked = True
                for process in running.values():
                    process.terminate()  # not SIGINT, which a script that still imports answers with a traceback
            if elapsed - written >= WRITE_SECONDS:
                progress.write(work)
                written = elapsed
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        progress.cpu_seconds += cpu_seconds() - cpu_before
        progress.write(work)


def cpu_seconds() -> float:
    """Of all processes that this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -------------------------------------------------------------------------------------------------------- the results


def write_output(folder: Path, work: Path, recipes: dict[str, Recipe], progress: Progress) -> dict[str, Any]:
    """Write the files of --output, result.json last; returns what that holds.

    Losses and accuracies are main_ens.py's; those of logits.npz, in half precision, may differ in the last digits.
    """
    with contextlib.chdir(work):  # where the paths of checkpoints, plots and data begin
        members = read_all([recipe.checkpoint_path for recipe in recipes.values()])
        data = main_ens.load_first(members[0], argparse.Namespace(data=None, data_url=None, test_size=None))
        device, images = set_up_device(recipes["dense.py"].device), torch.from_numpy(data.test.images)
        precision = pick_precision("auto", device)
        own, _ = member_logits(members, images, device, precision=precision)  # main_ens.py has cached them
        logits = dict(zip(names([path for path, _ in members]), own.squeeze(1), strict=True))
        histories = [read_csv(recipe.csv_path) for recipe in recipes.values()]
        plots = Path(recipes["dense.py"].plot_dir)
        tested = json.loads((plots / "ensemble.json").read_bytes())
        paths = [path for recipe in recipes.values() for path in (recipe.csv_path, recipe.plot_path)]
        contents = {path.name: path.read_bytes() for path in [*paths, *(plots / name for name in OF_ENSEMBLE)]}
    contents["logits.npz"] = pack_logits(logits, data.test.labels, data.classes)

    rows = []
    for row, script, history in zip(tested["members"], recipes, histories, strict=True):
        rates = [epoch["images_per_second"] for epoch in history]
        rows.append(
            {"name": row["name"], "script": script, "loss": row["loss"], "accuracy": row["accuracy"]}
            | {"epochs": len(history), "images_per_second": statistics.median(rates)}
            | {"seconds": progress.seconds[script]}
        )
    trained = sum(len(data.train) / epoch["images_per_second"] for history in histories for epoch in history)
    result = progress.setting | {
        "members": rows,
        "ensemble": tested["ensemble"],
        "num_images": {"train": len(data.train), "test": len(data.test)},
        "seconds": progress.seconds,
        "starts": progress.starts,
        "total_seconds": sum(progress.seconds.values()),
        "cpu_seconds": progress.cpu_seconds,
        # The share of the training scripts' time in which they start, load, test, save and draw.
        "not_training": 1 - trained / sum(row["seconds"] for row in rows),
    }
    if result["parallel"]:
        result["training_together_seconds"] = progress.elapsed - progress.seconds[TESTING]
    for name, content in contents.items():
        with files.replacing(folder / name, "the results") as file:
            file.write(content)
    harness.write_results(result, folder / "result.json")
    return result


def pack_logits(logits: dict[str, Tensor], labels: np.ndarray, classes: tuple[str, ...]) -> bytes:
    """An .npz file: each member's logits (N, C) by its name, in float16, and "labels" (N,) and "classes" (C,)."""
    largest = torch.finfo(torch.float16).max
    arrays = {name: own.clamp(-largest, largest).half().numpy() for name, own in logits.items()}
    arrays["labels"] = labels.astype(np.uint8 if len(classes) <= 256 else np.int16)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, classes=np.array(classes))
    return buffer.getvalue()


@dataclass(frozen=True)
class Scores:
    """What logits.npz of a folder says."""

    folder: str
    probs: dict[str, Tensor]  # float64 (N, C), of each member and, last, of the ensemble
    labels: Tensor  # int64 (N,)
    classes: list[str]


def read_scores(folder: str) -> Scores:
    """Raises UserError if the folder has no logits.npz, or another than this benchmark writes."""
    path = Path(folder) / "logits.npz"
    try:
        with np.load(path) as arrays:
            logits = {name: torch.from_numpy(arrays[name]) for name in arrays if name not in ("labels", "classes")}
            labels, classes = torch.from_numpy(arrays["labels"].astype(np.int64)), arrays["classes"].tolist()
        probs = {name: average_probs(own[None].double()) for name, own in logits.items()}
        probs["ensemble"] = average_probs(torch.stack(list(logits.values())).double())
        if {own.shape for own in probs.values()} != {(len(labels), len(classes))}:
            raise ValueError("its arrays are of other lengths")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; expected a folder that this benchmark wrote") from None
    except (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not what this benchmark writes ({error})") from None
    return Scores(str(folder), probs, labels, classes)


def compare(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """What accuracy and loss of `ours` are above those of `theirs`, with 95 % intervals over the test images.

    A row for each member that both have, and one for the ensemble. Raises UserError if the labels differ.
    """
    if ours.classes != theirs.classes or not torch.equal(ours.labels, theirs.labels):
        raise UserError(
            f"{ours.folder} and {theirs.folder} have other labels or classes; only what was tested on the same images "
            "can be compared"
        )
    names = [name for name in ours.probs if name in theirs.probs]
    of_images = [
        metrics.per_image(ours.probs[name], ours.labels) - metrics.per_image(theirs.probs[name], theirs.labels)
        for name in names
    ]
    resampled = metrics.bootstrap(torch.cat(of_images, 1).numpy()).reshape(-1, len(names), len(metrics.PER_IMAGE))
    rows = []
    for number, name in enumerate(names):
        row = {"name": name}
        for quantity, score in (("accuracy", metrics.accuracy), ("loss", metrics.negative_log_likelihood)):
            here, there = score(ours.probs[name], ours.labels), score(theirs.probs[name], theirs.labels)
            interval = metrics.interval(resampled[:, number, metrics.PER_IMAGE.index(quantity)])
            row[quantity] = {"here": here, "there": there, "difference": here - there, "interval": interval}
        rows.append(row)
    return {"folder": theirs.folder, "resamples": metrics.RESAMPLES, "rows": rows}


def report(result: dict[str, Any], output: str) -> None:
    print(f"\n{result['device']}, {result['data']}. Results: {output}\n")
    print("| | test accuracy | test loss | seconds |\n|---|--:|--:|--:|")
    ensemble = result["ensemble"] | {"name": "ensemble", "seconds": result["seconds"][TESTING]}
    for row in [*result["members"], ensemble]:
        print(f"| {row['name']} | {100 * row['accuracy']:.2f} % | {row['loss']:.4f} | {row['seconds']:.1f} |")
    if result["parallel"]:
        print(f"| the three members at once | | | {result['training_together_seconds']:.1f} |")
    print(f"| total | | | {result['total_seconds']:.1f} |")
    print(f"\nNot training: {100 * result['not_training']:.1f} % of the training scripts' time")
    if "against" in result:
        print("\n" + differences_table(result["against"]))


def differences_table(against: dict[str, Any]) -> str:
    lines = [
        f"Differences to {against['folder']}, with paired 95 % intervals over the test images:\n",
        "| | test accuracy, points | test loss |\n|---|--:|--:|",
    ]
    for row in against["rows"]:
        (low, high), (low_loss, high_loss) = row["accuracy"]["interval"], row["loss"]["interval"]
        lines.append(
            f"| {row['name']} | {100 * row['accuracy']['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}) "
            f"| {row['loss']['difference']:+.4f} ({low_loss:+.4f} to {high_loss:+.4f}) |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- the flags


def read_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder of images")
    parser.add_argument("--output", default=f"{harness.RESULTS}/ensemble", help="folder (default: %(default)s)")
    parser.add_argument(
        "--work", help="folder the commands run in, new or of a run to go on (default: a temporary one)"
    )
    parser.add_argument("--parallel", action="store_true", help="run the three training scripts at the same time")
    parser.add_argument("--time-limit", type=positive, help="seconds until the run is saved and ends with status 3")
    for name in TRAINING:
        parser.add_argument(
            f"--{Path(name).stem}", type=shlex.split, default=[], metavar="FLAGS",
            help=f"flags for {name} only, in quotes: --{Path(name).stem}='--epochs 10'",
        )  # fmt: skip
    parser.add_argument("--against", metavar="FOLDER", help="another run's --output, to compare with")
    parser.add_argument("--score", metavar="FOLDER", help="run nothing: compare this --output with that of --against")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags for all three training scripts")
    options = parser.parse_args()
    if options.score and not options.against:
        raise UserError(f"--score {options.score} needs --against, the folder to compare it with")
    if options.time_limit and not options.work:
        raise UserError(f"--time-limit {options.time_limit:g} needs --work, the folder that the run goes on from")
    return options


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def flags_of(options: argparse.Namespace, script: str) -> list[str]:
    return [*options.flags, *getattr(options, Path(script).stem)]


def read_recipes(options: argparse.Namespace) -> dict[str, Recipe]:
    """The training scripts' recipes with the flags given. Raises UserError for a flag that is this benchmark's own."""
    recipes = {}
    for name, script in TRAINING.items():
        recipes[name] = parse_flags(script.RECIPE, script.__doc__, flags_of(options, name))
        for own in OWN_FLAGS:
            if getattr(recipes[name], own) != getattr(script.RECIPE, own):
                raise UserError(f"{spelled(own)} for {name}: this benchmark sets it itself; leave it out")
    return recipes


if __name__ == "__main__":
    errors.run(main)
