"""Compare accuracies after equal time: mobilenetv2.py with its own recipe, and the loop and recipe of the baseline.

First the script trains for --epochs epochs. Then the baseline, a plain loop, trains for the same time: batches of 64 in
float32, torchvision's transforms in a DataLoader with two workers, SGD with a cosine schedule from 0.01 over 200
epochs, a test after every epoch. Both times include everything from the start of the process. --output gets both
curves over time, --picture their plot.

    python benchmarks/race.py --epochs 8
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.errors import UserError

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

import mobilenetv2
from benchmarks import harness
from benchmarks.plain import WORKERS, plain_optimizer, torchvision_loader
from evaluation import metrics
from models import NETWORKS
from plotting.style import BLUE, PALE, VERMILLION, saves_png
from training.history import read_csv
from training.recipe import BASELINE, load_data
from utils import CosineSchedule, normalize, predict

Point = dict[str, float]  # seconds since the start, epochs done, test_accuracy, test_loss


def main() -> int:
    parser = harness.make_parser(__doc__, "race.json", data="cifar10", image_size=32)
    parser.add_argument("--epochs", type=harness.positive, default=8, help="epochs of ours (default: %(default)s)")
    parser.add_argument("--train-size", type=harness.positive, help="number of training images (default: all)")
    parser.add_argument("--picture", default="docs/race.png", help="file of the plot (default: %(default)s)")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(train_baseline(options, *map(float, options.measure))))
        return 0
    ours, seconds = train_ours(options)
    curves = {"ours": ours, "baseline": harness.in_subprocess(time.time(), seconds)}
    rows = {name: {"after": line(points[-1])} for name, points in curves.items()}
    status = harness.report(options, torch.device("cpu"), rows, **curves)
    draw(options.picture, curves, harness.device_name(torch.device("cpu")))
    return status


def train_ours(options: argparse.Namespace) -> tuple[list[Point], float]:
    """The curve of the script, and the seconds of its process."""
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        started = time.time()
        flags = ["--epochs", str(options.epochs), "--data", options.data, "--image-size", str(options.image_size)]
        flags += ["--train-size", str(options.train_size)] if options.train_size else []
        flags += ["--device", "cpu", "--checkpoint-dir", folder, "--plot-dir", folder]
        command = [sys.executable, str(harness.ROOT / "mobilenetv2.py"), *flags]
        if status := subprocess.run(command, check=False).returncode:
            raise UserError(f"mobilenetv2.py ended with status {status}; see its message above")
        seconds = time.time() - started
        history = read_csv(Path(folder) / "mobilenetv2.csv")
    points, passed = [], seconds - sum(row["seconds"] for row in history)  # the start-up comes first
    for row in history:
        passed += row["seconds"]
        tested = {name: row[name] for name in ("test_accuracy", "test_loss")}
        points.append({"seconds": passed, "epochs": row["epoch"]} | tested)
    return points, seconds


def train_baseline(options: argparse.Namespace, started: float, seconds: float) -> list[Point]:
    """The curve of the baseline. Its last point is where the time is up, usually within an epoch."""
    chosen = {name: getattr(options, name) for name in ("data", "image_size", "train_size")}
    recipe = replace(mobilenetv2.RECIPE, **BASELINE, **chosen)
    torch.manual_seed(recipe.seed)
    data = load_data(recipe)
    workers = WORKERS["baseline"]
    loader = torchvision_loader(data.train, recipe.augmentation(), batch_size=recipe.batch_size, workers=workers)
    model = NETWORKS[recipe.network](len(data.classes), **recipe.network_arguments()).train()
    optimizer = plain_optimizer(model)
    schedule = CosineSchedule(recipe.lr, recipe.min_lr, recipe.epochs, len(loader))
    points: list[Point] = []
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = schedule(epoch, 0)
        for step, (images, labels) in enumerate(loader, 1):  # noqa: B007, used below
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if is_over := time.time() - started >= seconds:
                break
        model.eval()
        test = torch.from_numpy(data.test.images)
        logits = predict(lambda batch: model(normalize(batch)), test, torch.device("cpu"))
        model.train()
        labels = torch.from_numpy(data.test.labels)
        tested = {
            "test_accuracy": metrics.accuracy(logits, labels),
            "test_loss": F.cross_entropy(logits, labels).item(),
        }
        points.append({"seconds": time.time() - started, "epochs": epoch + step / len(loader)} | tested)
        if is_over:
            break
    return points


def line(point: Point) -> str:
    accuracy, minutes = 100 * point["test_accuracy"], point["seconds"] / 60
    return f"{accuracy:.2f} % after {minutes:.1f} minutes, {point['epochs']:.2f} epochs"


@saves_png
def draw(curves: dict[str, list[Point]], device: str) -> Figure:
    """Plot the test accuracy of both against the time."""
    figure = Figure(figsize=(9, 4.5))
    axes = figure.subplots()
    labels = {"ours": "mobilenetv2.py", "baseline": "plain loop, the baseline's recipe of 200 epochs"}
    for (name, points), color in zip(curves.items(), (VERMILLION, BLUE), strict=True):
        minutes = [point["seconds"] / 60 for point in points]
        percent = [100 * point["test_accuracy"] for point in points]
        axes.plot(minutes, percent, "o-", color=color, label=f"{labels[name]}: {percent[-1]:.2f} %")
    axes.set_xlabel(f"minutes on {device}")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(color=PALE)
    axes.legend(loc="lower right")
    axes.set_title("MobileNetV2 on CIFAR-10, equal time")
    return figure


if __name__ == "__main__":
    errors.run(main)
