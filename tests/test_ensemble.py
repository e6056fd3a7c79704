"""models/ensemble.py and evaluation/cost.py: averages, cascades, and accuracy against cost."""

import json
from types import SimpleNamespace

from common.errors import UserError

import command_line
import numpy as np
import pytest
import torch
from command_line import MEMBERS, changed, softmax
from PIL import Image

import models.ensemble
import predict
from evaluation import cost, members, metrics, report
from models.ensemble import Ensemble, average_probs
from plotting.ensemble import plot_cost
from training import checkpoint
from utils import normalize


@pytest.fixture
def paths(train, tmp_path):
    """Checkpoints of three members."""
    for seed in range(3):
        train(name=f"tiny{seed}", epochs=1, seed=seed)
    return sorted((tmp_path / "checkpoints").glob("*.pt"))


@torch.no_grad()
@pytest.mark.parametrize("average", models.ensemble.AVERAGES)
def test_an_ensemble_averages_its_members(paths, images, average):
    changed(paths[1], lambda content: content["data"].update(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]))
    ensemble = members.load(paths, average=average)
    assert (ensemble.classes, ensemble.image_size, ensemble.training) == (["red", "green", "blue"], 8, False)
    logits = []
    for path in paths:
        content = checkpoint.read(path)
        pixels = normalize(images, tuple(content["data"]["mean"]), tuple(content["data"]["std"]))
        logits.append(members.build_member(path, content).network(pixels))
    torch.testing.assert_close(ensemble.logits(images), torch.stack(logits), rtol=1e-5, atol=1e-5)
    probs = ensemble(images)
    assert (probs.dtype, probs.shape) == (torch.float32, (11, 3))
    torch.testing.assert_close(probs, average_probs(torch.stack(logits), average), rtol=1e-5, atol=1e-6)
    assert probs.std(0).min() > 1e-4, "the output should depend on the image"


@pytest.mark.parametrize("average", models.ensemble.AVERAGES)
def test_a_temperature_divides_the_log_of_the_average(average):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (3, 50, 7)))
    for temperature in (0.5, 1.0, 3.0):
        powers = average_probs(logits, average).pow(1 / temperature)
        expected = powers / powers.sum(1, keepdim=True)
        torch.testing.assert_close(average_probs(logits, average, temperature), expected)


def test_an_ensemble_without_members_is_refused():
    with pytest.raises(UserError, match="none is given"):
        members.load([])


def test_images_of_another_dtype_or_shape_are_refused(paths, images):
    ensemble = members.load(paths)
    for wrong in (images / 255, images[0], images[:, :, :4], images[:, :1]):  # floats, one image, another size, gray
        with pytest.raises(ValueError, match=r"expected torch\.uint8, values 0 to 255, of shape \(B, 3, 8, 8\)"):
            ensemble(wrong)
    assert not ensemble(images).requires_grad


COSTS = [
    {"name": "expensive", "milliseconds": 30.0, "multiply_adds": 300},
    {"name": "cheap", "milliseconds": 2.0, "multiply_adds": 10},
    {"name": "medium", "milliseconds": 9.0, "multiply_adds": 90},
]
ORDER = [1, 2, 0]  # of COSTS, the cheapest first


@pytest.fixture
def made_up():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 1, 200, 4, generator=generator, dtype=torch.float64)
    return SimpleNamespace(
        logits=logits, probs=logits[:, 0].softmax(2), labels=torch.randint(4, (200,), generator=generator)
    )


def plain_cascade(probs, threshold):
    """The cascade image by image: probabilities, and how many members ran on each image."""
    results, counts = [], []
    for image in range(probs.shape[1]):
        for count in range(1, len(probs) + 1):
            mean = probs[:count, image].mean(0)
            if mean.max() >= threshold:
                break
        results.append(mean)
        counts.append(count)
    return torch.stack(results), counts


def test_cascade_rows_have_the_cost_of_the_members_that_ran(made_up):
    rows = cost.cascade_rows(made_up.probs, made_up.labels, COSTS)
    assert [row["threshold"] for row in rows] == list(cost.THRESHOLDS)
    for row in rows:
        expected, counts = plain_cascade(made_up.probs[ORDER], row["threshold"])
        shares = [np.mean([count > place for count in counts]) for place in range(3)]
        assert list(row["seen"]) == ["cheap", "medium", "expensive"]
        assert list(row["seen"].values()) == pytest.approx(shares)
        assert row["milliseconds"] == pytest.approx(2 * shares[0] + 9 * shares[1] + 30 * shares[2])
        assert row["multiply_adds"] == pytest.approx(10 * shares[0] + 90 * shares[1] + 300 * shares[2])
        assert row["accuracy"] == pytest.approx(metrics.accuracy(expected, made_up.labels))
        assert row["loss"] == pytest.approx(metrics.negative_log_likelihood(expected, made_up.labels))
    assert rows[-1]["milliseconds"] == pytest.approx(41)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 7), (6, 63), (7, 7 + 21 + 7 + 1), (8, 8 + 28 + 8 + 1)])
def test_the_number_of_subsets(count, expected):
    found = list(cost.subsets(count))
    assert len(found) == len(set(found)) == expected
    assert found[-1] == tuple(range(count))


def test_subset_rows_have_the_average_and_the_cost_of_the_subset(made_up):
    rows = cost.subset_rows(made_up.logits, made_up.labels, COSTS, "softmax", 1.0)
    assert [row["members"] for row in rows[:4]] == [["expensive"], ["cheap"], ["medium"], ["expensive", "cheap"]]
    mean = made_up.probs[[0, 2]].mean(0)
    assert rows[4]["members"] == ["expensive", "medium"]
    assert rows[4]["loss"] == pytest.approx(metrics.negative_log_likelihood(mean, made_up.labels))
    assert (rows[4]["milliseconds"], rows[4]["multiply_adds"]) == (39, 390)
    # The temperature applies to averages, not to single members.
    warm = cost.subset_rows(made_up.logits, made_up.labels, COSTS, "softmax", 2.0)
    assert [one["loss"] == two["loss"] for one, two in zip(rows, warm, strict=True)] == [True] * 3 + [False] * 4


def test_the_lowest_threshold_without_loss_of_accuracy_is_picked(made_up):
    ensemble = made_up.probs.mean(0)
    value = cost.pick_threshold(made_up.logits, made_up.labels, COSTS)["value"]
    accuracies = {row["threshold"]: row["accuracy"] for row in cost.cascade_rows(made_up.probs, made_up.labels, COSTS)}
    enough = metrics.accuracy(ensemble, made_up.labels) - 0.001
    assert accuracies[value] >= enough
    assert all(accuracy < enough for threshold, accuracy in accuracies.items() if threshold < value)


def test_the_legend_of_the_cost_plot_fits_in_the_figure(made_up, tmp_path):
    subsets = cost.subset_rows(made_up.logits, made_up.labels, COSTS, "softmax", 1.0)
    cascade = cost.cascade_rows(made_up.probs, made_up.labels, COSTS)
    figure = plot_cost(
        tmp_path / "cost.png", subsets=subsets, cascade=cascade, threshold=0.9, device="CPU", title="three networks"
    )
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert len(legend.get_texts()) == 5
    assert legend.get_title().get_text() == "A expensive   B cheap   C medium"


def test_doubtful_labels_are_the_least_probable_labels(made_up):
    probs = made_up.probs.mean(0)
    rows = report.doubtful_labels(probs, made_up.labels, "abcd")
    assert len(rows) == 50
    given = probs[torch.arange(200), made_up.labels]
    assert [row["index"] for row in rows] == given.argsort()[:50].tolist()
    first = rows[0]
    assert first["label"] == "abcd"[made_up.labels[first["index"]]]
    assert first["label_prob"] == given.min()
    assert (first["prediction"], first["prediction_prob"]) == (
        "abcd"[probs[first["index"]].argmax()],
        probs[first["index"]].max(),
    )


@pytest.fixture
def folder(tmp_path, train):
    """Three checkpoints with different costs, and 30 images."""
    for seed, (name, channels) in enumerate(zip(MEMBERS, (9, 3, 6), strict=True)):
        train(name=name, channels=channels, epochs=2, seed=seed)
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(made_up_images()):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path


def made_up_images():
    pixels = np.random.default_rng(5).integers(0, 190, (30, 3, 8, 8), np.uint8)
    pixels[np.arange(30), np.arange(30) % 3] += 65
    return pixels


CHEAPEST_FIRST = ["mobilenetv2", "resnext", "densenet"]


def middle_threshold(folder):
    """A threshold at which some images stop at each member."""
    probs = softmax(command_line.numpy_logits(folder, made_up_images(), CHEAPEST_FIRST))
    return float(np.median(probs[0].max(1)))


def test_module_and_predict_equal_a_plain_cascade(folder):
    threshold = middle_threshold(folder)
    probs = torch.from_numpy(softmax(command_line.numpy_logits(folder, made_up_images(), CHEAPEST_FIRST)))
    expected, counts = plain_cascade(probs, threshold)
    assert len(set(counts)) > 1

    paths = [folder / "checkpoints" / f"{name}.pt" for name in MEMBERS]
    ensemble = members.load(paths, cascade=threshold)
    with torch.inference_mode():
        found = ensemble(torch.from_numpy(made_up_images()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)

    flags = ["photos", "--cascade", "--threshold", threshold, "--batch-size", 7, "--json", "-", "--device", "cpu"]
    done = command_line.run(folder, predict, *flags)
    rows = json.loads(done.stdout)
    for row, mean, count in zip(rows, expected, counts, strict=True):
        assert row["top"][0]["prob"] == pytest.approx(mean.max().item(), abs=1e-6)
        assert list(row["members"]) == CHEAPEST_FIRST[:count]
    saw = [sum(count > place for count in counts) for place in range(3)]
    assert "seen by " + ", ".join(map("{} {}".format, CHEAPEST_FIRST, saw)) in done.stderr


def test_only_images_of_low_confidence_reach_the_next_member(folder):
    ensemble = members.load(
        [folder / "checkpoints" / f"{name}.pt" for name in MEMBERS], cascade=middle_threshold(folder)
    )
    batches = []
    for member in ensemble.members:
        member.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    ensemble(torch.from_numpy(made_up_images()))
    assert batches[0] == 30
    assert 0 < batches[1] < 30
    assert batches == sorted(batches, reverse=True)
    ensemble.cascade, number = 0.0, len(batches)
    ensemble(torch.from_numpy(made_up_images()))
    assert len(batches) == number + 1, "the second member does not run"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cascade", "--threshold", "1.5"], "the threshold of the cascade is 1.5; it must be 0 to 1"),
        (["--threshold", "0.8"], "--threshold is for --cascade"),
        (["--cascade", "--checkpoints", "checkpoints/resnext.pt"], "there is only checkpoints/resnext.pt"),
        (["--cascade", "--average", "logits"], "remove --average logits"),
        (["--cascade", "--temperature", "2"], "remove --average logits and --temperature"),
    ],
)
def test_an_invalid_cascade_is_refused(folder, flags, words):
    assert words in command_line.refused(folder, predict, "photos", *flags)


def test_an_unknown_average_and_a_cascade_with_another_average_are_value_errors():
    with pytest.raises(ValueError, match="'median'"):
        average_probs(torch.zeros(2, 1, 3), "median")
    with pytest.raises(ValueError, match="averages softmax outputs"):
        Ensemble([], ["a"], 8, average="logits", cascade=0.9)
