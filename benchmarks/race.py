"""Compare accuracies after equal time: mobilenetv2.py with its own recipe, and the loop and recipe of the baseline.

First the script trains for --epochs epochs. Then the baseline, a plain loop, trains for the same time: batches of 64 in
float32, torchvision's transforms in a DataLoader with two workers, SGD with a cosine schedule from 0.01 over 200
epochs, a test after every epoch. Both times include everything from the start of the process. The plot has both curves
over time, --output the numbers.

    python benchmarks/race.py --epochs 8
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors, files

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

import dataset
import mobilenetv2
from benchmarks import harness
from benchmarks.harness import positive
from benchmarks.plain import BASELINE_BATCH_SIZE, WORKERS, plain_optimizer, torchvision_loader
from dataset.transforms import Augmentation
from models import NETWORKS
from plotting import style
from training.history import read_csv
from training.recipe import BASELINE
from utils import CosineSchedule, normalize, predict

Point = dict[str, float]  # seconds since the start, epochs done, test_accuracy, test_loss


def main() -> int:
    flags = {"data": "cifar10", "image_size": 32}
    parser = harness.make_parser(__doc__, "race.json", **flags)
    parser.add_argument("--epochs", type=positive, default=8, help="epochs of ours (default: %(default)s)")
    parser.add_argument("--train-size", type=positive, help="number of training images (default: all)")
    parser.add_argument("--picture", default="docs/race.png", help="file of the plot (default: %(default)s)")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(train_baseline(options, *map(float, options.measure))))
        return 0
    ours, seconds = race_ours(options)
    curves = {"ours": ours, "baseline": harness.in_subprocess(time.time(), seconds)}
    draw(curves, harness.device_name(torch.device("cpu")), options.picture)
    rows = {name: {"after": line(points[-1])} for name, points in curves.items()}
    return harness.report(options, torch.device("cpu"), rows, **curves)


def race_ours(options: argparse.Namespace) -> tuple[list[Point], float]:
    """The curve of the script, and the seconds of its process."""
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        started = time.time()
        flags = ["--epochs", str(options.epochs), "--data", options.data, "--image-size", str(options.image_size)]
        flags += ["--train-size", str(options.train_size)] if options.train_size else []
        flags += ["--device", "cpu", "--checkpoint-dir", folder, "--plot-dir", folder]
        subprocess.run([sys.executable, str(harness.ROOT / "mobilenetv2.py"), *flags], check=True)
        seconds = time.time() - started
        history = read_csv(Path(folder) / "mobilenetv2.csv")
    start_up = seconds - sum(row["seconds"] for row in history)
    points, passed = [], start_up
    for row in history:
        passed += row["seconds"]
        points.append({"seconds": passed, "epochs": row["epoch"]} | {name: row[name] for name in TESTED})
    return points, seconds


TESTED = ("test_accuracy", "test_loss")


def train_baseline(options: argparse.Namespace, started: float, seconds: float) -> list[Point]:
    """The curve of the baseline. Its last point is where the time is up, usually within an epoch."""
    device = torch.device("cpu")
    recipe = mobilenetv2.RECIPE
    torch.manual_seed(recipe.seed)
    data = dataset.load(options.data, image_size=options.image_size, train_size=options.train_size)
    settings = Augmentation(**{item.name: BASELINE[item.name] for item in fields(Augmentation)})
    loader = torchvision_loader(data.train, settings, batch_size=BASELINE_BATCH_SIZE, workers=WORKERS["baseline"])
    model = NETWORKS[recipe.network](len(data.classes), **recipe.network_arguments()).train()
    optimizer = plain_optimizer(model)
    schedule = CosineSchedule(BASELINE["base_lr"], BASELINE["base_min_lr"], BASELINE["epochs"], len(loader))
    points: list[Point] = []
    for epoch in range(BASELINE["epochs"]):
        for group in optimizer.param_groups:
            group["lr"] = schedule(epoch, 0)
        for step, (images, labels) in enumerate(loader, 1):  # noqa: B007, used below
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if is_over := time.time() - started >= seconds:
                break
        model.eval()
        logits = predict(lambda batch: model(normalize(batch)), torch.from_numpy(data.test.images), device)
        model.train()
        labels = torch.from_numpy(data.test.labels)
        points.append(
            {
                "seconds": time.time() - started,
                "epochs": epoch + step / len(loader),
                "test_accuracy": (logits.argmax(1) == labels).float().mean().item(),
                "test_loss": F.cross_entropy(logits, labels).item(),
            }
        )
        if is_over:
            return points
    return points


def line(point: Point) -> str:
    accuracy, minutes = 100 * point["test_accuracy"], point["seconds"] / 60
    return f"{accuracy:.2f} % after {minutes:.1f} minutes, {point['epochs']:.2f} epochs"


def draw(curves: dict[str, list[Point]], device: str, path: str) -> None:
    figure = Figure(figsize=(9, 4.5), dpi=style.DPI, layout="constrained")
    axes = figure.add_subplot()
    contestants = {
        "ours": ("mobilenetv2.py", style.VERMILLION),
        "baseline": ("plain loop, the baseline's recipe of 200 epochs", style.BLUE),
    }
    for name, (label, colour) in contestants.items():
        minutes = [point["seconds"] / 60 for point in curves[name]]
        percent = [100 * point["test_accuracy"] for point in curves[name]]
        axes.plot(minutes, percent, "o-", color=colour, label=f"{label}: {percent[-1]:.2f} %")
    axes.set_xlabel(f"minutes on {device}")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.grid(color=style.PALE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("MobileNetV2 on CIFAR-10, equal time")
    with files.atomic_write(path, "the plot") as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    errors.run(main)
