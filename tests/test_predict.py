"""predict.py as a user runs it, on pictures made here and three networks so small that they load in a moment."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common import errors

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import predict
from dataset import image_folder
from evaluation import members
from models.mobilenetv2 import mobilenetv2
from training import checkpoint, loop
from utils import normalize

ROOT = Path(__file__).parents[1]
MEMBERS = ("densenet", "mobilenetv2", "resnext")
CLASSES = ["red", "green", "blue"]


@pytest.fixture
def folder(tmp_path, tiny, tiny_recipe, tiny_data):
    """A folder with checkpoints under the three scripts' names and eight pictures, one of them further down."""
    for seed, name in enumerate(MEMBERS):
        loop.fit(tiny(), tiny_data(), tiny_recipe(name=name, epochs=1, seed=seed))
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(7):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    picture(7).save(tmp_path / "photos" / "more" / "7.png")
    return tmp_path


def picture(seed, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    pixels[..., seed % 3] //= 2
    return Image.fromarray(pixels)


def run(folder, *flags, stdout=None):
    """Call predict.py's main as its last lines do, with `folder` as the current one."""
    out, err, argv = stdout or io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO(), sys.argv
    sys.argv = ["predict.py", *map(str, flags)]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            errors.run(predict.main)
    except SystemExit as end:
        printed = "" if stdout else out.buffer.getvalue().decode("utf-8")
        return SimpleNamespace(returncode=end.code, stdout=printed, stderr=err.getvalue())
    finally:
        sys.argv = argv


def told(folder, *flags, status=0):
    """The objects of --json, and what was said on stderr."""
    done = run(folder, *flags, "--json", "-", "--device", "cpu")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout), done.stderr


def refused(folder, *flags):
    done = run(folder, *flags)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def numpy_probs(folder, images, names=MEMBERS):
    """Of each member, (M, N, C), with nothing of the engine or the ensemble in between."""
    logits = []
    for name in names:
        path = folder / "checkpoints" / f"{name}.pt"
        model = members.build_member(path, checkpoint.read(path)).network
        with torch.no_grad():
            logits.append(model(normalize(torch.from_numpy(images))).double().numpy())
    powers = np.exp(np.stack(logits))
    return powers / powers.sum(2, keepdims=True)


def pixels(count=8):
    return np.stack([np.asarray(picture(number)).transpose(2, 0, 1) for number in range(count)])


def test_predictions_are_the_average_in_numpy(folder):
    rows, err = told(folder, "photos", "--top", 3)
    assert [row["image"] for row in rows] == [str(Path("photos", f"{number}.png")) for number in range(7)] + [
        str(Path("photos", "more", "7.png"))
    ]
    probs = numpy_probs(folder, pixels())
    for number, row in enumerate(rows):
        mean = probs[:, number].mean(0)
        assert [vote["class"] for vote in row["top"]] == [CLASSES[label] for label in np.argsort(-mean)]
        assert [vote["prob"] for vote in row["top"]] == pytest.approx(np.sort(mean)[::-1], abs=1e-6)
        assert list(row["members"]) == list(MEMBERS)
        for own, vote in zip(probs[:, number], row["members"].values(), strict=True):
            assert vote == {"class": CLASSES[own.argmax()], "prob": pytest.approx(own.max(), abs=1e-6)}
    assert err.splitlines()[-1].startswith("8 images, 0 skipped; decoding ")
    assert "networks" in err.splitlines()[-1]


def test_flags_choose_members_average_and_temperature(folder):
    flags = ["--average", "logits", "--temperature", "2", "--top", "1"]
    rows, _ = told(folder, "photos/0.png", *flags, "--checkpoints", "checkpoints/resnext.pt", "checkpoints/densenet.pt")
    (row,) = rows
    assert list(row["members"]) == ["resnext", "densenet"]
    powers = np.exp(np.log(numpy_probs(folder, pixels(1), ("resnext", "densenet"))[:, 0]).mean(0) / 2)
    assert row["top"] == [
        {"class": CLASSES[powers.argmax()], "prob": pytest.approx(powers.max() / powers.sum(), abs=1e-6)}
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_no_result(folder, batch_size):
    (folder / "photos" / "2.png").write_bytes(b"broken")
    expected, _ = told(folder, "photos", status=1)
    rows, _ = told(folder, "photos", "--batch-size", batch_size, status=1)
    for row, other in zip(rows, expected, strict=True):
        assert row["image"] == other["image"]
        assert row.get("error") == other.get("error")
        for vote, same in zip(row.get("top", ()), other.get("top", ()), strict=True):
            assert vote == {"class": same["class"], "prob": pytest.approx(same["prob"], abs=1e-6)}


def test_the_networks_see_what_they_would_see_in_training(folder, monkeypatch):
    """Rotated by EXIF, with alpha, grey, deep, palette, animated, large, not square."""
    made = folder / "made"
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (made / split / name).mkdir(parents=True)
        picture(0).save(made / split / name / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, (40, 23)).save(made / "train" / "a" / "rotated.jpg", exif=exif)
    picture(2, (9, 8)).convert("RGBA").save(made / "train" / "a" / "alpha.png")
    picture(3, (100, 8)).convert("L").save(made / "train" / "b" / "grey.jpg")
    Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32)).save(made / "train" / "b" / "deep.png")
    picture(4).save(made / "train" / "b" / "moves.gif", save_all=True, append_images=[picture(5)])
    picture(6, (5, 5)).convert("P").save(made / "train" / "b" / "palette.png", transparency=0)
    (made / "train" / "b" / ".hidden").write_bytes(b"no image")
    (made / "train" / "b" / "Thumbs.db").write_bytes(b"no image")
    expected = dataset.load(made, image_size=8, data_dir=folder / "data").train

    seen, logits = [], predict.member_logits
    monkeypatch.setattr(
        predict, "member_logits", lambda net, images, precision: seen.append(images) or logits(net, images, precision)
    )
    rows, _ = told(folder, made / "train", "--batch-size", 3)
    assert len(rows) == 8
    assert np.array_equal(np.concatenate(seen), expected.images)


def test_broken_images_are_reported_and_skipped(folder):
    photos = folder / "photos"
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:-40])
    (photos / "3.png").write_bytes(b"just some text")
    (photos / "gone.png").symlink_to("nowhere.png")
    rows, err = told(folder, "photos", status=1)
    assert len(rows) == 9
    broken = {Path(row["image"]).name: row["error"] for row in rows if "error" in row}
    assert list(broken) == ["1.png", "3.png", "gone.png"]
    for name, error in broken.items():
        assert str(Path("photos", name)) in error
        assert f"skipped: {error}\n" in err
    assert all(set(row) == {"image", "error"} for row in rows if "error" in row)
    assert err.splitlines()[-1].startswith("6 images, 3 skipped; ")
    # The others are none the worse for it.
    (photos / "1.png").unlink()
    (photos / "3.png").unlink()
    (photos / "gone.png").unlink()
    whole, _ = told(folder, "photos")
    assert [row["image"] for row in whole] == [row["image"] for row in rows if "top" in row]
    for row, other in zip(whole, (row for row in rows if "top" in row), strict=True):
        assert row["top"][0]["prob"] == pytest.approx(other["top"][0]["prob"], abs=1e-6)


def test_nothing_but_broken_images(folder):
    (folder / "text.jpg").write_bytes(b"just some text")
    done = run(folder, "text.jpg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("0 images, 1 skipped\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX's pipes")
def test_a_pipe_among_the_images_is_not_waited_for(folder):
    pipe = folder / "photos" / "pipe.png"
    os.mkfifo(pipe)
    rows, _ = told(folder, "photos", status=1)
    assert [row["image"] for row in rows if "error" in row] == [str(Path("photos", "pipe.png"))]
    error = refused(folder, "photos/0.png", "--csv", pipe)
    assert "pipe.png: the predictions could not be written (it is not a regular file)" in error
    assert pipe.is_fifo()


def test_links_are_followed_but_not_in_circles(folder):
    photos = folder / "photos"
    (photos / "more" / "back").symlink_to(photos, target_is_directory=True)
    (photos / "itself.png").symlink_to("itself.png")
    (folder / "elsewhere").mkdir()
    picture(8).save(folder / "elsewhere" / "8.png")
    (photos / "out").symlink_to(folder / "elsewhere", target_is_directory=True)
    rows, _ = told(folder, "photos", status=1)
    names = [Path(row["image"]).relative_to("photos").as_posix() for row in rows]
    assert names == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "4.png",
        "5.png",
        "6.png",
        "itself.png",
        "more/7.png",
        "out/8.png",
    ]


def test_hidden_files_are_passed_over_unless_they_are_named(folder):
    hidden = folder / "photos" / ".hidden"
    hidden.mkdir()
    picture(1).save(hidden / "1.png")
    (folder / "photos" / "desktop.ini").write_bytes(b"no image")
    assert len(told(folder, "photos")[0]) == 8
    rows, _ = told(folder, "photos/.hidden/1.png", "photos/more")
    assert [Path(row["image"]).name for row in rows] == ["1.png", "7.png"]


def test_in_folders_files_that_are_no_images_by_their_names_are_passed_over(folder):
    assert run(folder, "photos", "--csv", "photos/out.csv").returncode == 0
    (folder / "photos" / "more" / "notes.TXT").write_text("no image")
    (folder / "photos" / "8").write_bytes((folder / "photos" / "0.png").read_bytes())
    assert sorted(Path(row["image"]).name for row in told(folder, "photos")[0]) == [f"{n}.png" for n in range(8)]
    assert [Path(row["image"]).name for row in told(folder, "photos/8")[0]] == ["8"]
    assert "out.csv: no image" in run(folder, "photos/out.csv").stderr
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("no image")
    assert "texts: there are no images in this folder" in refused(folder, "texts")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes for a file's name")
def test_names_that_are_no_text_steer_no_terminal(folder):
    names = ["two\nlines \x1b[31mred.png", os.fsdecode(b"\xff.png")]
    for number, name in enumerate(names):
        picture(number).save(folder / name)
    done = run(folder, *names, "--csv", "out.csv")
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == ["two\\nlines \\x1b[31mred.png", "\\udcff.png"]
    assert [row["image"] for row in told(folder, *names)[0]] == names
    table = list(csv.reader(io.StringIO((folder / "out.csv").read_text("utf-8"))))
    assert [row[0] for row in table[1:]] == [names[0], "\\udcff.png"]


def test_verbose_shows_every_vote(folder):
    rows, _ = told(folder, "photos/0.png")
    done = run(folder, "photos/0.png", "--verbose", "--top", 1)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, (name, vote) in zip(lines[1:], rows[0]["members"].items(), strict=True):
        assert line.split() == [name, vote["class"], f"{vote['prob'] * 100:.1f}", "%"]
    assert len(set(map(len, lines))) == 1
    assert len(run(folder, "photos/0.png").stdout.splitlines()) == 1


def test_json_and_csv_hold_the_same(folder):
    (folder / "photos" / "3.png").write_bytes(b"just some text")
    done = run(folder, "photos", "--top", 2, "--json", "out/all.json", "--csv", "out/all.csv")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 7
    rows = json.loads((folder / "out" / "all.json").read_text("utf-8"))
    header, *table = csv.reader(io.StringIO((folder / "out" / "all.csv").read_text("utf-8")))
    assert header == ["image", "class1", "prob1", "class2", "prob2", "error"]
    assert len(rows) == len(table) == 8
    for row, cells in zip(rows, table, strict=True):
        votes = [str(vote[key]) for vote in row.get("top", []) for key in ("class", "prob")]
        assert cells == [row["image"], *(votes or [""] * 4), row.get("error", "")]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["all.csv", "all.json"]
    printed = run(folder, "photos", "--top", 2, "--csv", "-").stdout
    assert printed == (folder / "out" / "all.csv").read_text("utf-8")


def test_a_run_that_fails_leaves_the_files_as_they_were(folder):
    (folder / "out.json").write_text("before")
    path = folder / "checkpoints" / "resnext.pt"
    content = checkpoint.read(path)
    content["model"]["classifier.weight"].fill_(3e38)  # finite, but too much for a sum
    checkpoint.write(path, content)
    assert "resnext.pt: its predictions are not finite" in refused(folder, "photos", "--json", "out.json")
    assert (folder / "out.json").read_text() == "before"
    assert not list(folder.glob(".out*"))


@pytest.mark.parametrize(
    ("size", "far"),
    [
        ((8, 8), False), ((32, 32), False), ((33, 33), True), ((64, 32), False), ((4, 4), False), ((3, 3), True),
        ((16, 8), False), ((17, 8), True), ((8, 17), True), ((4000, 3000), True),
    ],
)  # fmt: skip
def test_which_sizes_are_far_from_eight(size, far):
    assert predict.is_unusual(size, 8) == far


def test_sizes_far_from_training_are_noted(folder):
    assert "note" not in run(folder, "photos").stderr
    for number in range(4):
        picture(number, (50 + number, 40)).save(folder / "photos" / f"large{number}.png")
    done = run(folder, "photos", "--verbose")
    note = next(line for line in done.stderr.splitlines() if line.startswith("note: "))
    assert "4 images far from 8×8" in note
    for number in range(3):
        assert f"{Path('photos', f'large{number}.png')} ({50 + number}×40)" in note
    assert "large3" not in note
    assert "and 1 more" in note
    assert done.stdout.count("pixels, far from 8×8") == 4
    assert "  53×40 pixels, far from 8×8" in done.stdout
    assert "far from" not in run(folder, "photos").stdout


@pytest.mark.parametrize("small", [0, 16_384], ids=["in threads", "in this one"])
def test_more_than_a_batch_keeps_its_order(folder, monkeypatch, small):
    """More images than a thread takes in one go, and than a batch: twice."""
    monkeypatch.setattr(image_folder, "SMALL_FILE", small)
    for number in range(50):
        picture(number).save(folder / "photos" / f"many{number:02}.png")
    rows, _ = told(folder, "photos", "--batch-size", 20)
    many = [row for row in rows if "many" in row["image"]]
    assert [Path(row["image"]).name for row in many] == [f"many{number:02}.png" for number in range(50)]
    probs = numpy_probs(folder, pixels(50)).mean(0)
    for row, mean in zip(many, probs, strict=True):
        assert [vote["prob"] for vote in row["top"]] == pytest.approx(np.sort(mean)[::-1], abs=1e-6)


def test_in_bfloat16_the_probabilities_are_nearly_the_same(folder):
    exact, rounded = (
        [vote["prob"] for row in told(folder, "photos", "--precision", precision)[0] for vote in row["top"]]
        for precision in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.02)


def test_a_script_that_makes_a_missing_checkpoint_is_named(folder):
    (folder / "checkpoints" / "mobilenetv2.pt").unlink()
    assert "python mobilenetv2.py makes it" in refused(folder, "photos")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["photos", "--top", "0"], ["--top is 0"]),
        (["photos", "--top", "4"], ["--top is 4", "1 to 3"]),
        (["photos", "--batch-size", "0"], ["--batch-size is 0"]),
        (["photos", "--temperature", "0"], ["--temperature is 0"]),
        (["photos", "--temperature", "nan"], ["--temperature is nan"]),
        (["photos", "--temperature", "1e-320"], ["it must be 0.05 to 20"]),
        (["photos", "--json", "-", "--csv", "-"], ["--json and --csv both name -"]),
        (["photos", "--average", "median"], ["--average"]),
        (["photos", "nowhere.png"], ["nowhere.png: there is no such file"]),
        (["photos", "empty"], ["empty: there are no images"]),
        ([], ["IMAGE"]),
        (["photos", "--json", "photos/0.png/out.json"], ["out.json: the predictions could not be written"]),
        (["photos", "--json", "empty"], ["empty: the predictions could not be written"]),
    ],
)
def test_mistakes_are_named(folder, flags, words):
    (folder / "empty").mkdir()
    (folder / "empty" / ".hidden.png").write_bytes(b"")
    error = refused(folder, *flags)
    for word in words:
        assert word in error


def test_flags_may_stand_between_images(folder):
    rows, _ = told(folder, "photos/1.png", "--top", "1", "photos/0.png")
    assert [Path(row["image"]).name for row in rows] == ["1.png", "0.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the super-user may read everything")
def test_a_folder_that_cannot_be_read_is_named(folder):
    (folder / "photos" / "more").chmod(0)
    try:
        assert "more: this folder cannot be read" in refused(folder, "photos")
    finally:
        (folder / "photos" / "more").chmod(0o700)


@pytest.mark.parametrize("flags", [[], ["--json", "-"], ["--csv", "-"]])
def test_when_nobody_reads_on_it_ends_quietly(folder, flags):
    (folder / "other.json").write_text("before")
    extra = flags or ["--json", "other.json"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        done = run(folder, "photos", *extra, stdout=stdout)
    assert (done.returncode, done.stderr) == (141, "")
    assert (folder / "other.json").read_text() == "before"


def test_the_command_line_into_a_closed_pipe(folder):
    """Python itself must end quietly, too. A process of its own knows no tiny network, so it gets another."""
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["network"] = {"name": "mobilenetv2", "arguments": {"num_classes": 3, "width": 0.25}}
    content["model"] = mobilenetv2(3, width=0.25).state_dict()
    checkpoint.write(folder / "small.pt", content)
    command = [sys.executable, str(ROOT / "predict.py"), "photos", "--checkpoints", "small.pt", "--device", "cpu"]
    options = {"cwd": folder, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}, "timeout": 120}
    reading, writing = os.pipe()
    os.close(reading)
    closed = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, **options)
    os.close(writing)
    assert (closed.returncode, closed.stderr) == (141, b"")
