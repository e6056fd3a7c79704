"""The recipe of a training run: a dataclass of hyperparameters, and the command-line flags made from its fields."""

import argparse
import functools
import operator
import os
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from common import distributed
from common.command_line import Parser
from common.device import DEVICES, PRECISIONS
from common.errors import UserError

import dataset
from dataset import Dataset
from dataset.transforms import Augmentation

# The batch size for which --base-lr and --base-min-lr are given.
REFERENCE_BATCH = 64
COMPILE = ("auto", "none", "graph", "inductor", "both")
COMPILE_HELP = (
    "graph: a step is one CUDA graph; inductor: torch.compile; both: both; none: eager; auto: graph on CUDA, else none"
)
OPTIMIZER_HELP = "sgd, or muon: SGD whose updates of convolutions are orthogonal (Jordan et al. 2024)"
PRECISION_HELP = "bfloat16: autocast; auto: bfloat16 on CUDA and on CPUs with bfloat16 instructions, else float32"
# The original project's recipe for all three networks. --recipe baseline uses it instead of the script's own.
BASELINE = {
    "epochs": 200, "batch_size": 64, "base_lr": 0.01, "base_min_lr": 0.0001, "warmup": 0.0, "schedule_step": "epoch",
    "norm_lr_factor": 1.0, "optimizer": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
    "decay_norms": True,
    "label_smoothing": 0.0, "ema_horizon": 0.0, "crop_padding": 4, "brightness": 0.2, "contrast": 0.2,
    "saturation": 0.2, "hue": 0.2, "flip": 0.5, "randaugment_ops": 2, "randaugment_magnitude": 9, "cutout": 0,
    "augment_until": 1.0, "small_until": 0.0,
}  # fmt: skip


# The limits of a flag's value: what must hold, and the words for it.
LIMITS = {
    "choices": (lambda value, choices: value in choices, "one of {}"),
    "at_least": (operator.ge, "{} or more"),
    "above": (operator.gt, "above {}"),
    "at_most": (operator.le, "{} or less"),
}


def flag(help: str, default: Any = MISSING, *, group: str = "training", fixed: bool = True, **limits: Any) -> Any:
    """A field that is also a command-line flag. `fixed`: a resumed run must keep the checkpoint's value.

    `limits` of the value: see `LIMITS`.
    """
    return field(default=default, metadata={"help": help, "group": group, "fixed": fixed, "limits": limits})


augmentation_flag = functools.partial(flag, group="augmentation", at_least=0)
data_flag = functools.partial(flag, group="data")
files_flag = functools.partial(flag, group="files", fixed=False)
FACTOR_HELP = "ColorJitter: factor from 1 − this to 1 + this"
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a training run. Each field is also a flag; each script sets the fields without a default.

    A script's subclass adds the sizes of its network as fields of the group "network".

    Raises UserError for a value out of range.
    """

    network: ClassVar[str] = ""  # key of models.NETWORKS

    recipe: str = flag("ours or the original project's; other flags override it", "ours", choices=("ours", "baseline"))
    epochs: int = flag("passes over the training images; --resume can add more", at_least=1, at_most=10**6, fixed=False)
    batch_size: int = flag("images per step, over all processes", at_least=2, at_most=10**6)
    base_lr: float = flag(f"peak learning rate for batch size {REFERENCE_BATCH}; scaled with it", above=0, at_most=1e30)
    base_min_lr: float = flag(f"final learning rate for batch size {REFERENCE_BATCH}; scaled with it", at_least=0)
    norm_lr_factor: float = flag("norms and biases learn at this × the learning rate", above=0, at_most=1e6)
    warmup: float = flag("fraction of the run in which the learning rate rises linearly", at_least=0, at_most=0.9)
    schedule_step: str = flag("update the learning rate every epoch or every batch", choices=("epoch", "batch"))
    optimizer: str = flag(OPTIMIZER_HELP, choices=("muon", "sgd"))
    muon_scale: float = flag("muon: a step changes a kernel by this × learning rate × its norm", above=0, at_most=100)
    momentum: float = flag("momentum of the optimizer", at_least=0, at_most=1)
    nesterov: bool = flag("Nesterov momentum")
    weight_decay: float = flag("weight decay; with muon, not of convolutions", at_least=0, at_most=1e30)
    decay_norms: bool = flag("also apply weight decay to norm layers and biases")
    label_smoothing: float = flag("fraction of each target spread evenly over all classes", at_least=0, at_most=1)
    ema_horizon: float = flag("test and save an EMA over this fraction of the run (0: no EMA)", at_least=0, at_most=1)
    init: str | None = flag("start from this checkpoint's weights; new classifier if the classes differ", None)
    seed: int = flag("seed of the weights, the shuffling and the augmentation", 0, at_least=0, at_most=MAX_SEED)
    device: str = flag("auto: CUDA, else MPS, else the CPU", "auto", choices=DEVICES, fixed=False)
    deterministic: bool = flag("bit-identical runs on CUDA too (slower)", False, fixed=False)
    sync_bn: bool = flag("SyncBatchNorm (several processes on CUDA)", False)
    compile: str = flag(COMPILE_HELP, "auto", choices=COMPILE, fixed=False)
    precision: str = flag(PRECISION_HELP, "auto", choices=PRECISIONS)

    crop_padding: int = augmentation_flag("RandomCrop: zeros around the image, in pixels")
    brightness: float = augmentation_flag(FACTOR_HELP, at_most=100)
    contrast: float = augmentation_flag(FACTOR_HELP, at_most=100)
    saturation: float = augmentation_flag(FACTOR_HELP, at_most=100)
    hue: float = augmentation_flag("ColorJitter: hue shift from −this to +this", at_most=0.5)
    flip: float = augmentation_flag("RandomHorizontalFlip: probability", at_most=1)
    randaugment_ops: int = augmentation_flag("RandAugment: operations for each image", at_most=100)
    randaugment_magnitude: int = augmentation_flag("RandAugment: strength", at_most=30)
    cutout: int = augmentation_flag("Cutout: side of the gray square, in pixels (0: off)")
    augment_until: float = augmentation_flag("after this fraction of the epochs, only crop and flip", at_most=1)
    small_until: float = augmentation_flag("until this fraction of the epochs, the central 3/4 (faster)", at_most=1)

    data: str = data_flag("cifar10, cifar100, digits, or a folder of images (see README)", "cifar10", fixed=False)
    data_url: str | None = data_flag("URL to try first for the CIFAR archive", None, fixed=False)
    image_size: int = data_flag("side of the images, in pixels", 32, at_least=8, at_most=4096)
    train_size: int | None = data_flag("number of training images, balanced over the classes", None, at_least=1)
    test_size: int | None = data_flag("number of test images, balanced over the classes", None, at_least=1)
    val_size: int = data_flag("number of training images held out to choose the best epoch", 0, at_least=0)
    test_split: float = data_flag("fraction of each class to test on if no test set exists", 0.2, above=0, at_most=0.9)
    split_seed: int = data_flag("seed of the random subsets and splits above", 0, at_least=0, at_most=MAX_SEED)

    name: str = files_flag("file name of the checkpoint, the plot and the CSV, without extension")
    checkpoint_dir: str = files_flag("folder of the checkpoint", "checkpoints")
    plot_dir: str = files_flag("folder of the plot and the CSV", "plots")
    reference: str | None = files_flag("CSV of another run, drawn dashed in the plot", None)
    resume: bool = files_flag("continue from the checkpoint, if there is one", False)
    overwrite: bool = files_flag("start a new run and replace the existing checkpoint", False)
    dry_run: bool = files_flag("two steps and one test batch: prints memory, speed, time; saves nothing", False)
    tensorboard: bool = files_flag("also write the curves for TensorBoard", False)

    # Names of the fields that flags have set. None if there was no command line: then all fields count as given.
    given: frozenset[str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in flags(self):
            check(item, getattr(self, item.name))
        if self.base_min_lr > self.base_lr:
            raise UserError(f"--base-min-lr {self.base_min_lr:g} is above --base-lr {self.base_lr:g}; give a lower one")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov needs a --momentum above 0; give one, or --no-nesterov")
        for name in ("crop_padding", "cutout"):
            if (value := getattr(self, name)) > self.image_size:
                raise UserError(f"{flag_name(name)} {value} is above --image-size {self.image_size}; give a lower one")
        for name in ("data", "data_url", "init", "checkpoint_dir", "plot_dir", "reference"):
            value = getattr(self, name)
            if value is not None and (not value or "\0" in value):
                raise UserError(f"{flag_name(name)} is {value!r}; it must name a file, a folder or a URL")
        is_invalid = self.name != self.name.strip() or any(character in self.name for character in "/\\:\0")
        if is_invalid or not 1 <= len(os.fsencode(self.name)) <= 200:
            raise UserError(f"--name {self.name!r} is no file name; use up to 200 letters, digits, '-', '_' or '.'")
        if self.resume and self.overwrite:
            raise UserError("--resume continues from the checkpoint, --overwrite replaces it; give only one of them")

    @property
    def lr(self) -> float:
        """Peak learning rate, scaled with the batch size (Goyal et al. 2017, arXiv:1706.02677)."""
        return self.base_lr * self.batch_size / REFERENCE_BATCH

    @property
    def min_lr(self) -> float:
        """Final learning rate, scaled in the same way."""
        return self.base_min_lr * self.batch_size / REFERENCE_BATCH

    @property
    def checkpoint_path(self) -> Path:
        return Path(self.checkpoint_dir) / f"{self.name}.pt"

    @property
    def csv_path(self) -> Path:
        return Path(self.plot_dir) / f"{self.name}.csv"

    @property
    def plot_path(self) -> Path:
        return Path(self.plot_dir) / f"{self.name}.png"

    def augmentation(self) -> Augmentation:
        return Augmentation(**{item.name: getattr(self, item.name) for item in fields(Augmentation)})

    def network_arguments(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in flags(self) if item.metadata["group"] == "network"}

    def split_arguments(self) -> dict[str, Any]:
        """The arguments of dataset.load that choose the splits."""
        names = ("split_seed", "train_size", "val_size", "test_size", "test_split")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "given"}

    def is_given(self, name: str) -> bool:
        is_auto = (name, self.precision) == ("precision", "auto")  # a resumed run keeps its precision
        return not is_auto and (self.given is None or name in self.given)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """One line per given value that differs from `other` (a recipe's `as_dict()`) and would change the training."""
        return [
            f"{flag_name(item.name)}: {other.get(item.name)} in the checkpoint, {getattr(self, item.name)} now"
            for item in flags(self)
            if item.metadata["fixed"] and self.is_given(item.name)
            if getattr(self, item.name) != other.get(item.name)
        ]

    def resumed(self, previous: dict[str, Any] | None) -> Self:
        """This recipe, but with the checkpoint's epochs, data and `fixed` values where no flag was given."""
        stored = previous["recipe"] if previous else {}
        kept = [item.name for item in flags(self) if item.metadata["fixed"] or item.name in ("epochs", "data")]
        return replace(self, **{name: stored[name] for name in kept if name in stored and not self.is_given(name)})


def load_data(recipe: Recipe) -> Dataset:
    """Load the recipe's data set, as NumPy arrays."""
    with distributed.local_rank_zero_first():  # the other processes reuse its download and its cache
        splits = recipe.split_arguments()
        return dataset.load(recipe.data, image_size=recipe.image_size, data_url=recipe.data_url, **splits)


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags(recipe: Recipe | type[Recipe]) -> list[Field]:
    return [item for item in fields(recipe) if "help" in item.metadata]


def check(item: Field, value: Any) -> None:
    """Raise UserError if a field does not allow a value. NaN is within no limits."""
    for name, limit in item.metadata["limits"].items():
        is_within, words = LIMITS[name]
        if value is not None and not is_within(value, limit):
            expected = words.format(", ".join(map(str, limit)) if name == "choices" else limit)
            raise UserError(f"{flag_name(item.name)} is {value}; it must be {expected}")


RecipeT = typing.TypeVar("RecipeT", bound=Recipe)


def parse_flags(recipe: RecipeT, description: str, argv: Sequence[str] | None = None) -> RecipeT:
    """Parse the flags over the script's recipe (with --recipe baseline, over the baseline's).

    An unknown flag or a value of the wrong type ends the process with exit status 2 and one line that names it. Raises
    UserError for a value out of range.
    """
    parser, recipe_parser = Parser(description), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # --recipe is parsed first, because it decides the defaults of the other flags. `parser` reports a missing value.
    recipe_parser.add_argument("--recipe", nargs="?")
    if recipe_parser.parse_known_args(argv)[0].recipe == "baseline":
        recipe = replace(recipe, recipe="baseline", **BASELINE)
    types_of = typing.get_type_hints(type(recipe))
    # The flags of the network first: they differ between the scripts.
    items = sorted(flags(recipe), key=lambda item: item.metadata["group"] != "network")
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(item.metadata["group"] for item in items)}
    for item in items:
        kind, default = types_of[item.name], getattr(recipe, item.name)
        options: dict[str, Any] = {"help": item.metadata["help"], "default": argparse.SUPPRESS}
        if default is not None and default is not False:
            options["help"] += f" (default: {'yes' if default is True else default})"
        if kind is bool:
            # If each script sets its own default, the flag can also be turned off (--no-…).
            options["action"] = argparse.BooleanOptionalAction if item.default is MISSING else "store_true"
        else:
            options["type"] = (typing.get_args(kind) or [kind])[0]  # int for `int | None`
            choices = item.metadata["limits"].get("choices")  # Recipe checks them
            options["metavar"] = f"{{{','.join(map(str, choices))}}}" if choices else options["type"].__name__.upper()
        groups[item.metadata["group"]].add_argument(flag_name(item.name), **options)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, list):  # argparse of Python 3.11 parses --name=-- as a list
            parser.error(f"argument {flag_name(name)}: expected one argument")
    given = frozenset(values) | (frozenset(BASELINE) if recipe.recipe == "baseline" else frozenset())
    return replace(recipe, **values, given=given)
