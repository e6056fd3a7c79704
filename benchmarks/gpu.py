"""Print the table of what `make gpu` has measured, and what is missing.

python benchmarks/gpu.py benchmarks/results/gpu
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.command_line import Parser

from benchmarks import harness
from benchmarks.train import RECIPES


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where make gpu writes")
    folder = parser.parse_args().folder
    missing: list[str] = []

    def read(name: str) -> dict[str, Any]:
        try:
            return json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            missing.append(name)
            return {}

    rows: dict[str, dict[str, str]] = defaultdict(dict)  # by label, then by network
    for network, layers in read("layers.json").get("networks", {}).items():
        for kind, figures in layers.items():
            for way, spent in figures["milliseconds"].items():
                rows[f"{kind} {way}, ms"][network] = f"{spent:.2f}"
    for network, recipe in RECIPES.items():
        for way, figures in read(f"compile-{network}.json").get("networks", {}).get(network, {}).items():
            rate = figures["images_per_second"]
            seconds = figures["start_up_seconds"] + recipe.epochs * figures["num_images"] / rate
            rows[f"{way}, images/s"][network] = f"{rate:,.0f}"
            rows[f"{way}, start-up and default epochs at full size"][network] = f"{seconds / 60:.1f} min"
        for kind, figures in read(f"plain-{network}.json").get("networks", {}).get(network, {}).items():
            if "ratio" in figures:
                rows[f"ours / {kind}"][network] = f"{figures['ratio']:.2f}"
    for name in ("headline", "baseline"):
        if result := read(f"{name}/result.json"):
            seconds = result["total_seconds"]
            if result["parallel"]:
                seconds = result["training_together_seconds"] + result["seconds"]["main_ens.py"]
            ensemble = result["ensemble"] | {"seconds": seconds}
            for network, row in zip([*RECIPES, "ensemble"], [*result["members"], ensemble], strict=True):
                rows[f"{name}: accuracy, loss"][network] = f"{row['accuracy']:.2%}, {row['loss']:.4f}"
                rows[f"{name}: time"][network] = f"{row['seconds'] / 60:.1f} min"

    harness.print_table(rows)
    if (tests := folder / "tests.txt").is_file():
        print("\n" + "\n".join(line for line in tests.read_text().splitlines() if "::" in line))
    else:
        missing.append(tests.name)
    if missing:
        print(f"\nmissing in {folder}: {', '.join(missing)}; make gpu measures them", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    errors.run(main)
