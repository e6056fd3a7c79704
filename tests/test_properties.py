"""Random folders, images and flags: each is accepted, or ends with an error that names it.

The examples are the same in every run. The environment variable PROPERTY_SCALE=20 gives 20 times as many.
"""

import contextlib
import io
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from common.errors import UserError

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dataset import encode, write_folder

import dataset
import dense
import mobilenetv2
import resnext
from dataset import image_folder
from training import recipe


def num_examples(number: int):
    """Settings for this number of examples: always the same ones, without a time limit."""
    return settings(
        max_examples=number * int(os.environ.get("PROPERTY_SCALE", "1")),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking a failing example takes minutes; the examples are small
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def load(source: Path, data_dir: Path) -> dataset.Dataset | None:
    """The data set, or None if it is refused; any exception except UserError fails the test."""
    try:
        return dataset.load(str(source), image_size=8, data_dir=data_dir)
    except UserError as error:
        message = str(error)
    assert str(source) in message
    return None


@st.composite
def damaged(draw, wholes: list[bytes]) -> bytes:
    """One of these files with flipped bits, changed or removed bytes, or without its end."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        start = draw(st.integers(0, len(content) - 1))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 512]))
        match draw(st.sampled_from(["flip", "set", "cut", "end"])):
            case "flip":
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "set":
                content[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del content[start : start + length]
            case "end":
                del content[start:]
    return bytes(content)


# Common file names, and unusual ones that are allowed.
NAMES = st.one_of(
    st.sampled_from(["cat", "Käfer", "Ka\u0308fer", "кошка", "犬", "🐕", "قطة", "a b", " a", "a ", "..a", "-rf"]),
    st.sampled_from([".hidden", "Thumbs.db", "train", "test", "data_batch_1", "batches.meta", "~", "a.png", "a\\b"]),
    st.sampled_from(["\n", "a\tb", "\x7f", "\u202egnp.exe", "\ufeff", "nul", "{x}", "%s", "'", '"', "*", "\udcff"]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12),
).filter(lambda name: name not in (".", ".."))
KINDS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "JPEG": ["L", "RGB", "CMYK"], "GIF": ["L", "P", "RGB"],
    "BMP": ["1", "L", "P", "RGB"], "TIFF": ["1", "L", "LA", "RGB", "RGBA", "CMYK", "I", "F", "YCbCr", "LAB", "I;16"],
    "PPM": ["1", "L", "RGB", "I"], "WEBP": ["RGB", "RGBA"], "TGA": ["L", "RGB", "RGBA"], "PCX": ["L", "P", "RGB"],
    "ICO": ["RGBA"], "SGI": ["L", "RGB"], "DDS": ["RGB", "RGBA"], "JPEG2000": ["L", "RGB", "RGBA"],
}  # fmt: skip
READABLE = [(kind, mode) for kind, modes in KINDS.items() for mode in modes if mode != "LAB"]


def picture(kind: str, mode: str, size: tuple[int, int], seed: int = 0) -> bytes:
    width, height = size
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return encode(generator.integers(0, 1 << 16, (height, width)).astype(np.uint16), kind)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
    return encode(image if mode == "LAB" else image.convert(mode), kind)


@num_examples(60)
@given(data=st.data())
def test_random_class_folders_are_loaded_or_refused(data):
    classes = data.draw(st.sets(NAMES, min_size=1, max_size=4), label="classes")
    contents = st.sets(NAMES, min_size=data.draw(st.integers(0, 1)), max_size=3)
    found = {split: {name: data.draw(contents) for name in sorted(classes)} for split in ("train", "test")}
    if len(classes) > 1 and data.draw(st.integers(0, 9)) == 0:
        found["test"].popitem()
    train, test = (
        {name: sum(image[0] != "." for image in inside) for name, inside in names.items() if name[0] != "."}
        for names in found.values()
    )
    fine = bool(train) and train.keys() == test.keys() and all((*train.values(), *test.values()))
    fine = fine and "\udcff" not in train
    content = picture("PNG", "RGB", (8, 8))
    with folder() as place:
        for split, names in found.items():
            for name, inside in names.items():
                images = dict.fromkeys((f"{image}.png" for image in (*inside, ".hidden")), content)
                write_folder(place / "pets" / split / name, images)
        for _ in ("decoded", "cached"):
            loaded = load(place / "pets", place / "data")
            assert (loaded is not None) == fine
            if loaded:
                assert loaded.classes == tuple(sorted(train))
                for part, counts in ((loaded.train, train), (loaded.test, test)):
                    assert np.bincount(part.labels).tolist() == [counts[name] for name in loaded.classes]


def decode(content: bytes, image_size: int):
    """Decode a file with this content; return its pixels or the error."""
    with folder() as place:
        (place / "the-file").write_bytes(content)
        found = image_folder.decode(place / "the-file", image_size)
    return found if isinstance(found, UserError) else found[0]


WHOLE_IMAGES = [picture(kind, mode, (11, 7)) for kind, modes in KINDS.items() for mode in modes]
# The first bytes of these files, and of PostScript, Photoshop, macOS icon, FITS and WMF files.
MAGIC = [content[:4] for content in WHOLE_IMAGES] + [b"%!PS-Adobe", b"8BPS", b"icns", b"SIMPLE  =", b"\xd7\xcd\xc6\x9a"]


@num_examples(300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(bytes.__add__, st.sampled_from(MAGIC), st.binary(max_size=200)),
        damaged(WHOLE_IMAGES),
    ),
    st.sampled_from([1, 8, 33]),
)
@pytest.mark.filterwarnings("ignore")
def test_random_bytes_are_decoded_or_refused(content, image_size):
    with mock.patch("subprocess.Popen", side_effect=AssertionError("a program was started")):
        decoded = decode(content, image_size)
    if isinstance(decoded, UserError):
        assert "the-file" in str(decoded)
    else:
        assert (decoded.shape, decoded.dtype) == ((3, image_size, image_size), np.uint8)


@num_examples(60)
@given(st.sampled_from(READABLE), st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
def test_images_of_any_kind_and_size_are_decoded(kind_mode, width, height, image_size):
    assume(kind_mode[0] != "ICO" or max(width, height) <= 256)  # the largest icon
    decoded = decode(picture(*kind_mode, (width, height)), image_size)
    assert (decoded.shape, decoded.dtype) == ((3, image_size, image_size), np.uint8)
    assert decoded.flags.c_contiguous


FLAGS = [
    (script, item)
    for script in (dense, mobilenetv2, resnext)
    for item in recipe.flags(script.RECIPE)
    if script is mobilenetv2 or item.metadata["group"] == "network"
]
NUMBERS = ["0", "-0", "1", "-1", "9" * 30, "1e3", "1e400", "-inf", "nan", "1_000", "٣", "0x10", "9" * 5000, "1e-400"]
WORDS = ["", " ", "\0", "a\0b", "--", "True", "none", "baseline", "cpu", "a/b", "é" * 300, "\udcff", "🐕"]
arguments = st.one_of(
    st.sampled_from(NUMBERS + WORDS),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
    st.integers(-3, 40).map(str),
)


def parse(script, argv: list[str]) -> tuple[recipe.Recipe | None, str]:
    """The recipe, or None and the error message."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            return recipe.parse_flags(script.RECIPE, script.__doc__, argv), ""
        except UserError as error:
            return None, str(error)
        except SystemExit as end:
            return None, errors.getvalue() if end.code == 2 else f"ended with status {end.code}"


@pytest.mark.parametrize(("script", "item"), FLAGS, ids=[f"{s.__name__} {i.name}" for s, i in FLAGS])
@num_examples(25)
@given(value=arguments)
def test_any_value_of_a_flag_is_accepted_or_an_error_that_names_the_flag(script, item, value):
    parsed, message = parse(script, [f"{recipe.flag_name(item.name)}={value}"])
    assert parsed or recipe.flag_name(item.name) in message


@num_examples(150)
@given(
    st.dictionaries(
        st.sampled_from(recipe.flags(mobilenetv2.RECIPE)).map(lambda item: item.name), arguments, max_size=6
    )
)
def test_any_values_of_several_flags_are_accepted_or_an_error_that_names_one(values):
    parsed, message = parse(mobilenetv2, [f"{recipe.flag_name(name)}={value}" for name, value in values.items()])
    if not parsed:
        assert any(recipe.flag_name(name) in message for name in values)
        return
    assert all(math.isfinite(value) for value in asdict(parsed).values() if isinstance(value, float))
    assert parsed.min_lr <= parsed.lr
    assert not (parsed.resume and parsed.overwrite)
    assert max(parsed.cutout, parsed.crop_padding) <= parsed.image_size
