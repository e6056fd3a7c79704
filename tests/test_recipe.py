"""The recipe: every hyperparameter is a flag, and invalid values are errors."""

from dataclasses import replace

from common.errors import UserError

import pytest

import dense
import mobilenetv2
import resnext
from training import recipe

SCRIPTS = [dense, mobilenetv2, resnext]
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=[script.__name__ for script in SCRIPTS])

# The flags that may differ from the checkpoint's when a run is resumed, because they do not change the training.
FREE = {
    "device", "deterministic", "compile", "data", "data_url", "name", "checkpoint_dir", "plot_dir", "reference",
    "resume", "overwrite", "dry_run", "tensorboard", "epochs", "dense",
}  # fmt: skip


def parse(*argv: str, script=mobilenetv2):
    return recipe.parse_flags(script.RECIPE, script.__doc__, argv)


def another(item, value):
    """A valid value of a field that differs from `value`."""
    if isinstance(value, bool):
        return not value
    if choices := item.metadata["limits"].get("choices"):
        return next(choice for choice in choices if choice != value)
    if isinstance(value, float):
        return value / 2 + 0.001
    if isinstance(value, int):
        return 2 * value + 1
    return 40 if item.name.endswith("size") else "elsewhere"


@by_script
def test_each_field_is_a_flag(script):
    assert parse(script=script) == script.RECIPE
    for item in recipe.flags(script.RECIPE):
        value = another(item, getattr(script.RECIPE, item.name))
        flag = "--" + item.name.replace("_", "-")
        argv = [flag] if value is True else [flag.replace("--", "--no-")] if value is False else [flag, str(value)]
        changed = parse(*argv, script=script)
        others = recipe.BASELINE if item.name == "recipe" else {}
        assert changed == replace(script.RECIPE, **{item.name: value}, **others), flag
        assert changed != script.RECIPE, flag
        assert changed.given == {item.name, *others}


@by_script
def test_help_lists_each_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help", script=script)
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert script.__doc__.splitlines()[0] in text
    for item in recipe.flags(script.RECIPE):
        value = getattr(script.RECIPE, item.name)
        default = "yes" if value is True else "" if value is None or value is False else value
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["help"] + (f" (default: {default})" if default != "" else "") in text
    with pytest.raises(SystemExit):
        parse("--recipe", "baseline", "--help", script=script)
    assert f"(default: {recipe.BASELINE['epochs']})" in capsys.readouterr().out


@by_script
def test_recipe_baseline_has_the_baselines_values_and_other_flags_override_it(script):
    baseline = parse("--recipe", "baseline", script=script)
    assert {name: getattr(baseline, name) for name in recipe.BASELINE} == recipe.BASELINE
    assert (baseline.epochs, baseline.batch_size, baseline.base_lr, baseline.base_min_lr) == (200, 64, 0.01, 0.0001)
    # The baseline sets everything that determines the training; all other flags select images, network and files.
    which_images = {"image_size", "train_size", "test_size", "val_size", "split_seed", "test_split"}
    free = FREE - {"epochs"} | which_images | {"recipe", "init", "seed", "precision", "sync_bn"}
    free.add("muon_scale")  # SGD does not use it
    assert recipe.BASELINE.keys() == {item.name for item in recipe.flags(recipe.Recipe)} - free
    assert baseline.network_arguments() == script.RECIPE.network_arguments() == {
        dense: {"depth": 121, "growth_rate": 32},
        mobilenetv2: {"width": 1.0},
        resnext: {"cardinality": 2, "base_width": 64},
    }[script]  # fmt: skip
    for argv in (["--recipe=baseline", "--epochs", "3"], ["--epochs", "3", "--recipe", "baseline"]):
        assert parse(*argv, script=script) == replace(baseline, epochs=3)
    assert parse("--recipe", "ours", script=script) == script.RECIPE


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0", "--epochs 1000001", "--batch-size 1", "--batch-size 1000001", "--base-lr 0", "--base-lr 1e+31",
        "--base-lr nan", "--base-min-lr -1", "--warmup -0.1", "--warmup 1.0", "--schedule-step hour", "--momentum -0.5",
        "--momentum 1.5", "--weight-decay -0.1", "--label-smoothing 1.5", "--ema-horizon 1.5", "--seed -1",
        "--seed 18446744073709551616", "--device tpu", "--compile fast", "--precision half", "--recipe theirs",
        "--crop-padding -1", "--brightness 101", "--hue 0.6", "--flip 1.1", "--randaugment-ops 101",
        "--randaugment-magnitude 31", "--cutout -1", "--augment-until 1.5", "--image-size 7", "--image-size 4097",
        "--train-size 0", "--test-size 0", "--val-size -1", "--test-split 0", "--test-split 1.0", "--split-seed -1",
        "--depth 120", "--growth-rate 1025", "--cardinality 0", "--base-width 1025", "--width 0", "--width 101",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_an_error_with_flag_and_value(arguments):
    flag, value = arguments.split()
    name = flag.removeprefix("--").replace("-", "_")
    script = next(script for script in (mobilenetv2, dense, resnext) if hasattr(script.RECIPE, name))
    with pytest.raises(UserError) as refusal:
        parse(flag, value, script=script)
    assert str(refusal.value).startswith(f"{flag} is {float(value) if '.' in value else value}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base-min-lr", "0.2"], "--base-min-lr 0.2 is above --base-lr 0.05"),
        (["--momentum", "0", "--nesterov"], "--nesterov needs a --momentum above 0"),
        (["--resume", "--overwrite"], "give only one of them"),
        (["--crop-padding", "33"], "--crop-padding 33 is above --image-size 32"),
        (["--image-size", "8", "--cutout", "9"], "--cutout 9 is above --image-size 8"),
        (["--data", ""], "--data is ''"),
        (["--plot-dir", "a\0b"], r"--plot-dir is 'a\x00b'"),
        (["--name", ""], "--name ''"),
        (["--name", " net"], "--name ' net'"),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--name", "a" * 300], "--name 'aaaa"),
    ],
    ids=repr,
)
def test_conflicting_values_and_invalid_names_are_refused(arguments, words):
    with pytest.raises(UserError) as refusal:
        parse(*arguments)
    assert words in str(refusal.value)


@pytest.mark.parametrize("flag", ["--recipe", "--epochs"])
def test_a_flag_without_its_value_is_a_one_line_error(capsys, flag):
    with pytest.raises(SystemExit) as end:
        parse(flag)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: argument {flag}: expected one argument (--help lists all flags)\n"


def test_a_constant_learning_rate_is_allowed():
    assert parse("--base-lr", "0.0001", "--base-min-lr", "0.0001").base_min_lr == 0.0001


@by_script
def test_recipes_differ_only_in_fields_that_change_the_training(script):
    ours = script.RECIPE
    assert ours.differences(ours.as_dict()) == []
    for item in recipe.flags(ours):
        if item.name == "precision":
            continue
        value, theirs = getattr(ours, item.name), another(item, getattr(ours, item.name))
        differences = ours.differences({**ours.as_dict(), item.name: theirs})
        flag = "--" + item.name.replace("_", "-")
        expected = [] if item.name in FREE else [f"{flag}: {theirs} in the checkpoint, {value} now"]
        assert differences == expected
