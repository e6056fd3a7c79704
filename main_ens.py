"""Test an ensemble of trained networks: average their softmax outputs, and compare it with its members.

Without arguments it takes the three checkpoints that dense.py, mobilenetv2.py and resnext.py write; otherwise any
number of checkpoints of any kind. All it needs to know, the data included, stands in the checkpoints.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
import dataset
import errors
import files
import metrics
import plotting
from dataset import Dataset
from engine import SPLIT_FLAGS, predict
from errors import UserError
from models.ensemble import AVERAGES, average_probs
from recipe import DEVICES
from utils import pick_device

SCRIPTS = {"densenet.pt": "dense.py", "mobilenetv2.pt": "mobilenetv2.py", "resnext.pt": "resnext.py"}


@dataclass(frozen=True)
class Member:
    path: Path
    content: dict[str, Any]  # of the checkpoint
    model: nn.Module

    @property
    def data(self) -> dict[str, Any]:
        return self.content["data"]


def main() -> int:
    options = parse_flags()
    paths = options.checkpoints or [Path(options.checkpoint_dir) / name for name in SCRIPTS]
    members = load_members(paths, options)
    data = load_test_data(members[0], options)
    device = pick_device(options.device)
    images, labels = torch.from_numpy(data.test.images), torch.from_numpy(data.test.labels)

    logits = torch.stack([member_logits(member, images, device, options.batch_size) for member in members])
    probs = average_probs(logits, options.average)
    rows = [
        {
            "name": name,
            "checkpoint": str(member.path),
            "loss": metrics.cross_entropy(own, labels),
            "accuracy": metrics.accuracy(own, labels),
        }
        for name, member, own in zip(names(members), members, logits, strict=True)
    ]
    ensemble = {"loss": metrics.negative_log_likelihood(probs, labels), "accuracy": metrics.accuracy(probs, labels)}

    result = {
        "members": rows,
        "ensemble": ensemble,
        "average": options.average,
        "data": data.source,
        "num_images": len(data.test),
    }
    folder = Path(options.plot_dir)
    with files.replacing(folder / "ensemble.json", "the results") as file:
        file.write((json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    # Images from folders come class by class: shuffled, the running figures show how the results settle instead.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    plotting.plot_ensemble(
        folder / "ensemble.png",
        members=[
            row | {"probs": own[order].double().softmax(1).numpy()} for row, own in zip(rows, logits, strict=True)
        ],
        ensemble=ensemble | {"name": "ensemble", "probs": probs[order].numpy()},
        labels=labels[order].numpy(),
        classes=data.classes,
        title=f"{len(members)} networks, {options.average} averaged, on {len(data.test):,} test images of "
        f"{Path(data.source).name}",
    )
    print(table(result))
    print(f"plots and figures: {folder / 'ensemble.png'}, {folder / 'ensemble.json'}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="default: the three networks' in --checkpoint-dir")
    parser.add_argument("--average", choices=AVERAGES, default="softmax", help="what is averaged (default: softmax)")
    parser.add_argument("--data", help="test on this instead of the data that the members were trained with")
    parser.add_argument("--data-url", help="where to look first for the CIFAR-10 archive")
    parser.add_argument("--test-size", type=int, help="test on so many images, the same number of each class")
    parser.add_argument("--batch-size", type=int, help="images evaluated in one go (default: 512 of 32×32)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    parser.add_argument("--checkpoint-dir", default="checkpoints", help="(default: checkpoints)")
    parser.add_argument("--plot-dir", default="plots", help="for ensemble.png and ensemble.json (default: plots)")
    options = parser.parse_args()
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be 1 or more")
    return options


def load_members(paths: list[Path], options: argparse.Namespace) -> list[Member]:
    """Read the checkpoints and see that they go together.

    Raises UserError for one that is missing, unusable or given twice, and for members of other classes, image size,
    data or splits than the first.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a checkpoint is given twice; it would count twice in the average")
    members = []
    for path in paths:
        if not path.exists():
            script = f"python {SCRIPTS[path.name]} makes it" if path.name in SCRIPTS else "give one that is there"
            raise UserError(f"{path}: there is no such checkpoint; {script}")
        content = checkpoint.read(path)
        members.append(Member(path, content, checkpoint.build_model(path, content)))
        if not content["finished"]:
            done, epochs = content["training"]["epoch"], content["recipe"]["epochs"]
            print(f"warning: {path} is not finished, {done} of {epochs} epochs; it is used as it stands")
    first = members[0]
    for member in members[1:]:
        if differences := [
            f"{what}: {theirs} in {first.path}, {ours} in {member.path}"
            for (what, theirs), (_, ours) in zip(
                common_ground(first, options), common_ground(member, options), strict=True
            )
            if theirs != ours
        ]:
            raise UserError("these members do not go together:\n  " + "\n  ".join(differences))
    return members


def common_ground(member: Member, options: argparse.Namespace) -> list[tuple[str, Any]]:
    """What all members must share; what a flag overrides need not be."""
    data = member.data
    ground = [("classes", ", ".join(data["classes"])), ("image size", data["image_size"])]
    if options.data is None:
        ground.append(("images of the data set (digest)", data["digest"]))
    ground += [
        (f"--{name.replace('_', '-')}", data["split"][name])
        for name in SPLIT_FLAGS
        if not (name == "test_size" and options.test_size is not None)
    ]
    return ground


def load_test_data(member: Member, options: argparse.Namespace) -> Dataset:
    """The data that a member was trained with, or what the flags put in its place."""
    split = dict(member.data["split"])
    if options.test_size is not None:
        split["test_size"] = options.test_size
    if options.data is not None:
        split["val_size"], split["train_size"] = 0, None  # hold-outs of the training images, which are not these
    source = options.data or member.data["source"]
    data = dataset.load(source, image_size=member.data["image_size"], data_url=options.data_url, **split)
    if list(data.classes) != member.data["classes"]:
        raise UserError(
            f"--data {source} has the classes {', '.join(data.classes)}; {member.path} was trained on "
            f"{', '.join(member.data['classes'])}"
        )
    if options.data is None and data.digest != member.data["digest"]:
        raise UserError(
            f"{source} no longer holds the images that {member.path} was trained with; restore them, or give --data to "
            "test on others"
        )
    return data


def member_logits(member: Member, images: Tensor, device: torch.device, batch_size: int | None) -> Tensor:
    """A member's logits (N, C) for `images`, uint8 (N, 3, H, W). Raises UserError where they are not finite."""
    model = member.model.to(device, memory_format=torch.channels_last)
    mean, std = (tuple(member.data[name]) for name in ("mean", "std"))
    logits = predict(model, images, device, mean=mean, std=std, batch_size=batch_size)
    if not logits.isfinite().all():
        raise UserError(f"{member.path}: its predictions are not finite; train it again with a lower --lr")
    return logits


def names(members: list[Member]) -> list[str]:
    """File names without their ending, or whole paths where two would be the same."""
    stems = [member.path.stem for member in members]
    return stems if len(set(stems)) == len(stems) else [str(member.path) for member in members]


def table(result: dict[str, Any]) -> str:
    title = f"ensemble ({result['average']} averaged)"
    rows = [(row["name"], row) for row in result["members"]] + [(title, result["ensemble"])]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  test loss  test accuracy"]
    lines += [f"{name:{width}}  {row['loss']:9.4f}  {row['accuracy'] * 100:11.2f} %" for name, row in rows]
    lines.append(f"on {result['num_images']:,} test images of {result['data']}")
    return "\n".join(lines)


if __name__ == "__main__":
    errors.run(main)
