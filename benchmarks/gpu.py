"""The table of what `make gpu` has measured, and what of it is missing.

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

import dense
import mobilenetv2
import resnext

RECIPES = {module.RECIPE.network: module.RECIPE for module in (dense, mobilenetv2, resnext)}
COLUMNS = [*RECIPES, "ensemble"]


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
        compiled = read(f"compile-{network}.json")
        for way, figures in compiled.get("networks", {}).get(network, {}).get("compile", {}).items():
            rate = figures["images_per_second"]
            seconds = figures["start_up_seconds"] + recipe.epochs * compiled["num_images"] / rate
            rows[f"--compile {way}, images/s"][network] = f"{rate:,.0f}"
            rows[f"--compile {way}, start-up and default epochs"][network] = f"{seconds / 60:.1f} min"
        ratios = read(f"plain-{network}.json").get("networks", {}).get(network, {}).get("ratios", {})
        for kind, ratio in ratios.items():
            rows[f"ours / {kind}"][network] = f"{ratio:.2f}"
    for name in ("headline", "baseline"):
        if result := read(f"{name}/result.json"):
            ensemble = result["ensemble"] | {"seconds": result["total_seconds"]}
            for network, row in zip(COLUMNS, [*result["members"], ensemble], strict=True):
                rows[f"{name}: accuracy, loss"][network] = f"{row['accuracy']:.2%}, {row['loss']:.4f}"
                rows[f"{name}: time"][network] = f"{row['seconds'] / 60:.1f} min"

    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'--:|' * len(COLUMNS)}")
    for label, cells in rows.items():
        print(f"| {' | '.join([label, *(cells.get(column, '') for column in COLUMNS)])} |")
    if (tests := folder / "tests.txt").is_file():
        print("\n" + "\n".join(line for line in tests.read_text().splitlines() if "::" in line))
    else:
        missing.append(tests.name)
    if missing:
        print(f"\nmissing in {folder}: {', '.join(missing)}; make gpu goes on with them", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    errors.run(main)
