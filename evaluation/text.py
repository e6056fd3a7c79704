"""The report of an ensemble, as text for the terminal."""

import math
from typing import Any

from evaluation.members import TEMPERATURES


def averaging_method(result: dict[str, Any]) -> str:
    """The averaging method, as printed and as written into the plots."""
    parts = [f"{result['average']} averaged"]
    if result["tta"]:
        parts.append(f"--tta {result['tta']}")
    if result["temperature"]:
        parts.append(f"T = {result['temperature']['value']:.3g}")
    return ", ".join(parts)


def table(result: dict[str, Any]) -> str:
    """A table with one row per member and one for the ensemble."""
    rows = [*result["members"], {"name": f"ensemble ({averaging_method(result)})"} | result["ensemble"]]
    corner = f"with --tta {result['tta']}" if result["tta"] else ""
    width = max(len(name) for name in (corner, *(row["name"] for row in rows)))
    lines = [f"{corner:{width}}  test loss  accuracy [95 % interval]   Brier      ECE"]
    for row in rows:
        low, high = (f"{100 * end:.2f}" for end in row["intervals"]["accuracy"])
        lines.append(
            f"{row['name']:{width}}  {row['loss']:9.4f}  {100 * row['accuracy']:6.2f} % {f'[{low}, {high}]':>15}"
            f"{row['brier']:8.4f}  {100 * row['calibration_error']:5.2f} %"
        )
    lines.append(f"on {result['num_images']:,} test images of {result['data']}, in {result['precision']}")
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> str:
    """The differences and the other results, one per line, as far as the report has them."""
    lines = []
    if temperature := result["temperature"]:
        value, before, after = temperature["value"], temperature["before"], temperature["after"]
        fitted = ""
        if temperature["fitted_on"]:
            fitted = f", fitted on {temperature['fitted_on']:,} validation images"
            fitted += ", at the limit" if any(math.isclose(value, end, rel_tol=1e-5) for end in TEMPERATURES) else ""
        lines += [
            f"temperature {value:.4g}{fitted}",
            f"it changes the test loss from {before['loss']:.4f} to {after['loss']:.4f}, "
            f"{difference_text(temperature['difference'], 'loss')}; "
            f"ECE from {100 * before['calibration_error']:.2f} to {100 * after['calibration_error']:.2f} %",
        ]
    if result["leave_one_out"]:
        best = next(row for row in result["versus_members"] if row["name"] == result["best_member"])
        lines.append(f"ensemble minus its best member, {best['name']}: {difference_text(best, 'accuracy')}")
    for row in result["leave_one_out"]:
        change = difference_text(row["versus_ensemble"], "accuracy")
        lines.append(f"without {row['without']}: {100 * row['accuracy']:.2f} %, {change}")
    if result["cascade"]:
        threshold = result["cascade_threshold"]
        row = next(row for row in result["cascade"] if row["threshold"] == threshold["value"])
        source = f"chosen on {threshold['num_images']:,} validation images" if "num_images" in threshold else "default"
        lines += [
            f"cascade at {threshold['value']:g} ({source}): {100 * row['accuracy']:.2f} %, "
            f"{row['milliseconds']:.2f} ms per image instead of {result['subsets'][-1]['milliseconds']:.2f}",
            "  images seen by " + ", ".join(f"{name} {100 * part:.0f} %" for name, part in row["seen"].items()),
        ]
    if pairs := [value for number, row in enumerate(result["disagreement"]) for value in row[:number]]:
        low, mean, high = (f"{100 * value:.2f}" for value in (min(pairs), sum(pairs) / len(pairs), max(pairs)))
        spread = f" ({low} to {high} %)" if low != high else ""
        lines.append(f"two members disagree on {mean} % of the images{spread}")
    if worst := result["confusions"][:3]:
        named = (f"{row['true']} → {row['predicted']} ({row['images']:,})" for row in worst)
        lines.append(f"most frequent mistakes, true → predicted: {', '.join(named)}")
    for group in result["by_network"]:
        loss, accuracy = group["loss"], group["accuracy"]
        lines.append(
            f"{group['network']}, {len(group['members'])} members: test loss {loss['mean']:.4f} ± {loss['std']:.4f}, "
            f"test accuracy {100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f} %"
        )
    return "\n".join(lines)


def difference_text(difference: dict[str, Any], quantity: str) -> str:
    """A difference of "loss" or "accuracy" and its interval, with a note if the interval includes 0."""
    scale, form, unit = (100, "+.2f", " points") if quantity == "accuracy" else (1, "+.4f", "")
    value, low, high = (scale * number for number in (difference[quantity], *difference["intervals"][quantity]))
    chance = "" if low > 0 or high < 0 or low == high == 0 else ", which may be chance"
    return f"{value:{form}}{unit} [{low:{form}}, {high:{form}}]{chance}"
