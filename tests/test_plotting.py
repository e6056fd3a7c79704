"""The CSV files and the plots: exact numbers, errors, legends and titles."""

import itertools
import math
import struct
from pathlib import Path

from common.errors import UserError

import numpy as np
import pytest
from command_line import refused, run
from conftest import ROOT
from matplotlib.axes import Axes

from plotting import training
from plotting.ensemble import plot_ensemble, plot_mistakes, plot_reliability
from plotting.style import GREEN
from plotting.training import plot_training
from training.history import read_csv, write_csv

# The functions that return the figure without saving it.
draw_training, draw_ensemble = plot_training.__wrapped__, plot_ensemble.__wrapped__
draw_reliability, draw_mistakes = plot_reliability.__wrapped__, plot_mistakes.__wrapped__
BASELINE = ROOT / "docs" / "baseline"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Names that classes and members may have.
NAMES = [
    "猫", "개", "سمكة", "דג", "हाथी", "😀", "Straße", "$x^2$ and $\\frac$", "two\nlines", "_",
    *(f"number {index}, with a name longer than anyone would write" for index in range(4)),
]  # fmt: skip

# No plot may cause a warning of matplotlib.
pytestmark = pytest.mark.filterwarnings("error")


def make_history(epochs: int, *, val: bool = False) -> list[dict]:
    """The history of a run that learns, with numbers that use the full precision of a float."""
    history = []
    for epoch in range(1, epochs + 1):
        left = math.exp(-4 * epoch / epochs)
        row = {
            "epoch": epoch,
            "learning_rate": 0.1 / epoch,
            "train_loss": 1.7 * left + 0.01 / 3,
            "train_accuracy": 1 - 0.6 * left,
            "test_loss": 1.4 * left + 0.2 / 3,
            "test_accuracy": 0.95 - 0.5 * left,
            "seconds": 11 + 1 / epoch,
            "images_per_second": 50_000 / (11 + 1 / epoch),
        }
        if val:
            row |= {"val_loss": 1.5 * left + 0.1, "val_accuracy": 0.93 - 0.5 * left}
        history.append(row)
    return history


def make_probs(members: int, classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (M, N, C) of members that are usually right, and the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(members, images, classes))
    logits[:, np.arange(images), labels] += 3
    return np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True), labels


def make_ensemble(members: int, classes: int, images: int = 300) -> dict:
    """The arguments of plot_ensemble, except for `classes` and `title`."""
    probs, labels = make_probs(members, classes, images)

    def row(name: str, probs: np.ndarray) -> dict:
        per_image = {"loss": -np.log(probs[np.arange(images), labels]), "accuracy": probs.argmax(axis=1) == labels}
        loss, accuracy = per_image["loss"].mean(), per_image["accuracy"].mean()
        intervals = {"loss": [0.8 * loss, 1.2 * loss], "accuracy": [0.9 * accuracy, 1.05 * accuracy]}
        return {"name": name, "loss": loss, "accuracy": accuracy, "intervals": intervals, "per_image": per_image}

    ensemble = probs.mean(axis=0)
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (labels, ensemble.argmax(axis=1)), 1)
    rows = [row(f"member {index}", member) for index, member in enumerate(probs)]
    return {"rows": [*rows, row("ensemble", ensemble)], "confusion_matrix": matrix}


def make_bins(names: list[str]) -> list[dict]:
    """The rows of plot_reliability, one per name; the first bin is empty, the second has few images."""
    counts = np.array([0, 9, 30, 61])
    confidence, accuracy = np.array([0, 0.4, 0.6, 0.9]), np.array([0, 0.5, 0.5, 1.0])
    return [{"name": name, "calibration_error": 0.1234, "bins": (counts, confidence, accuracy)} for name in names]


def make_mistakes(members: int, classes: int, images: int = 300) -> dict:
    """The arguments of plot_mistakes, except for `classes` and `title`. Every ninth label is changed."""
    probs, labels = make_probs(members, classes, images)
    labels[::9] = (labels[::9] + 1) % classes
    return {
        "images": np.random.default_rng(1).integers(0, 256, (images, 3, 8, 8), np.uint8),
        "labels": labels,
        "members": probs,
        "ensemble": probs.mean(axis=0),
        "names": [f"member {index}" for index in range(members)],
    }


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def legend_texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def all_texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


COLUMNS = "epoch,learning_rate,train_loss,train_accuracy,test_loss,test_accuracy,seconds,images_per_second"
LINE = "1,0.1,2.5,0.5,2.5,0.5,9.0,5000.0"


@pytest.mark.parametrize("val", [False, True])
def test_the_csv_keeps_the_exact_numbers(tmp_path, val):
    history = make_history(7, val=val)
    history[0] |= {"epoch": np.int64(1), "test_accuracy": np.float64(0.1) + 0.2, "test_loss": math.inf, "seconds": 12}
    path = tmp_path / "plots" / "deep" / "run.csv"
    write_csv(make_history(9), path)
    write_csv(history, path)
    again = read_csv(path)
    assert again == history
    assert {type(row["epoch"]) for row in again} == {int}
    assert path.read_text().splitlines()[0] == COLUMNS.replace(",s", ",val_loss,val_accuracy,s" if val else ",s")
    assert list(path.parent.iterdir()) == [path]


def test_csv_from_a_spreadsheet_reads_the_same(tmp_path):
    """With a byte order mark, other line ends, and a column added by the user."""
    path = tmp_path / "run.csv"
    write_csv(make_history(2), path)
    lines = zip(path.read_text().splitlines(), (",note", ",warm-up", ","), strict=True)
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map("".join, lines)).encode())
    assert read_csv(path) == make_history(2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (f"{COLUMNS}\n{LINE}\n2,0.1,fast,{LINE[10:]}", ", line 3: could not convert string to float: 'fast'"),
        # An incomplete copy:
        (f"{COLUMNS}\n{LINE[:-7]}", ", line 2: the number of cells differs from the first line"),
        (COLUMNS, ": has no epochs"),
        (
            "epoch,train_loss,train_accuracy,test_accuracy,seconds,images_per_second\n1",
            ", line 1: no column learning_rate, test_l",
        ),
        ("\xff\xfe", ", line 1: 'utf-8' codec can't decode"),
        (None, ": cannot be read (No such file or directory)"),
    ],
)
def test_an_invalid_csv_is_an_error(tmp_path, content, problem):
    path = tmp_path / "run.csv"
    if content is not None:
        path.write_text(content, "latin-1")
    with pytest.raises(UserError) as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path}{problem}")


def test_an_unwritable_path_is_an_error(tmp_path):
    (tmp_path / "plots").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"plots/run\.csv: the history could not be written"):
        write_csv(make_history(1), tmp_path / "plots" / "run.csv")
    (tmp_path / "run.png").mkdir()
    with pytest.raises(UserError, match=r"run\.png: the plot could not be written"):
        plot_training(tmp_path / "run.png", make_history(1), title="run")


@pytest.mark.parametrize(
    ("epochs", "name", "result", "hours"),
    [(1, "densenet", 95.87, 13.5), (200, "mobilenetv2", 94.90, 7.2), (230, "resnext", 95.45, 9.3)],
)
def test_training_plot_alone_and_with_the_baseline(tmp_path, epochs, name, result, hours):
    path = tmp_path / "plots" / "run.png"
    plot_training(path, make_history(epochs, val=True), title="DenseNet")
    width, height = png_size(path)
    assert 1400 <= width <= 1700
    assert 500 <= height <= 700
    csv = BASELINE / f"{name}.csv"
    figure = plot_training(path, make_history(epochs), title="run", reference=read_csv(csv), reference_name=csv)
    assert png_size(path) == (width, height)
    assert list(path.parent.iterdir()) == [path]
    accuracy, is_cut = figure.axes[1], epochs < 200
    assert legend_texts(accuracy)[1].endswith(f"(reference {result:.2f} %)")
    note = "dashed: reference" + is_cut * "; dotted: its test result after the last epoch"
    note += f" (docs/baseline/{name}.csv · 200 epochs, {hours} h)"
    assert " ".join(figure.get_supxlabel().split()) == note
    dotted = [line.get_ydata()[0] for line in accuracy.lines if line.get_linestyle() == ":"]
    assert dotted == ([pytest.approx(result)] if is_cut else [])
    dashed = [len(line.get_xdata()) for line in accuracy.lines if line.get_linestyle() == "--"]
    assert dashed == 2 * [min(epochs, 200)]
    assert epochs < accuracy.get_xlim()[1] < 1.1 * epochs + 1


@pytest.mark.parametrize(
    "change",
    [
        {"train_loss": math.nan, "test_loss": math.inf, "learning_rate": 0.0},
        {"train_loss": 0.0, "test_loss": 0.0, "seconds": 0.0},
    ],
)
def test_training_plot_with_nan_infinite_and_zero(tmp_path, change):
    history = make_history(4)
    history[-1] |= change
    plot_training(tmp_path / "run.png", history, title="5 $ a run, 10 $ a day\nand $\\frac$")
    png_size(tmp_path / "run.png")


def test_labels_of_the_training_plot():
    history = make_history(200, val=True)
    history[-1] |= {"train_loss": 0.0104, "test_loss": 0.1735, "train_accuracy": 0.99714, "test_accuracy": 0.9587}
    history[-1] |= {"val_loss": 0.2, "val_accuracy": 0.95}
    figure = draw_training(history, title="DenseNet")
    loss, accuracy, rate = figure.axes
    assert figure.get_suptitle() == "DenseNet · 200 epochs, 36.8 min"
    assert loss.get_ylabel() == "loss (nats, log scale)"
    assert legend_texts(loss) == ["train 0.010", "validation 0.200", "test 0.173"]
    assert legend_texts(accuracy) == ["train 99.71 %", "validation 95.00 %", "test 95.87 %"]
    assert [line.get_color() for line in loss.lines] == [line.get_color() for line in accuracy.lines]
    assert list(rate.lines[0].get_ydata()) == [row["learning_rate"] for row in history]
    assert accuracy.lines[2].get_ydata()[-1] == pytest.approx(95.87)


def test_training_plot_marks_a_single_epoch_and_has_a_linear_axis_for_a_narrow_loss():
    figure = draw_training(make_history(1), title="run")
    assert figure.get_suptitle() == "run · 1 epoch, 12 s"
    assert {line.get_marker() for line in figure.axes[0].lines} == {"o"}
    history = [row | {"train_loss": 1.5, "test_loss": 1.2} for row in make_history(4)]
    assert draw_training(history, title="run").axes[0].get_ylabel() == "loss (nats)"


@pytest.mark.parametrize(("members", "classes"), [(1, 2), (3, 10), (9, 100), (13, 10)])
def test_ensemble_plots_with_any_number_of_members_and_any_class_names(tmp_path, caplog, members, classes):
    names = list(itertools.islice(itertools.cycle(NAMES), classes))
    plot_ensemble(tmp_path / "ensemble.png", **make_ensemble(members, classes), classes=names, title="鸟 $1 & $2")
    plot_reliability(tmp_path / "reliability.png", make_bins(NAMES[: members + 1]), title="Calibration $1\nof $2")
    plot_mistakes(tmp_path / "mistakes.png", **make_mistakes(members, classes), classes=names, title="鸟 $1 & $2")
    for name, low, high in (("ensemble", 700, 1200), ("reliability", 500, 1700), ("mistakes", 400, 1400)):
        width, height = png_size(tmp_path / f"{name}.png")
        assert 1400 <= width <= 1700
        assert low <= height <= high
    assert len(list(tmp_path.iterdir())) == 3
    assert not caplog.records


def test_ensemble_plots_of_one_image_and_without_mistakes(tmp_path):
    result = make_ensemble(1, 2, images=1)
    for row in result["rows"]:
        row["intervals"] = {name: [row[name]] * 2 for name in ("loss", "accuracy")}  # without any width
    plot_ensemble(tmp_path / "ensemble.png", **result, classes="ab", title="one image")
    mistakes = make_mistakes(1, 2)
    mistakes["labels"] = mistakes["ensemble"].argmax(axis=1)
    figure = plot_mistakes(tmp_path / "mistakes.png", **mistakes, classes="ab", title="none")
    assert "the ensemble makes no mistakes" in all_texts(figure)
    assert png_size(tmp_path / "mistakes.png")[1] < 400


def test_labels_of_the_ensemble_plot():
    result = make_ensemble(3, 10)
    figure = draw_ensemble(**result, classes=CIFAR10, title="Ensemble of three")
    accuracy, loss, accuracy_lines, loss_lines, matrix = figure.findobj(Axes)
    rows = result["rows"]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [row["name"] for row in rows]
    assert [text.get_text() for text in accuracy.texts] == [f"{100 * row['accuracy']:.2f}" for row in rows]
    assert [text.get_text() for text in loss.texts] == [f"{row['loss']:.4f}" for row in rows]
    broad = [list(line.get_xdata()) for line in loss.lines if line.get_linewidth() == 5]
    assert broad == [row["intervals"]["loss"] for row in rows]
    for axes, metric, scale in ((accuracy_lines, "accuracy", 100), (loss_lines, "loss", 1)):
        for line, row in zip(axes.lines, rows, strict=True):
            means = [scale * row["per_image"][metric][:seen].mean() for seen in range(1, 301)]
            assert list(line.get_ydata()) == pytest.approx(means)
    assert [label.get_text() for label in matrix.get_yticklabels()] == list(CIFAR10)
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted class", "true class (each row: 100 %)")
    percent, counts = np.asarray(matrix.images[0].get_array()), result["confusion_matrix"]
    assert percent == pytest.approx(100 * counts / counts.sum(axis=1, keepdims=True))


def test_with_many_classes_the_worst_confusion_is_named():
    result = make_ensemble(1, 100)
    result["confusion_matrix"] = 3 * np.eye(100, dtype=int)
    result["confusion_matrix"][7, [7, 60]] = 0, 3
    figure = draw_ensemble(**result, classes=[f"kind {index}" for index in range(100)], title="many")
    assert any("kind 7 → kind 60  100.0 %" in text for text in all_texts(figure))


def test_labels_of_the_reliability_plot():
    figure = draw_reliability(make_bins(["densenet", "resnext", "ensemble"]), title="Two")
    assert [axes.get_title() for axes in figure.axes] == [
        f"{name}\nECE 12.34 %" for name in ("densenet", "resnext", "ensemble")
    ]
    for axes in figure.axes:
        dots = axes.collections[-1]
        assert np.allclose(dots.get_offsets(), [[40, 50], [60, 50], [90, 100]]), "an empty bin has no dot"
        assert [tuple(face) == (1, 1, 1, 1) for face in dots.get_facecolors()] == [True, False, False]
        assert list(axes.patches[0].get_data().values) == pytest.approx([0, 9, 30, 61])
    assert tuple(figure.axes[-1].collections[-1].get_edgecolors()[0]) == (0, 0, 0, 1), "the ensemble is black"


@pytest.mark.parametrize("members", [3, 9])
def test_labels_of_the_mistakes_plot(members):
    result = make_mistakes(members, 10)
    figure = draw_mistakes(**result, classes=CIFAR10, title="Mistakes")
    labels, ensemble = result["labels"], result["ensemble"]
    predicted, confidence = ensemble.argmax(axis=1), ensemble.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = sorted(wrong, key=lambda image: ensemble[image, labels[image]])[:16]
    assert len(figure.axes) == len(worst) == 16
    for axes, image in zip(figure.axes, worst, strict=True):
        title = f"{CIFAR10[labels[image]]} → {CIFAR10[predicted[image]]}, {100 * confidence[image]:.1f} %"
        assert axes.get_title(loc="left") == title
        assert np.array_equal(axes.images[0].get_array(), result["images"][image].transpose(1, 2, 0))
        assert axes.images[0].get_interpolation() == "nearest"
        answers = axes.texts[1::2] if members == 3 else axes.texts
        for text, probs in zip(answers, result["members"][:, image], strict=True):
            assert text.get_text() == f"{CIFAR10[probs.argmax()]}, {100 * probs.max():.0f} %"
            assert (text.get_color() == GREEN) == (probs.argmax() == labels[image])
    texts = " ".join(all_texts(figure)).replace("\n", " ")
    assert f"{len(wrong):,} mistakes" in texts
    for name in result["names"]:
        assert name in texts


def test_the_best_epoch_is_marked_with_its_results(tmp_path):
    history = make_history(5)
    for row, val_accuracy in zip(history, (0.5, 0.7, 0.9, 0.9, 0.8), strict=True):
        row |= {"val_loss": 1.0, "val_accuracy": val_accuracy}
    figure = plot_training(tmp_path / "run.png", history, title="run")
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert f"test {100 * history[2]['test_accuracy']:.2f} %" in labels
    assert "epoch 3 is kept" in labels


def test_the_script_plots_runs_from_their_csv(tmp_path):
    for name, epochs in (("short", 3), ("long", 7)):
        write_csv(make_history(epochs), tmp_path / f"{name}.csv")
    assert run(tmp_path, training, "short.csv").stdout == "short.png\n"
    assert run(tmp_path, training, "short.csv", "long.csv").stdout == "runs.png\n"
    for name in ("short", "runs"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    said = refused(tmp_path, training, "short.csv", "--output", "long.csv")
    assert "long.csv exists and is no .png file" in said
    assert "--reference has 1 files for 2 runs" in refused(
        tmp_path, training, "short.csv", "long.csv", "--reference", "long.csv"
    )
    alone = (tmp_path / "short.png").read_bytes()
    run(tmp_path, training, "short.csv", "--reference", "long.csv")
    assert (tmp_path / "short.png").read_bytes() != alone


def test_several_runs_with_references(tmp_path):
    runs = [make_history(3), make_history(7)]
    references = {"references": [make_history(5), make_history(5)], "reference_names": ["old/a.csv", "old/b.csv"]}
    figure = training.plot_runs(tmp_path / "runs.png", runs, names=["short", "long"], **references)
    accuracy = figure.axes[1]
    dashed = [line for line in accuracy.lines if line.get_linestyle() == "--"]
    assert [len(line.get_xdata()) for line in accuracy.lines[:2]] == [3, 7]
    assert [len(line.get_xdata()) for line in dashed] == [3, 5]
    assert [line.get_color() for line in dashed] == [line.get_color() for line in accuracy.lines[:2]]
    assert len([line for line in accuracy.lines if line.get_linestyle() == ":"]) == 1, "only one reference is longer"
    assert figure.axes[0].get_xlim()[1] > 7
    assert "(old/a.csv · 5 epochs" in figure.get_supxlabel()
    assert [text.get_text()[:6] for text in figure.legends[0].get_texts()] == ["short:", "long: "]
