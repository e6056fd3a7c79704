"""Measure how fast predict.py goes: decoding and resizing JPEG files, and three networks after that.

The files are test images of a data set, written as JPEG (quality 75) to a folder that is removed again, so they lie in
the system's file cache. The networks have random weights, which are no faster than trained ones.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a predict.py as well

from common import errors
from common.device import DEVICES, pick_precision, set_up_device

import dataset
import predict
from benchmarks import harness
from dataset.image_folder import decode_all
from models import NETWORKS
from models.ensemble import Ensemble, Member
from utils import MEAN, STD


def main() -> int:
    options = parse_flags()
    device = set_up_device(options.device)
    data = dataset.load(options.data, image_size=options.image_size)
    members = [Member(network(len(data.classes)), MEAN, STD) for network in NETWORKS.values()]
    ensemble = Ensemble(members, data.classes, options.image_size).eval()
    ensemble.to(device, memory_format=torch.channels_last)
    rates = {"decoding": [], "networks": [], "end_to_end": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, pixels in enumerate(data.test.images[: options.images]):
            paths.append(str(Path(folder, f"{number}.jpg")))
            Image.fromarray(pixels.transpose(1, 2, 0)).save(paths[-1], quality=75)
        for _ in range(options.rounds):
            rates["decoding"].append(decoding_rate(paths, options.image_size))
            networks, end_to_end = network_rates(paths[: options.network_images], ensemble, device)
            rates["networks"].append(networks)
            rates["end_to_end"].append(end_to_end)

    medians = {name: statistics.median(values) for name, values in rates.items()}
    results = harness.provenance(device) | {
        "data": options.data,
        "image_size": options.image_size,
        "num_images": {"decoding": len(paths), "networks": len(paths[: options.network_images])},
        "rounds": options.rounds,
        "images_per_second": medians,
    }
    harness.write_results(results, options.output)
    print("| | images/s |\n|---|--:|")
    for name, rate in medians.items():
        print(f"| {name.replace('_', ' ')} | {rate:,.0f} |")
    return 0


def decoding_rate(paths: list[str], image_size: int) -> float:
    started = time.perf_counter()
    decoded = list(decode_all(paths, image_size))
    return len(decoded) / (time.perf_counter() - started)


def network_rates(paths: list[str], ensemble: Ensemble, device: torch.device) -> tuple[float, float]:
    """Images a second of the networks alone, and from file to prediction."""
    stats = predict.Stats()
    batch_size = max(1, predict.BATCH_PIXELS[device.type] // ensemble.image_size**2)
    precision = pick_precision("auto", device)
    started = time.perf_counter()
    for _ in predict.predict(
        paths, ensemble, [Path(name) for name in NETWORKS], predict.TOP, batch_size, precision, stats
    ):
        pass
    return stats.images / stats.networks, stats.images / (time.perf_counter() - started)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder of images")
    parser.add_argument(
        "--image-size", type=harness.positive, default=32, help="side of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=harness.positive, default=4000, help="decoded in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--network-images", type=harness.positive, default=128, help="seen by the networks (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=harness.positive, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    parser.add_argument("--output", default=f"{harness.RESULTS}/predict.json", help="(default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
