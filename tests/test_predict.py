"""predict.py as a user runs it, on random images, with three tiny networks."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import command_line
import numpy as np
import pytest
from command_line import MEMBERS, changed, overflow, softmax
from PIL import Image

import dataset
import predict

CLASSES = ["red", "green", "blue"]


@pytest.fixture
def folder(tmp_path, train):
    """A folder with the default checkpoints and eight images, one of them in a subfolder."""
    for seed, name in enumerate(MEMBERS):
        train(name=name, epochs=1, seed=seed)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(7):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    picture(7).save(tmp_path / "photos" / "more" / "7.png")
    return tmp_path


def picture(seed, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    pixels[..., seed % 3] //= 2
    return Image.fromarray(pixels)


def run(folder, *flags, **options):
    return command_line.run(folder, predict, *flags, **options)


def json_of(folder, *flags, status=0):
    """The content of --json, and stderr."""
    done = run(folder, *flags, "--json", "-", "--device", "cpu")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout), done.stderr


def refused(folder, *flags):
    return command_line.refused(folder, predict, *flags)


def numpy_probs(folder, images, names=MEMBERS):
    return softmax(command_line.numpy_logits(folder, images, names))


def pixels(count=8):
    return np.stack([np.asarray(picture(number)).transpose(2, 0, 1) for number in range(count)])


def test_predictions_are_the_average_in_numpy(folder):
    rows, err = json_of(folder, "photos", "--top", 3)
    assert [row["image"] for row in rows] == [str(Path("photos", f"{number}.png")) for number in range(7)] + [
        str(Path("photos", "more", "7.png"))
    ]
    probs = numpy_probs(folder, pixels())
    for number, row in enumerate(rows):
        mean = probs[:, number].mean(0)
        assert [entry["class"] for entry in row["top"]] == [CLASSES[label] for label in np.argsort(-mean)]
        assert [entry["prob"] for entry in row["top"]] == pytest.approx(np.sort(mean)[::-1], abs=1e-6)
        assert list(row["members"]) == list(MEMBERS)
        for expected, entry in zip(probs[:, number], row["members"].values(), strict=True):
            assert entry == {"class": CLASSES[expected.argmax()], "prob": pytest.approx(expected.max(), abs=1e-6)}
    assert err.splitlines()[-1] == "8 images, 0 skipped"


def test_flags_between_the_images_select_members_average_and_temperature(folder):
    flags = ["--average", "logits", "--temperature", "2", "--top", "1"]
    checkpoints = ["--checkpoints", "checkpoints/resnext.pt", "checkpoints/densenet.pt"]
    rows, _ = json_of(folder, "photos/1.png", *flags, "photos/0.png", *checkpoints)
    powers = np.exp(np.log(numpy_probs(folder, pixels(2), ("resnext", "densenet"))).mean(0) / 2)
    for row, name, expected in zip(rows, ("1.png", "0.png"), powers[::-1], strict=True):
        assert Path(row["image"]).name == name
        assert list(row["members"]) == ["resnext", "densenet"]
        assert row["top"] == [
            {"class": CLASSES[expected.argmax()], "prob": pytest.approx(expected.max() / expected.sum(), abs=1e-6)}
        ]


def test_images_are_decoded_as_in_training(folder, monkeypatch):
    """Images rotated by EXIF, with alpha, gray, 16 bits, palette, animated, large, not square."""
    made = folder / "made"
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (made / split / name).mkdir(parents=True)
        picture(0).save(made / split / name / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, (40, 23)).save(made / "train" / "a" / "rotated.jpg", exif=exif)
    picture(2, (9, 8)).convert("RGBA").save(made / "train" / "a" / "alpha.png")
    picture(3, (100, 8)).convert("L").save(made / "train" / "b" / "gray.jpg")
    Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32)).save(made / "train" / "b" / "deep.png")
    picture(4).save(made / "train" / "b" / "moves.gif", save_all=True, append_images=[picture(5)])
    picture(6, (5, 5)).convert("P").save(made / "train" / "b" / "palette.png", transparency=0)
    (made / "train" / "b" / ".hidden").write_bytes(b"no image")
    (made / "train" / "b" / "Thumbs.db").write_bytes(b"no image")
    expected = dataset.load(made, image_size=8, data_dir=folder / "data").train

    seen, classify = [], predict.classify
    monkeypatch.setattr(predict, "classify", lambda images, *others: seen.append(images) or classify(images, *others))
    rows, _ = json_of(folder, made / "train", "--batch-size", 3)
    assert len(rows) == 8
    assert np.array_equal(np.concatenate(seen), expected.images)


def test_broken_images_are_reported_and_skipped_in_batches_of_any_size(folder):
    photos = folder / "photos"
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:-40])
    (photos / "3.png").write_bytes(b"just some text")
    (photos / "gone.png").symlink_to("nowhere.png")
    rows, err = json_of(folder, "photos", "--batch-size", 3, status=1)
    assert len(rows) == 9
    broken = {Path(row["image"]).name: row["error"] for row in rows if "error" in row}
    assert list(broken) == ["1.png", "3.png", "gone.png"]
    for name, error in broken.items():
        assert str(Path("photos", name)) in error
        assert f"skipped: {error}\n" in err
    assert all(set(row) == {"image", "error"} for row in rows if "error" in row)
    assert err.splitlines()[-1] == "6 images, 3 skipped"
    # The predictions for the other images do not change.
    for name in broken:
        (photos / name).unlink()
    whole, _ = json_of(folder, "photos")
    for row, other in zip(whole, (row for row in rows if "top" in row), strict=True):
        assert row["image"] == other["image"]
        for entry, same in zip(row["top"], other["top"], strict=True):
            assert entry == {"class": same["class"], "prob": pytest.approx(same["prob"], abs=1e-6)}

    (folder / "text.jpg").write_bytes(b"just some text")
    done = run(folder, "text.jpg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("0 images, 1 skipped\n")


def test_folders_are_filtered_by_extension_and_named_files_are_not(folder):
    photos = folder / "photos"
    (photos / ".hidden").mkdir()
    picture(1).save(photos / ".hidden" / "1.png")
    picture(0).save(photos / "8", "png")
    (photos / "more" / "notes.TXT").write_text("no image")
    assert run(folder, "photos", "--csv", "photos/out.csv").returncode == 0
    assert sorted(Path(row["image"]).name for row in json_of(folder, "photos")[0]) == [f"{n}.png" for n in range(8)]
    rows, _ = json_of(folder, "photos/.hidden/1.png", "photos/8", "photos/more")
    assert [Path(row["image"]).name for row in rows] == ["1.png", "8", "7.png"]
    assert "out.csv: not an image" in run(folder, "photos/out.csv").stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows any bytes in a file name")
def test_file_names_with_control_characters_are_escaped(folder):
    names = ["two\nlines \x1b[31mred.png", os.fsdecode(b"\xff.png")]
    for number, name in enumerate(names):
        picture(number).save(folder / name)
    done = run(folder, *names, "--csv", "out.csv")
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == ["two\\nlines \\x1b[31mred.png", "\\udcff.png"]
    assert [row["image"] for row in json_of(folder, *names)[0]] == names
    table = list(csv.reader(io.StringIO((folder / "out.csv").read_text("utf-8"))))
    assert [row[0] for row in table[1:]] == [names[0], "\\udcff.png"]


def test_verbose_shows_each_members_class(folder):
    rows, _ = json_of(folder, "photos/0.png")
    done = run(folder, "photos/0.png", "--verbose", "--top", 1)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, (name, entry) in zip(lines[1:], rows[0]["members"].items(), strict=True):
        assert line.split() == [name, entry["class"], f"{entry['prob'] * 100:.1f}", "%"]
    assert len(set(map(len, lines))) == 1
    assert len(run(folder, "photos/0.png").stdout.splitlines()) == 1


def test_json_and_csv_have_the_same_content(folder):
    (folder / "photos" / "3.png").write_bytes(b"just some text")
    done = run(folder, "photos", "--top", 2, "--json", "out/all.json", "--csv", "out/all.csv")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 7
    rows = json.loads((folder / "out" / "all.json").read_text("utf-8"))
    header, *table = csv.reader(io.StringIO((folder / "out" / "all.csv").read_text("utf-8")))
    assert header == ["image", "class1", "prob1", "class2", "prob2", "error"]
    assert len(rows) == len(table) == 8
    for row, cells in zip(rows, table, strict=True):
        entries = [str(entry[key]) for entry in row.get("top", []) for key in ("class", "prob")]
        assert cells == [row["image"], *(entries or [""] * 4), row.get("error", "")]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["all.csv", "all.json"]
    printed = run(folder, "photos", "--top", 2, "--csv", "-").stdout
    assert printed == (folder / "out" / "all.csv").read_text("utf-8")


def test_a_failed_run_leaves_the_old_files(folder):
    (folder / "out.json").write_text("before")
    changed(folder / "checkpoints" / "resnext.pt", overflow)
    assert "resnext.pt: its predictions are not finite" in refused(folder, "photos", "--json", "out.json")
    assert (folder / "out.json").read_text() == "before"
    assert not list(folder.glob(".out*"))


def test_unusual_sizes():
    near = [(8, 8), (32, 32), (64, 32), (4, 4), (16, 8)]
    far = [(33, 33), (3, 3), (17, 8), (8, 17), (4000, 3000)]
    assert [predict.is_unusual(size, 8) for size in near + far] == [False] * 5 + [True] * 5


def test_unusual_sizes_are_noted(folder):
    for number in range(4):
        picture(number, (50 + number, 40)).save(folder / "photos" / f"large{number}.png")
    assert "note" not in run(folder, "photos").stderr, "networks trained on a folder may know such sizes"
    changed(folder / "checkpoints" / "densenet.pt", lambda content: content["data"].update(source="digits"))
    assert "note" not in run(folder, "photos/0.png").stderr
    done = run(folder, "photos", "--verbose")
    note = next(line for line in done.stderr.splitlines() if line.startswith("note: "))
    assert "4 images far from 8×8" in note
    for number in range(3):
        assert f"{Path('photos', f'large{number}.png')} ({50 + number}×40)" in note
    assert "large3" not in note
    assert "and 1 more" in note
    assert (done.stdout + done.stderr).count("far from") == 1


def test_bfloat16_gives_nearly_the_same_probabilities(folder):
    exact, rounded = (
        [entry["prob"] for row in json_of(folder, "photos", "--precision", precision)[0] for entry in row["top"]]
        for precision in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["photos", "--top", "0"], "--top is 0; it must be 1 or more"),
        (["photos", "--top", "4"], "--top is 4; the networks have 3 classes, so it must be 1 to 3"),
        (["photos", "--json", "-", "--csv", "-"], "--json and --csv both name -"),
        (["photos", "nowhere.png"], "nowhere.png: there is no such file"),
        (["photos", "empty"], "empty: there are no images"),
        (["--checkpoints", "checkpoints"], "no images are given"),
        (["photos", "--json", "photos/0.png/out.json"], "out.json: the predictions could not be written"),
        (["photos", "--json", "photos/1.png"], "1.png exists and is no .json file; it is not replaced"),
        (["photos", "--json", "empty"], "empty: the predictions could not be written"),
    ],
)
def test_invalid_arguments_are_errors(folder, flags, words):
    (folder / "empty").mkdir()
    (folder / "empty" / ".hidden.png").write_bytes(b"")
    assert words in refused(folder, *flags)


@pytest.mark.parametrize("flags", [[], ["--json", "-"], ["--csv", "-"]])
def test_a_closed_stdout_ends_the_script_quietly(folder, flags):
    (folder / "other.json").write_text("before")
    extra = flags or ["--json", "other.json"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        done = run(folder, "photos", *extra, stdout=stdout)
    assert (done.returncode, done.stderr) == (141, "")
    assert (folder / "other.json").read_text() == "before"


def test_checkpoints_may_be_among_the_images(folder):
    rows, _ = json_of(folder, "photos/0.png", "checkpoints/resnext.pt", "photos/1.png")
    assert [list(row["members"]) for row in rows] == [["resnext"]] * 2
