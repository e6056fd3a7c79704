"""dataset/: every source returns the right images and labels, errors say what is wrong, unknown files do no harm."""

import errno
import hashlib
import io
import os
import pickle
import socket
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest import mock

from common.errors import UserError

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageOps

import dataset
from dataset import cifar10, image_folder

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDER = "cifar-10-batches-py"


def same(one: dataset.Dataset, other: dataset.Dataset) -> bool:
    return (one.classes, one.digest) == (other.classes, other.digest) and all(
        np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
        for a, b in ((one.train, other.train), (one.test, other.test))
    )


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def random_png(seed: int, size: int = 8) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def write_folder(folder, files: dict[str, bytes]):
    """Write `files` (content by path) into `folder`; return it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pictures(per_class: int = 3, splits: tuple[str, ...] = ("train", "test")) -> dict[str, bytes]:
    """A small data set of cats and dogs; all images are different."""
    names = [f"{split}/{c}/{i}.png" for split in splits for c in ("cat", "dog") for i in range(per_class)]
    return {name.removeprefix("/"): random_png(seed) for seed, name in enumerate(names)}


@pytest.fixture
def load(tmp_path):
    """`load` with 8×8 images and a new data_dir."""

    def load(source, **options):
        return dataset.load(str(source), **{"image_size": 8, "data_dir": tmp_path / "data", **options})

    return load


def refused(call, *words: str) -> str:
    """Expect a UserError whose message has all of these words, and return the message."""
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def files(monkeypatch):
    """Files like the official ones, but with fewer images. torchvision is patched to accept their md5."""
    rng, kind = np.random.default_rng(0), torchvision.datasets.CIFAR10
    files = {"batches.meta": pickle.dumps({"label_names": CLASSES}, 2)}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": rng.integers(0, 10, 20).tolist()}
        files[name] = pickle.dumps(batch, 2)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name in files if name.startswith("data_batch")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    return files


@pytest.fixture
def archive(files, tmp_path, monkeypatch):
    """The content of an archive of these files; torchvision is patched to accept its md5."""
    path = tmp_path / "official.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(write_folder(tmp_path / "official", files), FOLDER)
    content = path.read_bytes()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    return content


@pytest.mark.parametrize("place", ["data", "elsewhere"])
def test_official_files_are_read(load, tmp_path, files, place):
    folder = write_folder(tmp_path / place / (FOLDER if place == "data" else "batches"), files)
    loaded = load("CIFAR10" if place == "data" else folder, image_size=32)
    batches = [pickle.loads(content) for name, content in files.items() if name != "batches.meta"]
    data = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    assert loaded.classes == tuple(CLASSES)
    assert np.array_equal(np.concatenate([loaded.train.images, loaded.test.images]), data)
    assert loaded.train.labels.tolist() == [label for batch in batches[:5] for label in batch["labels"]]
    assert (loaded.train.images.dtype, loaded.train.labels.dtype) == (np.uint8, np.int64)
    assert loaded.train.images.flags.c_contiguous
    smaller = load("cifar10" if place == "data" else folder).train.images
    wanted = Image.fromarray(data[7].transpose(1, 2, 0)).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(smaller[7], np.asarray(wanted).transpose(2, 0, 1))


def test_only_official_files_are_unpickled(load, tmp_path, files):
    evil = f"cbuiltins\nopen\n(V{tmp_path / 'ran'}\nVw\ntR.".encode()  # unpickling it opens a file for writing
    for name in files:
        folder = write_folder(tmp_path / f"with {name}" / FOLDER, files | {name: evil})
        refused(lambda folder=folder: load(folder), str(folder), "not the official one", "delete the folder")
    assert not (tmp_path / "ran").exists()
    folder = write_folder(tmp_path / "lacks" / FOLDER, {name: files[name] for name in list(files)[:4]})
    refused(lambda: load(folder), str(folder), "missing")


def test_cifar100_is_another_archive_and_class(load, tmp_path):
    refused(lambda: load("CIFAR100", download=False), "cifar-100-python.tar.gz", "there is no such file")
    assert not (tmp_path / "data").exists()
    assert cifar10.torchvision_class("cifar100") is torchvision.datasets.CIFAR100


# Failures of a host, and a part of each error message.
BAD_HOSTS = {
    "missing": "404", "loop": "infinite loop", "wrong": "corrupted", "short": "", "silent": "timed out",
    "stalls": "timed out", "hangs-up": "closed connection",
}  # fmt: skip


@pytest.fixture
def host(archive, monkeypatch):
    """A local web server: the page "right" serves the archive, every other page fails in another way."""
    monkeypatch.setattr(cifar10, "READ_TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    requests, released = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            page = self.path.strip("/")
            requests.append(page)
            if page == "silent":
                released.wait(10)
            elif page in ("missing", "loop"):
                self.send_response(404 if page == "missing" else 302)
                self.send_header("Location", self.path)
                self.end_headers()
            elif page != "hangs-up":
                self.send_response(200)
                self.send_header("Content-Length", str(len(archive)))
                self.end_headers()
                self.wfile.write({"right": archive, "wrong": bytes(len(archive))}.get(page, archive[:1000]))
                if page == "stalls":
                    released.wait(10)

        def handle(self):
            with suppress(ConnectionError):  # the client has closed the connection
                super().handle()

        def log_message(self, *_):
            pass

    def use(*pages: str) -> list[str]:
        """Make these pages the mirrors of CIFAR-10, and return their addresses."""
        urls = [f"http://127.0.0.1:{server.server_port}/{page}" for page in pages]
        monkeypatch.setitem(cifar10.HOSTS, "cifar10", tuple(urls))
        return urls

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield SimpleNamespace(requests=requests, use=use)
        released.set()
        server.shutdown()


@pytest.mark.parametrize("page", BAD_HOSTS)
def test_a_failing_host_is_skipped_and_reported(load, host, tmp_path, files, capsys, page):
    urls = host.use(page, "right")
    started = time.monotonic()
    assert len(load("cifar10").train) == 100
    assert time.monotonic() - started < 5
    assert socket.getdefaulttimeout() is None
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert line.split("\r")[-1].startswith(f"skipped {urls[0]}: ")
    assert BAD_HOSTS[page] in line
    assert names_in(tmp_path / "data") == [FOLDER, cifar10.torchvision_class("cifar10").filename]
    assert names_in(tmp_path / "data" / FOLDER) == sorted(files)


def test_if_all_hosts_fail_the_error_says_what_to_do_and_no_file_is_left(load, host, tmp_path):
    urls = [*host.use("missing", "wrong"), "no address"]
    words = (*(f"\n  {url}: " for url in urls), "--data-url", "curl", "cifar-10-python.tar.gz")
    message = refused(lambda: load("cifar10", data_url="no address"), *words)
    assert message.count("\n") == 5
    assert names_in(tmp_path / "data") == []


def test_data_url_is_tried_first(load, host):
    right, _ = host.use("right", "missing")
    host.use("missing")
    assert len(load("cifar10", data_url=right).test) == 20
    assert set(host.requests) == {"right"}


def test_an_existing_archive_is_used_if_its_md5_is_right(load, host, tmp_path, archive):
    host.use("missing")
    path = write_folder(tmp_path / "data", {"cifar-10-python.tar.gz": archive[:-1]}) / "cifar-10-python.tar.gz"
    refused(lambda: load("cifar10"), str(path), "md5", "delete it")
    assert path.read_bytes() == archive[:-1]
    path.write_bytes(archive)
    assert len(load("cifar10").train) == 100
    assert host.requests == []


def test_an_interrupted_download_leaves_no_file(load, host, monkeypatch, tmp_path):
    host.use("right")
    monkeypatch.setattr(cifar10.os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load("cifar10")
    assert names_in(tmp_path / "data") == []


def test_images_are_sorted_by_class_then_name(load, tmp_path):
    files = pictures()
    loaded = load(write_folder(tmp_path / "pets", files))
    assert (loaded.classes, loaded.val, loaded.test_split) == (("cat", "dog"), None, None)
    for split in ("train", "test"):
        expected = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in sorted(files) if name.startswith(split)]
        assert np.array_equal(getattr(loaded, split).images, np.stack(expected).transpose(0, 3, 1, 2))
        assert getattr(loaded, split).labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["VAL", "valid", "validation", "Test", "testing"])
def test_common_names_of_the_test_folder_are_recognized(load, tmp_path, name):
    loaded = load(write_folder(tmp_path / "pets", pictures(splits=("Training", name))))
    assert (len(loaded.train), len(loaded.test), loaded.val) == (6, 6, None)


def test_a_folder_of_validation_images_is_used(load, tmp_path):
    folder = write_folder(tmp_path / "pets", pictures(splits=("train", "val", "test")))
    loaded = load(folder)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (6, 6, 6)
    assert not np.array_equal(loaded.val.images, loaded.test.images)
    refused(lambda: load(folder, val_size=2), "--val-size 2", "already has validation images")


@pytest.mark.parametrize("split", ["", "train"])
def test_without_a_test_folder_each_class_is_split(load, tmp_path, split):
    folder = write_folder(tmp_path / "pets", pictures(per_class=10, splits=(split,)))
    loaded, other = load(folder), load(folder, split_seed=1)
    assert np.bincount(loaded.train.labels).tolist() == [8, 8]
    assert np.bincount(loaded.test.labels).tolist() == [2, 2]
    assert loaded.test_split == 0.2
    everything = np.concatenate([loaded.train.images, loaded.test.images])
    assert len(np.unique(everything, axis=0)) == 20
    assert same(load(folder), loaded)
    assert not np.array_equal(other.test.images, loaded.test.images)
    assert other.digest == loaded.digest != load(folder, image_size=9).digest
    assert len(load(folder, test_split=0.5).test) == 10
    for split_share in (0.01, 0.99):
        few = load(write_folder(tmp_path / "few", pictures(per_class=2, splits=(split,))), test_split=split_share)
        assert np.bincount(few.train.labels).tolist() == np.bincount(few.test.labels).tolist() == [1, 1]


def test_subfolders_belong_to_their_class_and_other_files_are_ignored(load, tmp_path, capsys):
    plain = load(write_folder(tmp_path / "plain", pictures()))
    files = {name.replace("cat/", "cat/a/b/"): content for name, content in pictures().items()}
    litter = dict.fromkeys(
        ["train/cat/notes.txt", "train/.DS_Store", "test/dog/Thumbs.db", "README", "train/list.csv"], b"x"
    )
    litter |= {"train/.hidden/a.png": b"x", "train/dog/._0.png": b"x", ".git/a": b"x", "extra/x.png": b"x"}
    assert same(load(write_folder(tmp_path / "pets", files | litter)), plain)
    assert f"note: {tmp_path / 'pets' / 'extra'} is ignored" in capsys.readouterr().err
    deeper = {f"pets-main/{name}": content for name, content in pictures().items()}
    assert same(load(write_folder(tmp_path / "unpacked", deeper)), plain)


def test_links_are_followed_but_no_folder_is_visited_twice(load, tmp_path):
    folder = write_folder(tmp_path / "pets", pictures())
    os.symlink(folder / "train", folder / "train" / "cat" / "round")
    os.symlink(folder / "train" / "dog", folder / "test" / "dog" / "more")
    loaded = load(folder)
    assert np.bincount(loaded.test.labels).tolist() == [3, 6]
    assert np.bincount(loaded.train.labels).tolist() == [6, 3]  # the link puts the dogs below cat/ once


MISTAKES = {
    "a class too few": (lambda files: files | {"train/cow/0.png": random_png(0)}, ["'cow'", "train/", "test/"]),
    "a class without pictures": (
        lambda files: files | {"train/cow/a.txt": b"x", "test/cow/0.png": random_png(0)}, ["train/cow", "no images"],
    ),
    "no folders": (lambda _: {"a.png": random_png(0)}, ["has no folders", "train/<class>"]),
    "one image of a class": (
        lambda _: {"cat/0.png": random_png(0), "cat/1.png": random_png(1), "dog/0.png": random_png(2)},
        ["'dog' has one image", "a test folder"],
    ),
    "pictures in no class": (lambda _: {"train/0.png": random_png(0)}, ["train: has no folders", "for each class"]),
    "a name that is no text": (
        lambda files: files | {"train/\udcff/0.png": random_png(0)}, ["class '\\udcff' is not valid UTF-8"],
    ),
    "two of a kind": (lambda files: files | {"Train/cat/0.png": random_png(0)}, ["both", "Train/", "train/"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_layout_is_an_error(load, tmp_path, change, words):
    folder = write_folder(tmp_path / "pets", change(pictures()))
    refused(lambda: load(folder), str(folder), *words)


def test_a_source_that_is_no_folder_is_an_error(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: load("pets"), "--data pets", str(tmp_path), "cifar10, cifar100, digits")
    assert " in " not in refused(lambda: load(tmp_path / "pets")).split(";")[0]
    refused(lambda: load(""), "--data ''")
    refused(lambda: load("a\0b"), "--data")
    refused(lambda: load("~nobody-of-this-name/x"), "--data ~nobody")
    (tmp_path / "pets.tar.gz").write_bytes(b"anything")
    refused(lambda: load("pets.tar.gz"), "--data pets.tar.gz", "archive, unpack it and give the folder")
    refused(lambda: load("/dev/null"), "--data /dev/null is a file")


def test_an_unreadable_folder_is_an_error(load, tmp_path, monkeypatch):
    folder, scan = write_folder(tmp_path / "pets", pictures()), os.scandir

    def scandir(path):
        if str(path).endswith(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for locked in ("pets", "train", os.path.join("test", "dog")):
        refused(lambda: load(folder), f"{locked}: cannot read this folder (Permission denied)")


def decode(tmp_path, content: bytes, image_size: int, name: str = "x.png"):
    """Decode a file with this content; return its pixels or the error."""
    (tmp_path / name).write_bytes(content)
    found = image_folder.decode(tmp_path / name, image_size)
    return found if isinstance(found, UserError) else found[0]


def test_other_sizes_are_cropped_and_resized_and_the_right_size_is_unchanged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 23, 3), np.uint8)
    wanted = ImageOps.fit(Image.fromarray(noise), (8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(decode(tmp_path, encode(noise), 8), np.asarray(wanted).transpose(2, 0, 1))
    assert np.array_equal(decode(tmp_path, encode(noise[:8, :8]), 8), noise[:8, :8].transpose(2, 0, 1))


def test_gray_alpha_palette_and_16_bit_images_become_rgb(tmp_path):
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (8, 8), np.uint8)
    color = rng.integers(0, 2, (8, 8, 3)).astype(np.uint8) * 255
    alpha = np.concatenate([color, np.full((8, 8, 1), 128, np.uint8)], axis=2)
    palette = Image.fromarray(color).quantize(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (encode(gray), encode(gray.astype(np.uint16) * 256 + 99), encode(np.stack([gray, gray], 2))):
            assert np.array_equal(decode(tmp_path, content, 8), np.stack([gray] * 3))
        for content in (encode(alpha), encode(palette), encode(palette, transparency=bytes(8))):
            assert np.array_equal(decode(tmp_path, content, 8), color.transpose(2, 0, 1))
        assert decode(tmp_path, encode(Image.new("CMYK", (9, 9)), "JPEG"), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("side", [20_000, 1 << 31 - 1])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, side):
    content = bytearray(random_png(0))  # it has 64 pixels, but its header claims many more
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    tracemalloc.start()
    assert "x.png: too large" in str(decode(tmp_path, bytes(content), 8))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_postscript_is_refused_and_not_run(tmp_path):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with mock.patch("subprocess.Popen", side_effect=AssertionError("a program was started")):
        assert "PostScript" in str(decode(tmp_path, content, 8, "x.eps"))


def test_images_that_do_not_fit_in_memory_are_refused(load, tmp_path, files):
    folders = [write_folder(tmp_path / "pets", pictures()), write_folder(tmp_path / "official", files)]
    for source, count in zip((*folders, "digits"), ("12", "100", "1,797"), strict=True):
        words = f"--image-size {10**7}", f"{count} images", "memory"
        refused(lambda source=source: load(source, image_size=10**7), *words)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90° clockwise
    wanted = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(decode(tmp_path, encode(pixels, exif=exif), 8), wanted)
    (tmp_path / "turned.png").write_bytes(encode(np.zeros((20, 30, 3), np.uint8), exif=exif))
    assert image_folder.decode(tmp_path / "turned.png", 8)[1] == (20, 30)


def test_unreadable_images_are_listed_together(load, tmp_path):
    whole = encode(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    broken = {f"train/cat/broken{number:02}.png": whole[: len(whole) // 2] for number in range(7)}
    broken |= {f"train/dog/text{number:02}.jpg": b"just some text" for number in range(6)}
    folder = write_folder(tmp_path / "pets", pictures() | broken)
    message = refused(lambda: load(folder), "13 of 25 images cannot be read", "broken03.png", "text00.jpg", "3 more")
    assert message.count("\n") == 11
    assert "heif" not in message
    (folder / "train" / "cat" / "phone.heic").write_bytes(b"....ftypheic")
    refused(lambda: load(folder), "pip install pillow-heif")
    (folder / "train" / "cat" / "phone.heic").unlink()
    (folder / "train" / "cat" / "a-link.png").symlink_to("nowhere.png")
    refused(lambda: load(folder), "a-link.png: not a file, or a broken link")
    fifo = tmp_path / "pipe.png"
    if hasattr(os, "mkfifo"):
        os.mkfifo(fifo)
        assert "not a file" in str(image_folder.decode(fifo, 8))


def test_the_second_start_uses_the_cache(load, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pets", pictures())
    first = load(folder)
    monkeypatch.setattr(image_folder, "decode", mock.Mock(side_effect=AssertionError("an image is decoded")))
    assert same(load(folder), first)
    with pytest.raises(AssertionError, match="is decoded"):
        load(folder, image_size=9)


def test_a_changed_folder_is_decoded_again_and_old_copies_are_deleted(load, tmp_path):
    folder = write_folder(tmp_path / "pets", pictures())
    digests = [load(folder).digest]
    path = folder / "train/cat/0.png"
    before = path.stat()
    for seed in range(90, 94):
        path.write_bytes(random_png(seed)[: before.st_size].ljust(before.st_size, b"\0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        digests.append(load(folder).digest)
    (folder / "train/cat/0.png").rename(folder / "train/cat/9.png")
    digests.append(load(folder).digest)
    assert len(set(digests)) == 6
    assert len(names_in(tmp_path / "data" / "cache")) == image_folder.MAX_CACHED_COPIES
    load(write_folder(tmp_path / "others", pictures()))
    assert len(names_in(tmp_path / "data" / "cache")) == image_folder.MAX_CACHED_COPIES + 1


def test_a_damaged_cache_is_rebuilt_with_a_warning(load, tmp_path, capsys):
    folder = write_folder(tmp_path / "pets", pictures())
    first = load(folder)
    (path,) = (tmp_path / "data" / "cache").iterdir()
    whole = path.read_bytes()
    np.savez(path, images=np.zeros((3, 3), np.uint8))
    for content in (path.read_bytes(), b"", whole[:-30]):
        path.write_bytes(content)
        assert same(load(folder), first)
        assert "is damaged" in capsys.readouterr().err
        assert same(load(folder), first)
        assert capsys.readouterr().err == ""
    for position in range(0, len(whole), 23):
        path.write_bytes(bytes((*whole[:position], whole[position] ^ 255, *whole[position + 1 :])))
        assert same(load(folder), first), position


def test_a_cache_that_cannot_be_written_is_a_warning(load, tmp_path, capsys):
    folder = write_folder(tmp_path / "pets", pictures())
    (tmp_path / "data").write_bytes(b"a file in its place")
    assert len(load(folder).train) == 6
    assert "every start decodes all images again" in capsys.readouterr().err


def test_digits_equal_scikit_learns(load):
    from sklearn.datasets import load_digits

    loaded, original = load("digits"), load_digits()
    assert loaded.classes == tuple("0123456789")
    everything = np.concatenate([loaded.train.images, loaded.test.images])
    assert everything.dtype == np.uint8
    for channel in everything.transpose(1, 0, 2, 3):  # every original occurs once, with its label
        gray = np.round(original.images * 255 / 16).astype(np.uint8)
        labels = np.concatenate([loaded.train.labels, loaded.test.labels])
        found = sorted((image.tobytes(), label) for image, label in zip(channel, labels, strict=True))
        assert found == sorted((image.tobytes(), label) for image, label in zip(gray, original.target, strict=True))


def test_digits_without_scikit_learn_are_an_error(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused(lambda: load("digits"), "--data digits", "pip install scikit-learn")


@pytest.fixture
def numbered(load, tmp_path):
    """A folder of different images: 12, 9 and 7 training images of three classes, and 5 test images of each."""
    sizes = {"train": (12, 9, 7), "test": (5, 5, 5)}
    names = [
        f"{s}/{'abc'[c]}/{i:02}.png" for s, counts in sizes.items() for c, n in enumerate(counts) for i in range(n)
    ]
    files = {name: encode(np.full((2, 2, 3), seed, np.uint8)) for seed, name in enumerate(names)}
    folder = write_folder(tmp_path / "numbered", files)
    return lambda **options: load(folder, image_size=2, **options)


def numbers(split: dataset.Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_validation_images_are_disjoint_from_training_and_do_not_depend_on_train_size(numbered):
    one = numbered(val_size=7)
    assert sorted(numbers(one.val) + numbers(one.train)) == numbers(numbered().train)
    assert numbers(one.train) == sorted(numbers(one.train))
    for train_size in (3, 14):
        other = numbered(val_size=7, train_size=train_size)
        assert numbers(other.val) == numbers(one.val)
        assert len(other.train) == train_size
        assert not set(numbers(other.val)) & set(numbers(other.train))


def test_random_choices_depend_on_split_seed(numbered):
    sizes = {"train_size": 9, "test_size": 6, "val_size": 3}
    one, again, other = numbered(**sizes), numbered(**sizes), numbered(**sizes, split_seed=1)
    for split in ("train", "test", "val"):
        assert numbers(getattr(one, split)) == numbers(getattr(again, split))
        assert numbers(getattr(one, split)) != numbers(getattr(other, split))
    assert numbers(numbered(test_size=6).test) == numbers(one.test)
    # Each choice has its own random stream: the same size gives different images.
    assert numbers(numbered(val_size=9).val) != numbers(numbered(train_size=9).train)


def test_the_digest_depends_on_the_whole_source(load, tmp_path, numbered):
    digests = {numbered().digest, numbered(val_size=3).digest, numbered(train_size=3).digest}
    assert len(digests) == 1
    files = pictures()
    renamed = {name.replace("cat", "cow"): content for name, content in files.items()}
    relabelled = {name.replace("cat", "x").replace("dog", "cat").replace("x", "dog"): c for name, c in files.items()}
    # The last cat becomes the first dog, so the order of the images is the same.
    moved = {name.replace("train/cat/2", "train/dog/+2"): content for name, content in files.items()}
    repainted = files | {"train/cat/0.png": random_png(99)}
    for number, other in enumerate((files, renamed, relabelled, moved, repainted)):
        digests.add(load(write_folder(tmp_path / str(number), other)).digest)
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("sizes", "flag", "least", "largest"),
    [
        ({"train_size": 24}, "--train-size 24", 3, 23),  # 7 images of each class, and 8 of the two larger ones
        ({"train_size": 2}, "--train-size 2", 3, 23),  # a class would have none
        ({"train_size": 21, "val_size": 3}, "--train-size 21", 3, 20),
        ({"test_size": 16}, "--test-size 16", 1, 15),
        ({"val_size": 21}, "--val-size 21", 1, 20),  # one image of each class must remain for training
    ],
)
def test_an_impossible_size_is_an_error_with_the_possible_range(numbered, sizes, flag, least, largest):
    refused(lambda: numbered(**sizes), f"{flag}: expected {least} to {largest}.")


@pytest.mark.parametrize(("name", "sizes"), [("train", range(3, 24)), ("test", range(1, 16)), ("val", range(1, 21))])
def test_subsets_of_every_size_are_balanced_and_in_order(numbered, name, sizes):
    whole = numbered().test if name == "test" else numbered().train
    for size in sizes:
        loaded = numbered(**{f"{name}_size": size})
        part = getattr(loaded, name)
        assert np.bincount(loaded.train.labels, minlength=3).min() > 0
        assert len(part) == size
        assert np.ptp(np.bincount(part.labels, minlength=3)) <= 1
        rows = np.isin(numbers(whole), numbers(part))
        assert numbers(part) == np.array(numbers(whole))[rows].tolist()
        assert np.array_equal(part.labels, whole.labels[rows])


def test_the_folder_of_the_cache_is_no_data_set(load, tmp_path):
    (tmp_path / "a").mkdir()
    refused(lambda: load(tmp_path), str(tmp_path), "data/, the folder of decoded images", "from another folder")
