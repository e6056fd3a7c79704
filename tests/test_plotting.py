"""The pictures and the CSV files behind them: numbers that survive, files whole or absent, everything named on it."""

import csv
import math
import struct
from pathlib import Path

from common.errors import UserError

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation import metrics
from plotting.ensemble import (
    confusion_matrix,
    plot_ensemble,
    plot_mistakes,
    plot_reliability,
    running_accuracy,
    running_loss,
)
from plotting.style import GREEN
from plotting.training import plot_training
from training.history import read_csv, write_csv

# The figures without the file.
draw_training, draw_ensemble = plot_training.__wrapped__, plot_ensemble.__wrapped__
draw_reliability, draw_mistakes = plot_reliability.__wrapped__, plot_mistakes.__wrapped__
ORIGINAL = Path(__file__).parent.parent / "docs" / "original"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Whatever matplotlib has to say about a picture, a user should not have to read it.
pytestmark = pytest.mark.filterwarnings("error")


def make_history(epochs: int, *, val: bool = False) -> list[dict]:
    """A run that learns; its figures have all the digits a float can have."""
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


def make_ensemble(members: int, classes: int, images: int = 300) -> dict:
    """Members that are right more often than not, and the mean of their probabilities."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(members, images, classes))
    logits[:, np.arange(images), labels] += 3
    probs = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)

    def row(name: str, probs: np.ndarray) -> dict:
        loss, accuracy = -np.log(probs[np.arange(images), labels]).mean(), (probs.argmax(axis=1) == labels).mean()
        intervals = {"loss": [0.8 * loss, 1.2 * loss], "accuracy": [0.9 * accuracy, 1.05 * accuracy]}
        return {"name": name, "loss": loss, "accuracy": accuracy, "intervals": intervals, "probs": probs}

    rows = [row(f"member {index}", member.astype(np.float32)) for index, member in enumerate(probs)]
    return {"members": rows, "ensemble": row("ensemble", probs.mean(axis=0)), "labels": labels}


def make_bins(names: list[str]) -> list[dict]:
    """A row of a reliability picture for each name; the first bin holds nothing, the second few images."""
    counts = np.array([0, 9, 30, 61])
    confidence, accuracy = np.array([0, 0.4, 0.6, 0.9]), np.array([0, 0.5, 0.5, 1.0])
    return [{"name": name, "calibration_error": 0.1234, "bins": (counts, confidence, accuracy)} for name in names]


def make_mistakes(members: int, classes: int, images: int = 300) -> dict:
    """Some of the images, at least, have labels that no member knows of."""
    result = make_ensemble(members, classes, images)
    result["labels"][::9] = (result["labels"][::9] + 1) % classes
    return {
        "images": np.random.default_rng(1).integers(0, 256, (images, 3, 8, 8), np.uint8),
        "labels": result["labels"],
        "members": np.stack([row["probs"] for row in result["members"]]),
        "ensemble": result["ensemble"]["probs"],
        "names": [row["name"] for row in result["members"]],
    }


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def legend_texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def all_texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


# --- the CSV files


@pytest.mark.parametrize("val", [False, True])
def test_csv_gives_back_the_same_numbers(tmp_path, val):
    history = make_history(7, val=val)
    write_csv(history, tmp_path / "run.csv")
    again = read_csv(tmp_path / "run.csv")
    assert again == history
    assert [type(row["epoch"]) for row in again] == [int] * 7


def test_csv_takes_numpy_numbers_and_losses_that_are_not_finite(tmp_path):
    history = make_history(2)
    history[0] |= {"epoch": np.int64(1), "test_accuracy": np.float64(0.1) + 0.2, "seconds": 12}
    history[1] |= {"train_loss": math.nan, "test_loss": math.inf}
    write_csv(history, tmp_path / "run.csv")
    first, second = read_csv(tmp_path / "run.csv")
    assert (first["epoch"], first["test_accuracy"], first["seconds"]) == (1, 0.30000000000000004, 12.0)
    assert math.isnan(second["train_loss"])
    assert second["test_loss"] == math.inf


def test_csv_columns_in_order(tmp_path):
    write_csv(make_history(1), tmp_path / "plain.csv")
    write_csv(make_history(1, val=True), tmp_path / "val.csv")
    plain, val = ((tmp_path / name).read_text().splitlines()[0] for name in ("plain.csv", "val.csv"))
    start = "epoch,learning_rate,train_loss,train_accuracy,test_loss,test_accuracy"
    assert plain == f"{start},seconds,images_per_second"
    assert val == f"{start},val_loss,val_accuracy,seconds,images_per_second"


def test_csv_makes_the_folder_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "plots" / "deep" / "run.csv"
    write_csv(make_history(3), path)
    write_csv(make_history(2), str(path))
    assert len(read_csv(str(path))) == 2
    assert list(path.parent.iterdir()) == [path]


def test_csv_from_a_spreadsheet_reads_the_same(tmp_path):
    path = tmp_path / "run.csv"
    write_csv(make_history(2), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_csv(path) == make_history(2)


def test_csv_passes_over_columns_it_does_not_know(tmp_path):
    path = tmp_path / "run.csv"
    write_csv(make_history(2), path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + ",note", lines[1] + ",warm-up", lines[2] + ","]))
    assert read_csv(path) == make_history(2)


def edit_cell(path: Path, row: int, column: str, text: str) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[row][column] = text
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [
        ("test_loss", "fast", "a number"),
        ("test_loss", "", "a number"),
        ("val_accuracy", "95 %", "a number"),
        ("epoch", "2.5", "a whole number"),
    ],
)
def test_bad_cell_is_named(tmp_path, column, text, expected):
    path = tmp_path / "run.csv"
    write_csv(make_history(3, val=True), path)
    edit_cell(path, 1, column, text)
    with pytest.raises(UserError) as caught:
        read_csv(path)
    assert str(caught.value) == f"{path}, line 3, column {column}: found {text!r}, expected {expected}"


def test_lines_of_the_wrong_length_are_named(tmp_path):
    path = tmp_path / "run.csv"
    write_csv(make_history(2), path)
    whole = path.read_text()
    path.write_text(whole.rstrip("\n") + ",7\n")
    with pytest.raises(UserError, match=r"run\.csv, line 3: more cells"):
        read_csv(path)
    path.write_text(whole.rsplit(",", 1)[0] + "\n")  # as an interrupted copy leaves it
    with pytest.raises(UserError, match=r"run\.csv, line 3, column images_per_second: found None"):
        read_csv(path)


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("epoch,train_loss,train_accuracy,test_accuracy,seconds,images_per_second\n1,1,1,1,1,1\n")
    with pytest.raises(UserError, match=r"run\.csv: no column learning_rate, test_loss"):
        read_csv(path)


@pytest.mark.parametrize(("content", "problem"), [(b"", "no column epoch"), (b"\xff\xfe\x00", "not a CSV file")])
def test_files_that_are_no_history(tmp_path, content, problem):
    path = tmp_path / "run.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_csv(path)


def test_a_history_without_epochs(tmp_path):
    write_csv([], tmp_path / "run.csv")
    with pytest.raises(UserError, match=r"run\.csv: has no epochs"):
        read_csv(tmp_path / "run.csv")


def test_missing_file_and_folder_instead_of_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.csv: cannot be read \(No such file"):
        read_csv(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_csv(tmp_path)


# --- whole or not at all


def test_failure_while_writing_a_csv_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.csv"
    write_csv(make_history(2), path)
    broken = make_history(3)
    del broken[2]["test_loss"]
    with pytest.raises(KeyError):
        write_csv(broken, path)
    assert read_csv(path) == make_history(2)
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_while_writing_a_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.png"
    path.write_bytes(b"old")

    def savefig(self, target, **options):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(UserError, match=r"run\.png: the picture could not be written \(No space left on device\)"):
        plot_training(path, make_history(2), title="run")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "plots").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"plots/run\.csv: the history could not be written"):
        write_csv(make_history(1), tmp_path / "plots" / "run.csv")
    with pytest.raises(UserError, match=r"plots/run\.png: the picture could not be written"):
        plot_training(tmp_path / "plots" / "run.png", make_history(1), title="run")


def test_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "run.png").mkdir()
    with pytest.raises(UserError, match=r"run\.png: the picture could not be written"):
        plot_training(tmp_path / "run.png", make_history(1), title="run")
    assert list(tmp_path.iterdir()) == [tmp_path / "run.png"]


# --- the picture of a run


@pytest.mark.parametrize("epochs", [1, 4, 200])
@pytest.mark.parametrize("val", [False, True])
def test_training_picture(tmp_path, epochs, val):
    path = tmp_path / "plots" / "run.png"
    plot_training(path, make_history(epochs, val=val), title="DenseNet")
    width, height = png_size(path)
    assert 1400 <= width <= 1700
    assert 500 <= height <= 700
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("epochs", [1, 4, 200, 230])
def test_training_picture_over_a_reference(tmp_path, epochs):
    plot_training(
        tmp_path / "run.png",
        make_history(epochs),
        title="DenseNet",
        reference=read_csv(ORIGINAL / "densenet.csv"),
        reference_name="densenet.csv",
    )
    png_size(tmp_path / "run.png")


@pytest.mark.parametrize(
    "change",
    [
        {"train_loss": math.nan, "test_loss": math.inf},
        {"train_loss": 0.0, "test_loss": 0.0},
        {"learning_rate": 0.0},
        {"seconds": 0.0},
    ],
)
@pytest.mark.parametrize("epochs", [1, 4])
def test_training_picture_of_odd_numbers(tmp_path, epochs, change):
    history = make_history(epochs)
    history[-1] |= change
    plot_training(tmp_path / "run.png", history, title="5 $ a run, 10 $ a day\nand $\\frac$")
    png_size(tmp_path / "run.png")


def test_training_picture_names_what_it_shows():
    history = make_history(200, val=True)
    history[-1] |= {"train_loss": 0.0104, "test_loss": 0.1735, "train_accuracy": 0.99714, "test_accuracy": 0.9587}
    history[-1] |= {"val_loss": 0.2, "val_accuracy": 0.95}
    figure = draw_training(history, title="DenseNet")
    loss, accuracy, rate = figure.axes
    assert figure.get_suptitle() == "DenseNet · 200 epochs, 36.8 min"
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch"] * 3
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats, log scale)", "accuracy (%)", "learning rate"]
    assert legend_texts(loss) == ["train 0.010", "validation 0.200", "test 0.173"]
    assert legend_texts(accuracy) == ["train 99.71 %", "validation 95.00 %", "test 95.87 %"]
    assert [line.get_color() for line in loss.lines] == [line.get_color() for line in accuracy.lines]
    assert list(rate.lines[0].get_ydata()) == [row["learning_rate"] for row in history]
    assert accuracy.lines[2].get_ydata()[-1] == pytest.approx(95.87)


def test_training_picture_marks_a_single_epoch_and_keeps_a_narrow_loss_linear():
    loss = draw_training(make_history(1), title="run").axes[0]
    assert {line.get_marker() for line in loss.lines} == {"o"}
    history = [row | {"train_loss": 1.5, "test_loss": 1.2} for row in make_history(4)]
    assert draw_training(history, title="run").axes[0].get_ylabel() == "loss (nats)"


def test_training_picture_cuts_a_longer_reference_and_keeps_its_result():
    reference = read_csv(ORIGINAL / "densenet.csv")
    figure = draw_training(
        make_history(40), title="run", reference=reference, reference_name="/home/me/docs/original/densenet.csv"
    )
    accuracy = figure.axes[1]
    assert accuracy.get_xlim()[1] < 45
    assert legend_texts(accuracy)[1].endswith("(reference 95.87 %)")
    dashed = [line for line in accuracy.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 40]
    dotted = [line for line in accuracy.lines if line.get_linestyle() == ":"]
    assert len(dashed) == 2
    assert [line.get_ydata()[0] for line in dotted] == [pytest.approx(95.87)]
    assert figure.get_supxlabel() == (
        "dashed: reference docs/original/densenet.csv · 200 epochs, 13.5 h; dotted: its test result after epoch 200"
    )


def test_training_picture_lets_a_shorter_reference_end_early():
    figure = draw_training(make_history(8), title="run", reference=make_history(4), reference_name="short.csv")
    assert figure.axes[1].get_xlim()[1] > 8
    assert figure.get_supxlabel() == "dashed: reference short.csv · 4 epochs, 46 s"


def test_training_picture_of_nothing():
    with pytest.raises(ValueError, match="without epochs"):
        draw_training([], title="run")


# --- the picture of an ensemble


@pytest.mark.parametrize("members", [1, 3, 9])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_ensemble_picture(tmp_path, members, classes):
    names = [f"class {index}, with a name longer than anyone would write" for index in range(classes)]
    plot_ensemble(tmp_path / "ensemble.png", **make_ensemble(members, classes), classes=names, title="Ensemble")
    width, height = png_size(tmp_path / "ensemble.png")
    assert 1400 <= width <= 1700
    assert 700 <= height <= 1200
    assert list(tmp_path.iterdir()) == [tmp_path / "ensemble.png"]


def test_ensemble_picture_with_names_of_any_script(tmp_path, caplog):
    names = ["猫", "개", "سمكة", "דג", "हाथी", "😀", "Straße", "$x^2$ and $\\frac$", "two\nlines", "_"]
    plot_ensemble(tmp_path / "ensemble.png", **make_ensemble(2, 10), classes=names, title="鸟 $1 & $2")
    png_size(tmp_path / "ensemble.png")
    assert not caplog.records


def test_ensemble_picture_of_one_image(tmp_path):
    plot_ensemble(tmp_path / "ensemble.png", **make_ensemble(1, 2, images=1), classes="ab", title="one image")
    png_size(tmp_path / "ensemble.png")


def test_ensemble_picture_names_what_it_shows():
    result = make_ensemble(3, 10)
    figure = draw_ensemble(**result, classes=CIFAR10, title="Ensemble of three")
    accuracy, loss, accuracy_lines, loss_lines, matrix = figure.findobj(Axes)
    assert accuracy.get_title() == "test accuracy (%)"
    assert loss.get_title() == "test loss (nats)"
    rows = [*result["members"], result["ensemble"]]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [row["name"] for row in rows]
    assert [text.get_text() for text in accuracy.texts] == [f"{100 * row['accuracy']:.2f}" for row in rows]
    assert [text.get_text() for text in loss.texts] == [f"{row['loss']:.4f}" for row in rows]
    assert [text.get_fontweight() for text in loss.texts] == ["normal"] * 3 + ["bold"]
    broad = [list(line.get_xdata()) for line in loss.lines if line.get_linewidth() == 5]
    assert broad == [row["intervals"]["loss"] for row in rows]
    for axes, key, scale in ((accuracy_lines, "accuracy", 100), (loss_lines, "loss", 1)):
        assert axes.get_xlabel() == "test images seen, shuffled"
        ends = [line.get_ydata()[-1] for line in axes.lines]
        assert ends == pytest.approx([scale * row[key] for row in rows], rel=1e-5)
    assert [label.get_text() for label in matrix.get_yticklabels()] == list(CIFAR10)
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted class", "true class")
    assert np.asarray(matrix.images[0].get_array()).sum(axis=1) == pytest.approx(100)


def test_many_members_stay_apart():
    lines = draw_ensemble(**make_ensemble(12, 3), classes="abc", title="twelve").findobj(Axes)[2].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 13


def test_many_classes_name_the_worst_confusion():
    result = make_ensemble(1, 100)
    result["ensemble"]["probs"] = np.eye(100)[np.where(result["labels"] == 7, 60, result["labels"])]
    figure = draw_ensemble(**result, classes=[f"kind {index}" for index in range(100)], title="many")
    assert any("kind 7 → kind 60  100.0 %" in text for text in all_texts(figure))


# --- the picture of calibration


@pytest.mark.parametrize("members", [1, 3, 9, 13])
def test_reliability_picture(tmp_path, members):
    names = [f"member {index}, with a name longer than anyone would write" for index in range(members)]
    plot_reliability(tmp_path / "reliability.png", make_bins([*names, "$1 猫"]), title="Calibration $1\nof $2")
    width, height = png_size(tmp_path / "reliability.png")
    assert 1400 <= width <= 1700
    assert 500 <= height <= 1700
    assert list(tmp_path.iterdir()) == [tmp_path / "reliability.png"]


def test_reliability_picture_names_what_it_shows():
    figure = draw_reliability(make_bins(["densenet", "resnext", "ensemble"]), title="Two")
    assert [axes.get_title() for axes in figure.axes] == [
        f"{name}\nECE 12.34 %" for name in ("densenet", "resnext", "ensemble")
    ]
    assert figure.get_supylabel() == "accuracy (%)"
    for axes in figure.axes:
        dots = axes.collections[-1]
        assert np.allclose(dots.get_offsets(), [[40, 50], [60, 50], [90, 100]]), "an empty bin has no dot"
        assert [tuple(face) == (1, 1, 1, 1) for face in dots.get_facecolors()] == [True, False, False]
        assert list(axes.patches[0].get_data().values) == pytest.approx([0, 9, 30, 61])
    assert tuple(figure.axes[-1].collections[-1].get_edgecolors()[0]) == (0, 0, 0, 1), "the ensemble is black"


# --- the picture of mistakes


@pytest.mark.parametrize("members", [1, 3, 9, 13])
@pytest.mark.parametrize("classes", [2, 100])
def test_mistakes_picture(tmp_path, members, classes):
    names = [f"class {index}, with a name longer than anyone would write" for index in range(classes)]
    plot_mistakes(tmp_path / "mistakes.png", **make_mistakes(members, classes), classes=names, title="Mistakes")
    width, height = png_size(tmp_path / "mistakes.png")
    assert 1400 <= width <= 1700
    assert 400 <= height <= 1400
    assert list(tmp_path.iterdir()) == [tmp_path / "mistakes.png"]


def test_mistakes_picture_without_any_and_with_names_of_any_script(tmp_path, caplog):
    result = make_mistakes(2, 3)
    plot_mistakes(tmp_path / "some.png", **result, classes=["猫", "$x^2$", "two\nlines"], title="鸟 $1 & $2")
    result["labels"] = result["ensemble"].argmax(axis=1)
    plot_mistakes(tmp_path / "none.png", **result, classes="abc", title="none")
    assert png_size(tmp_path / "none.png")[1] < png_size(tmp_path / "some.png")[1]
    assert "no image was mistaken" in all_texts(draw_mistakes(**result, classes="abc", title="none"))
    assert not caplog.records


@pytest.mark.parametrize("members", [3, 9])
def test_mistakes_picture_names_what_it_shows(members):
    result = make_mistakes(members, 10)
    figure = draw_mistakes(**result, classes=CIFAR10, title="Mistakes")
    labels, ensemble = result["labels"], result["ensemble"]
    predicted, confidence = ensemble.argmax(axis=1), ensemble.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    surest = sorted(wrong, key=lambda image: -confidence[image])[:16]
    assert len(figure.axes) == len(surest) == 16
    for axes, image in zip(figure.axes, surest, strict=True):
        said = f"{CIFAR10[labels[image]]} → {CIFAR10[predicted[image]]}, {100 * confidence[image]:.1f} %"
        assert axes.get_title(loc="left") == said
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


# --- the numbers in the picture


def test_running_figures_against_a_loop():
    result = make_ensemble(1, 5, images=40)
    probs, labels = result["members"][0]["probs"], result["labels"]
    accuracy, loss = running_accuracy(probs, labels), running_loss(probs, labels)
    for seen in range(1, 41):
        right = [probs[image].argmax() == labels[image] for image in range(seen)]
        surprise = [-math.log(probs[image, labels[image]]) for image in range(seen)]
        assert accuracy[seen - 1] == pytest.approx(sum(right) / seen)
        assert loss[seen - 1] == pytest.approx(sum(surprise) / seen)
    assert accuracy[-1] == result["members"][0]["accuracy"]


def test_running_loss_of_an_impossible_image_is_that_of_metrics():
    probs, labels = np.array([[1.0, 0.0], [1e-30, 1.0]]), np.array([1, 0])
    loss = running_loss(probs, labels)
    each = metrics.per_image(torch.from_numpy(probs), torch.from_numpy(labels))[:, 0]
    assert loss == pytest.approx([each[0].item(), each.mean().item()])


def test_confusion_matrix_has_a_row_for_each_true_class():
    probs = np.eye(3)[[0, 1, 1, 2]]
    assert confusion_matrix(probs, np.array([0, 0, 0, 1])).tolist() == [[1, 2, 0], [0, 0, 1], [0, 0, 0]]


# --- the original's curves


@pytest.mark.parametrize(
    ("name", "train_loss", "train_accuracy", "test_accuracy", "hours"),
    [
        ("densenet", 0.0104, 0.99714, 0.9587, 13.445),
        ("mobilenetv2", 0.0321, 0.99004, 0.9490, 7.115),
        ("resnext", 0.0112, 0.99764, 0.9545, 9.226),
    ],
)
def test_the_original(name, train_loss, train_accuracy, test_accuracy, hours):
    history = read_csv(ORIGINAL / f"{name}.csv")
    first, last = history[0], history[-1]
    assert [row["epoch"] for row in history] == list(range(1, 201))
    assert last["train_loss"] == train_loss
    assert last["train_accuracy"] == train_accuracy
    assert last["test_accuracy"] == test_accuracy
    assert first["learning_rate"] == 0.01
    assert last["learning_rate"] == pytest.approx(0.000101, abs=1e-6)
    # The hours were counted from the end of the first epoch.
    assert sum(row["seconds"] for row in history[1:]) / 3600 == pytest.approx(hours, rel=1e-3)
    assert first["images_per_second"] == pytest.approx(50_000 / first["seconds"], abs=0.1)
