"""dataset.py: every source gives what was put into it, whatever is wrong is named, and nothing is trusted."""

import errno
import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import warnings
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import dataset
from errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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


def write_folder(folder, files: dict[str, bytes | None]):
    """Files by path; None makes an empty folder."""
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def write_tar(path, files: dict[str, bytes | tarfile.TarInfo | None], mode: str = "w"):
    """Files by member name; None makes a folder, a TarInfo goes in as it is."""
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pictures(per_class: int = 3, size: int = 8) -> dict[str, bytes]:
    """A small data set of cats and dogs: every image another one."""
    names = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in ("cat", "dog") for i in range(per_class)]
    return {name: random_png(seed, size) for seed, name in enumerate(names)}


@pytest.fixture
def load(tmp_path):
    """`load` with 8×8 images and a data_dir of its own."""

    def load(source, **options):
        return dataset.load(str(source), **{"image_size": 8, "data_dir": tmp_path / "data", **options})

    return load


def refused(call, *words: str) -> str:
    """Call it, expect a UserError whose message has all of these words, and return the message."""
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- the official archive


def official(per_batch: int = 20, protocol: int = 2) -> dict[str, bytes]:
    """The files of CIFAR-10, with fewer images in them."""
    rng = np.random.default_rng(0)
    files = {}
    for name in dataset.BATCH_FILES[:-1]:
        labels = (np.arange(per_batch) % 10).tolist()
        data = rng.integers(0, 256, (per_batch, 3072), np.uint8)
        files[name] = pickle.dumps({"data": data, "labels": labels, "batch_label": name}, protocol)
    files["batches.meta"] = pickle.dumps({"label_names": list(CLASSES), "num_vis": 3072}, protocol)
    return files


def in_folder(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"cifar-10-batches-py/{name}": content for name, content in files.items()}


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2 and its numpy wrote: keys, dtype and array contents are all byte strings."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|") + b"NNN" + integers([-1, -1])[1:]
    state = b"(K\x01" + integers(data.shape) + b"t" + dtype + b"K\x00tb\x89" + string(data.tobytes()) + b"tb"
    return b"\x80\x02}(" + string(b"data") + array + state + string(b"labels") + b"]" + integers(labels) + b"eu."


def expected_official(files: dict[str, bytes], names) -> tuple[np.ndarray, list[int]]:
    batches = [pickle.loads(files[name], encoding="latin1") for name in names]
    images = np.concatenate([batch["data"].reshape(-1, 3, 32, 32) for batch in batches])
    return images, [label for batch in batches for label in batch["labels"]]


@pytest.mark.parametrize("shape", ["archive", "folder", "parent of the folder", "archive without a folder"])
def test_official_files_give_what_was_written(load, tmp_path, shape):
    files = official()
    if shape.startswith("archive"):
        named = in_folder(files) if shape == "archive" else files
        # The published archive has them in no order, with a page of html among them.
        members = dict(sorted({**named, "cifar-10-batches-py/readme.html": b"<html>"}.items(), reverse=True))
        source = write_tar(tmp_path / "cifar.tar.gz", members, "w:gz")
    else:
        source = write_folder(tmp_path / "unpacked", in_folder(files))
        source = source / "cifar-10-batches-py" if shape == "folder" else source
    loaded = load(source, image_size=32)
    assert loaded.classes == CLASSES
    assert loaded.val is None
    assert loaded.source == str(source)
    for split, names in ((loaded.train, dataset.TRAIN_BATCHES), (loaded.test, ["test_batch"])):
        images, labels = expected_official(files, names)
        assert np.array_equal(split.images, images)
        assert split.labels.tolist() == labels
        assert (split.images.dtype, split.labels.dtype, len(split)) == (np.uint8, np.int64, len(labels))
        assert split.images.flags.c_contiguous


def test_official_archive_and_folder_have_one_digest(load, tmp_path):
    archive = write_tar(tmp_path / "cifar.tar.gz", in_folder(official()), "w:gz")
    folder = write_folder(tmp_path / "batches", official())
    assert same(load(archive, image_size=32), load(folder, image_size=32))


def test_official_files_as_python_2_pickled_them(load, tmp_path):
    files = official()
    for name in dataset.BATCH_FILES[:-1]:
        data, labels = expected_official(files, [name])
        files[name] = python2_pickle(data.reshape(-1, 3072), labels)
    files["batches.meta"] = b"\x80\x02}U\x0blabel_names](" + b"".join(b"U\x01%d" % i for i in range(10)) + b"es."
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns when something asks for numpy.core
        loaded = load(write_folder(tmp_path / "batches", files), image_size=32)
    images, labels = expected_official(official(), dataset.TRAIN_BATCHES)
    assert loaded.classes == tuple("0123456789")
    assert np.array_equal(loaded.train.images, images)
    assert loaded.train.labels.tolist() == labels


def test_official_files_of_newer_numpy_and_pickle(load, tmp_path):
    loaded = load(write_folder(tmp_path / "batches", official(protocol=3)), image_size=32)
    assert np.array_equal(loaded.train.images, expected_official(official(), dataset.TRAIN_BATCHES)[0])


def test_official_images_are_resized(load, tmp_path):
    files = official()
    loaded = load(write_folder(tmp_path / "batches", files), image_size=16)
    image = Image.fromarray(expected_official(files, ["test_batch"])[0][7].transpose(1, 2, 0))
    wanted = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(loaded.test.images[7], wanted)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(load, tmp_path):
    target = tmp_path / "ran"
    files = official() | {"data_batch_3": pickle.dumps(RunsCode(target), 2)}
    archive = write_tar(tmp_path / "evil.tar.gz", in_folder(files), "w:gz")
    refused(lambda: load(archive), "evil.tar.gz", "data_batch_3", "mkdir")
    assert not target.exists()
    pickle.loads(files["data_batch_3"])  # the pickle does work where nobody looks
    assert target.exists()


def batch(**changes) -> bytes:
    return pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3], **changes}, 2)


def nested(depth: int) -> list:
    """Written out it would have 2**depth parts."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


def doubled(times: int) -> bytes:
    """A pickle that encodes a text as hex digits so many times over."""
    call = b"c_codecs\nencode\n"
    return call * times + b"C\x01a" + b"X\x03\x00\x00\x00hex\x86R" * times + b"."


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data_batch_2", batch(data=np.zeros((4, 3000), np.uint8)), ["data_batch_2", "(4, 3000)", "(N, 3072)"]),
        ("data_batch_2", batch(data=np.zeros((4, 3072), np.float32)), ["data_batch_2", "float32", "uint8"]),
        ("data_batch_2", batch(data=[1, 2]), ["data_batch_2", "list", "uint8"]),
        ("data_batch_2", batch(labels=[0, 1, 2]), ["data_batch_2", "labels are 3", "4"]),
        ("data_batch_2", batch(labels=[0, 1, 2, 10]), ["data_batch_2", "label 10", "0 to 9"]),
        ("data_batch_2", batch(labels=[0, 1, 2, -1]), ["data_batch_2", "label -1"]),
        ("data_batch_2", batch(labels=None), ["data_batch_2", "labels"]),
        ("data_batch_2", pickle.dumps([1, 2], 2), ["data_batch_2"]),
        ("data_batch_2", b"no pickle at all", ["data_batch_2"]),
        ("data_batch_2", batch()[:2000], ["data_batch_2"]),
        ("test_batch", b"", ["test_batch"]),
        ("batches.meta", pickle.dumps({"label_names": 10}, 2), ["batches.meta", "label_names"]),
        ("batches.meta", pickle.dumps({}, 2), ["batches.meta", "label_names"]),
        ("batches.meta", pickle.dumps({"label_names": ["a\0"]}, 2), ["'a\\x00'", "NUL"]),
        ("batches.meta", pickle.dumps({"label_names": ["\ud800"]}, 2), ["'\\ud800'", "UTF-8"]),
        ("batches.meta", pickle.dumps({"label_names": nested(50)}, 2), ["batches.meta", "label_names", "..."]),
        ("data_batch_2", batch(labels=[0, 1, 2, nested(50)]), ["data_batch_2", "..."]),
        ("data_batch_2", batch(labels=[0, 1, 2, 10**5000]), ["data_batch_2", "very long int"]),
        ("data_batch_2", batch(labels=np.array([0, 1, 2, np.nan])), ["data_batch_2", "label 0.0"]),
        ("data_batch_2", batch(labels=np.zeros((4, 4), np.int64)), ["data_batch_2", "[0, 0, 0, 0]"]),
        ("data_batch_2", b"\x80\x02Nr\xff\xff\xff\x7f.", ["data_batch_2", "2147483647"]),  # 34 GB of memo
        ("data_batch_2", b"Np2147483647\n.", ["data_batch_2", "2147483647"]),
        ("data_batch_2", b"\x80\x02cnumpy\nndarray\nJ\x00\x00\x00\x40\x85R.", ["data_batch_2"]),  # np.ndarray(1 << 30)
        ("data_batch_2", doubled(60), ["data_batch_2"]),
    ],
)
def test_a_batch_that_is_not_as_published_is_named(load, tmp_path, name, content, words):
    folder = write_folder(tmp_path / "batches", official() | {name: content})
    refused(lambda: load(folder), str(folder), *words)


def test_missing_batches_are_named(load, tmp_path):
    files = {name: content for name, content in official().items() if name not in ("data_batch_4", "batches.meta")}
    refused(lambda: load(write_folder(tmp_path / "batches", files)), "lacks data_batch_4, batches.meta")


# ------------------------------------------------------------------------------------------------------------- download


class Host:
    """A web server on this machine that serves an archive, and notes what it is asked for and from which byte on.

    Pages that give the right archive: right and also continue it, whole, unranged and elsewhere cannot, liar continues
    it wrongly, steady takes its time. No other page ever gives the right one.
    """

    def __init__(self, archive: bytes):
        self.asked: list[str] = []
        self.begun: list[int] = []
        self.released = threading.Event()
        host, length = self, len(archive)
        other = archive[: length // 2] + bytes(length - length // 2)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                page, begun = self.path.strip("/"), int((self.headers["Range"] or "=0-").split("=")[1].strip("-"))
                host.asked.append(page)
                host.begun.append(begun)
                if page in ("right", "also", "short", "stalls", "trickles"):
                    status = 206 if begun else 200
                    size = {"short": length - 1000, "stalls": length // 2, "trickles": begun}.get(page, length)
                    self.answer(status, archive[begun:size], begun, length - begun)
                    if page == "stalls":
                        host.released.wait(10)
                    while page == "trickles" and not host.released.wait(0.02):
                        begun += 1
                        self.wfile.write(archive[begun - 1 : begun])
                elif page == "steady":
                    self.answer(200, b"", 0, length)
                    for at in range(0, length, length // 9):
                        self.wfile.write(archive[at : at + length // 9])
                        host.released.wait(0.1)
                elif page == "silent":
                    host.released.wait(10)
                elif page == "slow-header":
                    while not host.released.wait(0.02):
                        self.wfile.write(b"H")
                elif page == "no-http":
                    self.wfile.write(b"220 smtp.example.org\r\n")
                elif page in ("loop", "refuses", "missing", "broken", "unranged") and not (
                    page == "unranged" and not begun
                ):
                    status = {"loop": 302, "refuses": 416, "unranged": 416, "missing": 404, "broken": 500}[page]
                    self.send_response(status)
                    self.send_header("Location", self.path)
                    self.end_headers()
                elif page == "elsewhere" and begun:
                    self.answer(206, archive[begun + 1 :], begun + 1, length - begun - 1)
                elif page == "liar" and begun:
                    self.answer(206, bytes(length - begun), begun, length - begun)
                elif page in ("another", "another-in-part", "no-length", "odd-length", "minus"):
                    ranged = page == "another-in-part" and begun
                    shown = {"no-length": None, "odd-length": "many", "minus": -5}.get(page, 10)
                    self.answer(206 if ranged else 200, b"no archive", begun, shown, total=begun + 10)
                elif page in ("too-long", "wrong"):
                    self.answer(
                        200, archive + b"more" if page == "too-long" else other, 0, length + 4 * (page != "wrong")
                    )
                elif page != "hangs-up":
                    self.answer(200, archive, 0, length)

            def answer(self, status, body, begun, shown_length, total=length):
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {begun}-{total - 1}/{total}")
                if shown_length is not None:
                    self.send_header("Content-Length", str(shown_length))
                self.end_headers()
                self.wfile.write(body)

            def handle(self):
                with suppress(ConnectionError):  # whoever asked has gone
                    super().handle()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def url(self, page: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{page}"

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


# What a host can do wrong, and the words for it.
BAD_HOSTS = {
    "missing": "404", "broken": "500", "refuses": "416", "loop": "infinite loop", "another": "a file of 10 bytes",
    "another-in-part": "bytes, expected", "no-length": "no gzip", "odd-length": "many",
    "minus": "serves a file of -5 bytes", "too-long": "serves a file of", "wrong": "md5", "short": "broke off",
    "silent": "timed out", "slow-header": "timed out", "stalls": "timed out", "trickles": "too slow",
    "hangs-up": "closed connection", "no-http": "220 smtp",
}  # fmt: skip


@pytest.fixture
def archive(tmp_path):
    return write_tar(tmp_path / "official.tar.gz", in_folder(official()), "w:gz").read_bytes()


@pytest.fixture
def host(archive, monkeypatch):
    monkeypatch.setattr(dataset, "ARCHIVE_MD5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(dataset, "ARCHIVE_BYTES", len(archive))
    monkeypatch.setattr(dataset, "TIMEOUT", 0.3)
    monkeypatch.setattr(dataset, "PACE_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    host = Host(archive)
    yield host
    host.close()


@pytest.fixture
def partial(tmp_path):
    """Where an unfinished download lies, in a data_dir of its own."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / f".{dataset.ARCHIVE}.part"


def use_mirrors(monkeypatch, host, *pages: str) -> list[str]:
    urls = [host.url(page) for page in pages]
    monkeypatch.setattr(dataset, "MIRRORS", tuple(urls))
    return urls


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_real_mirrors_end_with_the_official_host():
    assert len(dataset.MIRRORS) == 4
    assert dataset.MIRRORS[-1] == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert dataset.ARCHIVE_MD5 == "c58f30108f718f92721af3b95e74349a"
    assert dataset.ARCHIVE_BYTES == 170_498_071
    assert dataset.SLOWEST <= 60_000 / 2  # at 60 kB/s it must still do


def test_hosts_that_fail_are_passed_over_with_a_line_each(host, monkeypatch, tmp_path, capsys):
    pages = ["missing", "wrong", "short", "silent", "right", "also"]
    urls = use_mirrors(monkeypatch, host, *pages)
    loaded = dataset.load(data_dir=tmp_path / "new" / "data")
    assert np.array_equal(loaded.train.images, expected_official(official(), dataset.TRAIN_BATCHES)[0])
    assert loaded.source == "cifar10"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # and no progress bar, for this is no terminal
    for line, url, word in zip(lines, urls, ["404", "md5", "broke off", "timed out"], strict=False):
        assert url in line
        assert word in line
    assert host.asked == pages[:-1]
    assert names_in(tmp_path / "new" / "data") == ["cache", dataset.ARCHIVE]

    dataset.load(data_dir=tmp_path / "new" / "data")
    assert len(host.asked) == 5  # the archive is there now


def test_when_all_hosts_fail_the_error_lists_them_and_what_to_type(host, monkeypatch, tmp_path):
    urls = use_mirrors(monkeypatch, host, "missing", "wrong", "another")
    urls.append("http://127.0.0.1:1/nobody")
    monkeypatch.setattr(dataset, "MIRRORS", tuple(urls))
    message = refused(lambda: dataset.load(data_dir=tmp_path / "my data"), "404", "md5", "10 bytes", "refused")
    for url in urls:
        assert f"  {url}: " in message
    command = message.splitlines()[-1]
    assert re.fullmatch(rf"  curl .*'{tmp_path}/my data/{dataset.ARCHIVE}' {urls[0]}", command)
    assert "continues" not in message
    assert names_in(tmp_path / "my data") == []


@pytest.mark.parametrize("begun", [0, 1000], ids=["from nothing", "continued"])
@pytest.mark.parametrize("page", BAD_HOSTS)
def test_after_a_bad_host_the_next_start_or_the_next_host_gives_the_right_archive(
    host, monkeypatch, partial, archive, page, begun
):
    partial.write_bytes(archive[:begun])
    (url,) = use_mirrors(monkeypatch, host, page)
    message = refused(lambda: dataset.download_cifar10(partial.parent), f"  {url}: ", BAD_HOSTS[page])
    kept = partial.read_bytes() if partial.exists() else b""
    assert names_in(partial.parent) == ([partial.name] if kept else [])
    assert (f"keeps the {len(kept)} of" in message) == bool(kept)
    if page == "wrong":  # it cannot be told what is right of that
        assert not kept
    else:
        size = {"short": len(archive) - 1000, "stalls": len(archive) // 2}.get(page, begun)
        assert len(kept) > begun if page == "trickles" else len(kept) == size
        assert archive.startswith(kept)

    del host.asked[:], host.begun[:]
    use_mirrors(monkeypatch, host, page, "right")
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    assert names_in(partial.parent) == [dataset.ARCHIVE]
    assert host.asked[-1] == "right"
    if page in ("short", "stalls"):
        assert host.begun[-1] == len(kept)  # of which the bad host had nothing to add


@pytest.mark.parametrize(
    ("page", "begun"),
    [
        ("right", [1000]),
        ("whole", [1000]),  # the answer to the first request is read from its start
        ("unranged", [1000, 0]),
        ("elsewhere", [1000, 0]),
        ("liar", [1000, 0]),
    ],
)
def test_a_partial_file_is_continued_where_the_host_can(host, monkeypatch, partial, archive, page, begun):
    use_mirrors(monkeypatch, host, page)
    partial.write_bytes(archive[:1000])
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    assert host.begun == begun
    assert names_in(partial.parent) == [dataset.ARCHIVE]


@pytest.mark.parametrize("change", ["wrong bytes", "as long but wrong", "too long"])
def test_a_partial_file_that_is_wrong_is_fetched_once_more_from_the_same_host(
    host, monkeypatch, partial, archive, change
):
    use_mirrors(monkeypatch, host, "right", "also")
    length = {"wrong bytes": 1000, "as long but wrong": len(archive), "too long": len(archive) + 1}[change]
    partial.write_bytes(bytes(length))
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    assert host.asked == (["right"] * 2 if change == "wrong bytes" else ["right"])
    assert host.begun[-1] == 0


def test_a_complete_partial_file_needs_no_host(host, monkeypatch, partial, archive):
    use_mirrors(monkeypatch, host, "right")
    partial.write_bytes(archive)
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    assert host.asked == []


def test_a_host_that_is_slow_but_not_too_slow_will_do(host, monkeypatch, partial, archive):
    use_mirrors(monkeypatch, host, "steady")
    monkeypatch.setattr(dataset, "SLOWEST", len(archive) / 4)
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    monkeypatch.setattr(dataset, "SLOWEST", len(archive) * 4)
    (partial.parent / dataset.ARCHIVE).unlink()
    refused(lambda: dataset.download_cifar10(partial.parent), "too slow")
    assert host.asked == ["steady"] * 2


def test_data_url_is_asked_first(host, monkeypatch, tmp_path):
    use_mirrors(monkeypatch, host, "right")
    dataset.load(data_dir=tmp_path / "a", data_url=host.url("also"))
    assert host.asked == ["also"]
    dataset.load(data_dir=tmp_path / "b", data_url=host.url("missing"))
    assert host.asked == ["also", "missing", "right"]
    dataset.load(data_dir=tmp_path / "c", data_url="no address")
    assert host.asked == ["also", "missing", "right", "right"]
    dataset.load(data_dir=tmp_path / "d", data_url=(tmp_path / "official.tar.gz").as_uri())
    assert len(host.asked) == 4


@pytest.mark.parametrize(
    "data_url",
    [
        "no address", "http://", "http://[", "http://[::1", "http://127.0.0.1:port/", "http://127.0.0.1:99999/",
        "ftp://", "file:///nowhere", "file:///", "data:,no archive", "data:,", "gopher://host/", "//host", ":",
        "http://a b/", "Käfer", "http://127.0.0.1:1/Käfer", "http://.../", "http://\udc80/", "https://127.0.0.1:1/",
        "http://127.0.0.1\r\nX: y/",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_passed_over(host, monkeypatch, tmp_path, archive, data_url):
    use_mirrors(monkeypatch, host, "right")
    assert dataset.download_cifar10(tmp_path / "data", data_url).read_bytes() == archive


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_download_is_continued(host, monkeypatch, partial, archive, capsys, end):
    def interrupted(url, begun):
        yield archive[begun : begun + 1000]
        raise end

    use_mirrors(monkeypatch, host, "right")
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "_blocks_from", interrupted)
        for size in (1000, 2000):
            with pytest.raises(end):
                dataset.load(data_dir=partial.parent)
            assert names_in(partial.parent) == [partial.name]
            line = f"{partial} keeps the {size} of {len(archive)} bytes that came: the next start continues it\n"
            assert capsys.readouterr().err == line
    dataset.load(data_dir=partial.parent)
    assert host.begun == [2000]


DOWNLOAD = """
import sys, dataset
url, dataset.ARCHIVE_MD5, size, folder = sys.argv[1:]
dataset.MIRRORS, dataset.ARCHIVE_BYTES = (url,), int(size)
print(dataset.download_cifar10(dataset.Path(folder)))
"""


@pytest.fixture
def start_download(host, partial, archive):
    """Start a process that downloads from a page of `host`; the end kills it."""
    started = []

    def start(page: str) -> subprocess.Popen:
        arguments = [host.url(page), hashlib.md5(archive).hexdigest(), str(len(archive)), str(partial.parent)]
        process = subprocess.Popen(
            [sys.executable, "-c", DOWNLOAD, *arguments],
            cwd=Path(dataset.__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_of_processes_that_start_at_once_one_downloads(host, start_download, partial, archive):
    processes = [start_download("steady") for _ in range(3)]
    outcomes = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert host.asked == ["steady"]
    for out, err, status in outcomes:
        assert (out.strip(), status) == (str(partial.parent / dataset.ARCHIVE), 0), err
    waiting = "another process is busy with the download of CIFAR-10: waiting for it to end\n"
    assert sorted(err for _, err, _ in outcomes) == ["", waiting, waiting]
    assert (partial.parent / dataset.ARCHIVE).read_bytes() == archive
    assert names_in(partial.parent) == [dataset.ARCHIVE]


def test_what_a_killed_process_began_is_continued_by_the_one_that_waits_for_it(
    host, monkeypatch, start_download, partial, archive
):
    killed = start_download("stalls")
    wait_until(lambda: dataset._size_of(partial) == len(archive) // 2)
    waiting = start_download("right")
    assert "waiting" in waiting.stderr.readline()
    killed.kill()
    assert waiting.wait(60) == 0
    assert host.begun == [0, len(archive) // 2]
    assert (partial.parent / dataset.ARCHIVE).read_bytes() == archive
    assert names_in(partial.parent) == [dataset.ARCHIVE]


def test_a_lock_file_of_a_dead_process_does_not_block(host, monkeypatch, partial, archive):
    use_mirrors(monkeypatch, host, "right")
    (partial.parent / f".{dataset.ARCHIVE}.lock").touch()
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    assert names_in(partial.parent) == [dataset.ARCHIVE]


def test_where_nothing_can_be_locked_the_download_works_alone(host, monkeypatch, partial, archive):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    use_mirrors(monkeypatch, host, "right")
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive
    (partial.parent / dataset.ARCHIVE).unlink()
    monkeypatch.setattr("files.fcntl", None)
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive


def test_a_data_dir_that_cannot_be_written_is_named_and_no_host_blamed(host, monkeypatch, tmp_path):
    use_mirrors(monkeypatch, host, "right", "also")
    (tmp_path / "file").write_text("in the way")
    refused(lambda: dataset.load(data_dir=tmp_path / "file"), str(tmp_path / "file"), "could not be written")
    assert host.asked == []


def test_a_full_disk_is_named_and_what_fitted_is_continued(host, monkeypatch, partial, archive):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    use_mirrors(monkeypatch, host, "right", "also")
    partial.write_bytes(archive[:1000])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        words = [str(partial.parent / dataset.ARCHIVE), "could not be written", "No space left on device"]
        refused(lambda: dataset.download_cifar10(partial.parent), *words)
    assert host.asked == ["right"]
    assert archive.startswith(partial.read_bytes())
    assert dataset.download_cifar10(partial.parent).read_bytes() == archive


def test_a_wrong_archive_in_data_dir_is_refused_and_kept(host, monkeypatch, tmp_path):
    use_mirrors(monkeypatch, host, "right")
    archive = tmp_path / dataset.ARCHIVE
    archive.write_bytes(b"half an archive")
    refused(lambda: dataset.load(data_dir=tmp_path), str(archive), "md5", "delete")
    assert archive.read_bytes() == b"half an archive"
    assert host.asked == []


def test_an_unpacked_folder_in_data_dir_is_used(host, monkeypatch, tmp_path):
    use_mirrors(monkeypatch, host, "right")
    write_folder(tmp_path / "data", in_folder(official()))
    loaded = dataset.load(data_dir=tmp_path / "data")
    assert np.array_equal(loaded.train.images, expected_official(official(), dataset.TRAIN_BATCHES)[0])
    assert host.asked == []


# ---------------------------------------------------------------------------------------------------- folders of images


def test_images_come_out_by_class_then_name(load, tmp_path):
    files = pictures()
    loaded = load(write_folder(tmp_path / "pets", files))
    assert loaded.classes == ("cat", "dog")
    for split, name in ((loaded.train, "train"), (loaded.test, "test")):
        wanted = [np.asarray(Image.open(io.BytesIO(files[key]))) for key in sorted(files) if key.startswith(name)]
        assert np.array_equal(split.images, np.stack(wanted).transpose(0, 3, 1, 2))
        assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert split.images.flags.c_contiguous
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("prefix", ["", "./", "pets/", "./pets/"])
def test_a_tar_gives_what_the_folder_gives(load, tmp_path, mode, prefix):
    files = pictures()
    folder = load(write_folder(tmp_path / "folder", files))
    shuffled = [list(files)[i] for i in np.random.default_rng(1).permutation(len(files))]
    # fast.ai's cifar10.tgz has such a list of labels beside train and test
    members = {f"{prefix}labels.txt": b"cat\ndog\n", **{prefix + name: files[name] for name in shuffled}}
    assert same(folder, load(write_tar(tmp_path / "archive.tar", members, mode)))


def test_one_folder_further_down_is_found_and_its_neighbours_ignored(load, tmp_path):
    files = pictures()
    below = {f"pets/{name}": content for name, content in files.items()}
    stray = {"labels.txt": b"cat", "pets/notes/more/x.txt": b"?", "docs/readme": b"?"}
    plain = load(write_folder(tmp_path / "plain", files))
    assert same(plain, load(write_folder(tmp_path / "nested", below | stray)))
    assert same(plain, load(write_tar(tmp_path / "nested.tar", below | stray)))
    # at the top, train/ and test/ win over those of a folder beside them
    both = files | {"docs/train/cat/x.txt": b"?"}
    assert same(plain, load(write_folder(tmp_path / "both", both)))
    assert same(plain, load(write_tar(tmp_path / "both.tar", both)))


def test_hidden_files_and_windows_litter_are_skipped(load, tmp_path):
    files = pictures()
    litter = ["train/cat/.DS_Store", "train/cat/._0.png", "test/dog/Thumbs.db", "train/dog/desktop.ini", "train/.x/y"]
    littered = files | dict.fromkeys(litter, b"no image")
    plain = load(write_folder(tmp_path / "plain", files))
    assert same(plain, load(write_folder(tmp_path / "littered", littered)))
    assert same(plain, load(write_tar(tmp_path / "littered.tar", littered)))


def test_class_names_may_be_in_any_script_and_in_any_number(load, tmp_path):
    names = ["Käfer", "кошка", "犬 🐕", "train", "00"]
    files = {f"{split}/{name}/a.png": random_png(1) for split in ("train", "test") for name in names}
    for source in (write_folder(tmp_path / "pets", files), write_tar(tmp_path / "pets.tar.gz", files, "w:gz")):
        for _ in ("decoded", "cached"):
            loaded = load(source)
            assert loaded.classes == tuple(sorted(names))
            assert loaded.train.labels.tolist() == [0, 1, 2, 3, 4]


def test_many_images_are_decoded_by_processes_to_the_same_arrays(load, tmp_path, monkeypatch):
    files = {f"{split}/{c}/{i}.png": random_png(i, 4) for split in ("train", "test") for c in "ab" for i in range(60)}
    folder, archive = (
        write_folder(tmp_path / "folder", files),
        write_tar(tmp_path / "a.tar", dict(reversed(files.items()))),
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(dataset, "CHUNK_IMAGES", 7)
    alone = load(folder)
    monkeypatch.setattr(dataset, "FEW_IMAGES", 10)
    processes = {os.getpid()}
    monkeypatch.setattr(dataset, "_decode_chunk", _decode_chunk_and_tell_who)
    monkeypatch.setitem(os.environ, "TEST_DATASET_PIDS", str(tmp_path / "pids"))
    for source in (folder, archive):
        shutil.rmtree(tmp_path / "data")
        assert same(alone, load(source))
        processes |= set(map(int, (tmp_path / "pids").read_text().split()))
    assert len(processes) > 1
    write_folder(folder, {"test/b/7.png": b"no image"})
    refused(lambda: load(folder), "test/b/7.png", "no image")


_decode_chunk = dataset._decode_chunk


def _decode_chunk_and_tell_who(chunk, image_size):
    with open(os.environ["TEST_DATASET_PIDS"], "a") as file:
        file.write(f"{os.getpid()}\n")
    return _decode_chunk(chunk, image_size)


def test_a_chunk_is_bounded_in_images_and_in_bytes(monkeypatch):
    files = [("name", bytes(1000))] * 10
    monkeypatch.setattr(dataset, "CHUNK_IMAGES", 4)
    assert [len(chunk) for chunk in dataset._chunks(files, 1)] == [4, 4, 2]
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 3000)
    assert [len(chunk) for chunk in dataset._chunks(files, 1)] == [3, 3, 3, 1]


# --------------------------------------------------------------------------------------------------------- one image


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(dataset.decode("x", encode(pixels), 8), pixels.transpose(2, 0, 1))


def test_other_sizes_keep_their_aspect_and_lose_their_edges():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:40, 1] = pixels[:, 40:, 2] = 255  # three squares, red, green and blue
    for turned in (pixels, pixels.transpose(1, 0, 2)):
        decoded = dataset.decode("x", encode(turned), 10)
        assert decoded.shape == (3, 10, 10)
        assert (decoded[:, 1:-1, 1:-1] == [[[0]], [[255]], [[0]]]).all()  # at its rim neighbours shine through
    smooth = np.random.default_rng(0).integers(0, 256, (30, 23, 3), np.uint8)
    wanted = ImageOps.fit(Image.fromarray(smooth), (8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(dataset.decode("x", encode(smooth), 8), np.asarray(wanted).transpose(2, 0, 1))


def test_grey_alpha_palette_and_deep_images_become_rgb():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (8, 8), np.uint8)
    colour = rng.integers(0, 2, (8, 8, 3)).astype(np.uint8) * 255
    alpha = np.concatenate([colour, np.full((8, 8, 1), 128, np.uint8)], axis=2)
    palette = Image.fromarray(colour).quantize(8)
    threefold = np.stack([grey] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(dataset.decode("x", encode(grey), 8), threefold)
        assert np.array_equal(dataset.decode("x", encode(grey.astype(np.uint16) * 256 + 99), 8), threefold)
        assert np.array_equal(dataset.decode("x", encode(np.stack([grey, grey], 2)), 8), threefold)
        assert np.array_equal(dataset.decode("x", encode(alpha), 8), colour.transpose(2, 0, 1))
        for options in ({}, {"transparency": bytes(8)}):
            assert np.array_equal(dataset.decode("x", encode(palette, **options), 8), colour.transpose(2, 0, 1))
        assert dataset.decode("x", encode(Image.new("CMYK", (9, 9)), "JPEG"), 8).shape == (3, 8, 8)


def test_of_an_animation_the_first_image_counts():
    first, second = (np.full((8, 8, 3), grey, np.uint8) for grey in (40, 200))
    more = {"save_all": True, "append_images": [Image.fromarray(second)]}
    for kind, options in (("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        animated = encode(first, kind, **more, **options)
        assert Image.open(io.BytesIO(animated)).n_frames == 2
        assert (dataset.decode("x", animated, 8) == 40).all()


def huge_png(side: int) -> bytes:
    """Its header says so many pixels; there are none."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = part(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


@pytest.mark.parametrize("side", [20_000, 1 << 31 - 1])
def test_a_huge_image_is_refused_before_it_is_decoded(load, tmp_path, side):
    folder = write_folder(tmp_path / "pets", pictures() | {"train/cat/huge.png": huge_png(side)})
    tracemalloc.start()
    refused(lambda: load(folder), "train/cat/huge.png is too large", "exceeds limit")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_postscript_is_refused_and_not_run(monkeypatch):
    def run(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    refused(lambda: dataset.decode("x.eps", content, 8), "x.eps", "PostScript")


def test_images_larger_than_memory_are_refused(load, tmp_path):
    folder = write_folder(tmp_path / "pets", pictures())
    for side in (10**7, 10**12):
        refused(lambda side=side: load(folder, image_size=side), f"--image-size {side}", "12 images", "memory")
        refused(lambda side=side: load("digits", image_size=side), f"--image-size {side}", "1797 images", "memory")
    refused(lambda: load(write_folder(tmp_path / "b", official()), image_size=10**7), "100 images", "memory")


def test_exif_orientation_is_honoured():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90° clockwise to see it right
    wanted = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(dataset.decode("x", encode(pixels, exif=exif), 8), wanted)
    sized, size = dataset.decode_sized("x", encode(np.zeros((20, 30, 3), np.uint8), exif=exif), 8)
    assert (sized.shape, size) == ((3, 8, 8), (20, 30))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_broken_image_is_named(load, tmp_path, kind):
    whole = encode(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), kind)
    archive = write_tar(tmp_path / "a.tar", pictures() | {"train/cat/half": whole[: len(whole) // 2]})
    refused(lambda: load(archive), "a.tar", "train/cat/half", "broken")


@pytest.mark.parametrize("content", [b"", b"just some text"])
def test_a_file_that_is_no_image_is_named(load, tmp_path, content):
    files = pictures() | {"train/dog/notes.txt": content}
    refused(lambda: load(write_folder(tmp_path / "a", files)), "train/dog/notes.txt", "no image")
    refused(lambda: load(write_tar(tmp_path / "a.tar", files)), "a.tar", "train/dog/notes.txt", "no image")


# --------------------------------------------------------------------------------------------- sources that are not so

MISTAKES = {
    "class only in train": ({"train/fox/a.png": random_png(0)}, ["'fox'", "train/", "test/"]),
    "class only in test": ({"test/fox/a.png": random_png(0)}, ["'fox'", "train/", "test/"]),
    "empty class": ({"train/fox": None, "test/fox/a.png": random_png(0)}, ["train/fox", "empty"]),
    "class of hidden files": ({"train/fox": None, "train/fox/.x": b"", "test/fox/a": random_png(0)}, ["train/fox"]),
    "too deep": ({"train/cat/young/a.png": random_png(0)}, ["train/cat/young", "deep", "train/<class>/<image>"]),
    "in no class": ({"test/a.png": random_png(0)}, ["test/a.png", "test/<class>/<image>"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", ["folder", "tar", "tar in a folder"])
def test_a_mistaken_layout_is_named(load, tmp_path, mistake, kind):
    files, words = MISTAKES[mistake]
    files = pictures() | files
    if kind == "folder":
        source = write_folder(tmp_path / "pets", files)
    else:
        prefix = "pets/" if kind == "tar in a folder" else ""
        source = write_tar(tmp_path / "pets.tar", {prefix + name: content for name, content in files.items()})
    refused(lambda: load(source), str(source), *words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(load, tmp_path, split):
    files = {name: content for name, content in pictures().items() if not name.startswith(split)}
    refused(lambda: load(write_folder(tmp_path / "pets", files)), f"no images in {split}/")
    refused(lambda: load(write_tar(tmp_path / "pets.tar", files)), f"no images in {split}/")


@pytest.mark.parametrize("files", [{}, {"cat/a.png": b""}, {"a/b/train/cat/a.png": b""}, {"train": b"a file"}])
def test_a_source_of_neither_layout_is_refused(load, tmp_path, files):
    expected = ["train/<class>/<image>", "data_batch_1"]
    refused(lambda: load(write_folder(tmp_path / "pets", {"": None, **files})), str(tmp_path / "pets"), *expected)
    refused(lambda: load(write_tar(tmp_path / "pets.tar", files)), "pets.tar", *expected)


def test_two_data_sets_in_one_source_are_refused(load, tmp_path):
    pets = {f"{place}/{name}": content for place in ("pets", "toys") for name, content in pictures().items()}
    for files, words in ((pets, ["pets", "toys"]), (pictures() | official(), ["images", "batches"])):
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        refused(lambda files=files: load(write_folder(tmp_path / "source", files)), "more than one", *words)
        refused(lambda files=files: load(write_tar(tmp_path / "a.tar", files)), "more than one", *words)


@pytest.mark.parametrize("name", ["../evil.png", "/tmp/evil.png", "train/cat/../../../evil.png", "extras/../../evil"])
def test_a_member_that_would_land_outside_is_refused(load, tmp_path, name):
    archive = write_tar(tmp_path / "a.tar", pictures() | {name: random_png(0)})
    refused(lambda: load(archive), "a.tar", name, "outside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["train/cat/x.png", "test/fox", "train"])
def test_a_link_or_device_among_the_images_is_refused(load, tmp_path, kind, name):
    archive = write_tar(tmp_path / "a.tar", pictures() | {name: special(name, kind, "/etc/passwd")})
    refused(lambda: load(archive), "a.tar", f" {name} ", "link or device")


@pytest.fixture
def in_time():
    """Whatever waits for ever fails after half a minute."""

    def give_up(*_):
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["train/cat/x.png", "test/fox", "train"])
def test_a_pipe_among_the_images_is_refused(load, tmp_path, in_time, name):
    folder = write_folder(tmp_path / "pets", pictures())
    if name == "train":
        shutil.rmtree(folder / name)
    os.mkfifo(folder / name)
    refused(lambda: load(folder), str(folder), name, "link or device")


def test_a_pipe_for_a_batch_is_refused(load, tmp_path, in_time):
    folder = write_folder(tmp_path / "batches", official())
    (folder / "test_batch").unlink()
    os.mkfifo(folder / "test_batch")
    refused(lambda: load(folder), "test_batch", "no ordinary file")


def test_a_pipe_or_device_as_a_source_is_refused(load, tmp_path, in_time):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        refused(lambda source=source: load(source), f"--data {source}", "no ordinary file")


def test_a_pipe_in_place_of_the_download_is_refused(tmp_path, in_time):
    os.mkfifo(tmp_path / dataset.ARCHIVE)
    refused(lambda: dataset.load(data_dir=tmp_path), str(tmp_path / dataset.ARCHIVE), "no ordinary file", "delete")


@contextmanager
def without_rights(folder: Path):
    """In `folder`, as somebody who may only do what a file's mode lets him: root may do everything."""
    folder.chmod(0o777)
    before = Path.cwd()
    os.chdir(folder)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
    os.chdir(before)


@pytest.mark.parametrize(
    ("source", "locked", "words"),
    [
        ("pets", "pets/train/cat/1.png", ["pets: train/cat/1.png", "cannot be read", "Permission denied"]),
        ("pets", "pets/train/cat", ["--data pets", "cannot be read", "Permission denied", "cat"]),
        ("pets", "pets", ["--data pets", "cannot be read", "Permission denied"]),
        ("pets.tar", "pets.tar", ["--data pets.tar", "cannot be read", "Permission denied"]),
        ("batches", "batches/test_batch", ["batches: test_batch", "Permission denied"]),
        ("cifar10", f"data/{dataset.ARCHIVE}", [dataset.ARCHIVE, "cannot be read", "Permission denied"]),
    ],
)
def test_what_may_not_be_read_is_named(load, tmp_path, source, locked, words):
    write_folder(tmp_path / "pets", pictures())
    write_folder(tmp_path / "batches", official())
    write_tar(tmp_path / "pets.tar", pictures())
    write_folder(tmp_path / "data", {dataset.ARCHIVE: b"", "cache": None})
    (tmp_path / locked).chmod(0)
    with without_rights(tmp_path):
        refused(lambda: load(source, data_dir="data"), *words)
    (tmp_path / locked).chmod(0o700)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("place", ["train/cat/x.png", "readme", "batch"])
def test_an_archive_that_would_fill_the_memory_is_refused(load, tmp_path, monkeypatch, mode, place):
    monkeypatch.setattr(dataset, "LEAST_LIMIT", 4 << 20)
    zeros = bytes(50 << 20)
    files = official(1) | {"data_batch_1": zeros} if place == "batch" else pictures(per_class=1) | {place: zeros}
    archive = write_tar(tmp_path / "bomb.tar", files, mode)
    tracemalloc.start()
    refused(lambda: load(archive), "bomb.tar", "more than", "fill the memory")
    assert tracemalloc.get_traced_memory()[1] < 25 << 20
    tracemalloc.stop()


def test_an_archive_may_unpack_to_as_much_as_images_do(load, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LEAST_LIMIT", 0)
    archive = write_tar(
        tmp_path / "a.tar.xz", pictures() | {"train/cat/even.png": encode(np.zeros((99, 99), np.uint8))}, "w:xz"
    )
    assert len(load(archive).train) == 7


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_that_is_larger_than_any_image_is_refused(load, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(dataset, "LARGEST_MEMBER", 1 << 20)
    archive = write_tar(tmp_path / "a.tar", pictures() | {"train/cat/x.png": bytes((1 << 20) + 1)}, mode)
    refused(lambda: load(archive), "train/cat/x.png", f"{(1 << 20) + 1} bytes", "fill the memory")
    # one that no image is read from does no harm
    archive = write_tar(tmp_path / "a.tar", pictures() | {"weights.bin": bytes((1 << 20) + 1)}, mode)
    assert len(load(archive).train) == 6


def test_a_member_of_holes_alone_is_refused(load, tmp_path):
    hollow = tarfile.TarInfo("train/cat/x.png")
    hollow.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
    archive = write_tar(tmp_path / "a.tar", pictures() | {"train/cat/x.png": hollow})
    assert archive.stat().st_size < 100_000
    refused(lambda: load(archive), "train/cat/x.png", f"{1 << 40} bytes", "fill the memory")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_refused(load, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(dataset, "LARGEST_MEMBER", 1 << 20)
    odd = special("long", kind)
    odd.size = 50 << 20
    header = tarfile.TarInfo.create_gnu_header(odd, odd.get_info(), "utf-8", "strict")
    (tmp_path / "a.tar").write_bytes(gzip.compress(header + bytes(odd.size), 1))
    tracemalloc.start()
    refused(lambda: load(tmp_path / "a.tar"), "a.tar", f"header has {odd.size} bytes", "fill the memory")
    assert tracemalloc.get_traced_memory()[1] < 25 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [-512, -(1 << 40), 1 << 40])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_of_an_impossible_size_is_refused(load, tmp_path, in_time, kind, size, mode, first):
    odd = special("train/cat/x.png", kind)
    odd.size = size
    header = tarfile.TarInfo.create_gnu_header(odd, odd.get_info(), "utf-8", "strict")
    whole = write_tar(tmp_path / "a.tar", pictures()).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    content = header + whole if first else whole[:end] + header + whole[end:]
    (tmp_path / "a.tar").write_bytes(content if mode == "w" else gzip.compress(content))
    refused(lambda: load(tmp_path / "a.tar"), "a.tar")


def test_links_elsewhere_in_an_archive_are_ignored(load, tmp_path):
    link = {"latest": special("latest", tarfile.SYMTYPE, "train")}
    assert len(load(write_tar(tmp_path / "a.tar", link | pictures())).train) == 6


def test_a_link_for_a_batch_is_refused(load, tmp_path):
    files = official() | {"data_batch_1": special("data_batch_1", tarfile.SYMTYPE, "test_batch")}
    refused(lambda: load(write_tar(tmp_path / "a.tar", files)), "data_batch_1", "no ordinary file")


def test_links_in_a_folder_are_followed_and_broken_ones_named(load, tmp_path):
    real = write_folder(tmp_path / "real", pictures())
    linked = write_folder(tmp_path / "linked", {"train": None, "test": None})
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (linked / split / name).symlink_to(real / split / name)
    assert same(load(real), load(linked))
    (real / "train/cat/gone.png").symlink_to(tmp_path / "nowhere")
    refused(lambda: load(real), "train/cat/gone.png", "link")


def test_a_file_that_is_twice_in_an_archive_is_refused(load, tmp_path):
    archive = write_tar(tmp_path / "a.tar", pictures() | {"./train/cat/0.png": random_png(9)})
    refused(lambda: load(archive), "train/cat/0.png", "twice")


def test_a_class_folder_whose_name_is_no_utf_8_is_refused(load, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files = pictures() | {f"{split}/{name}/a.png": random_png(0) for split in ("train", "test")}
    for source in (write_folder(tmp_path / "pets", files), write_tar(tmp_path / "pets.tar", files)):
        refused(lambda source=source: load(source), str(source), r"'caf\udce9'", "UTF-8")
    files = pictures() | {f"train/cat/{name}.png": random_png(0)}
    for source in (write_folder(tmp_path / "cats", files), write_tar(tmp_path / "cats.tar", files)):
        assert len(load(source).train) == 7


def test_windows_litter_is_skipped_as_a_folder_too(load, tmp_path):
    files = pictures() | {f"{split}/Thumbs.db/a.png": random_png(0) for split in ("train", "test")}
    for source in (write_folder(tmp_path / "pets", files), write_tar(tmp_path / "pets.tar", files)):
        assert load(source).classes == ("cat", "dog")


@pytest.mark.parametrize("source", ["", "a\0b", "~nobody-of-that-name/pets", "x" * 5000, "\ud800", "\n"])
def test_a_path_that_cannot_be_is_named(load, source):
    refused(lambda: load(source), "--data ")


def test_a_path_that_is_not_there_is_named(load, tmp_path):
    refused(lambda: load(tmp_path / "nowhere"), "--data", str(tmp_path / "nowhere"), "cifar10, digits")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", bytes(100), b"\x1f\x8b\x08 hardly gzip"])
def test_a_file_that_is_no_tar_is_named(load, tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    refused(lambda: load(tmp_path / "a.tar"), "a.tar", "no tar archive", ".tar.gz")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("left", [0.3, 0.6, 0.9, 0.999])
def test_a_truncated_archive_is_refused(load, tmp_path, mode, left):
    whole = write_tar(tmp_path / "whole.tar", pictures(per_class=50), mode).read_bytes()
    # a plain tar pads its end with zeros, which nothing is lost by losing
    whole = whole.rstrip(b"\0") if mode == "w" else whole
    (tmp_path / "cut.tar").write_bytes(whole[: int(len(whole) * left)])
    refused(lambda: load(tmp_path / "cut.tar"), "cut.tar", "cut short")


def test_a_plain_tar_that_ends_between_two_members_is_refused(load, tmp_path):
    whole = write_tar(tmp_path / "whole.tar", pictures())
    with tarfile.open(whole) as tar:
        end = tar.getmembers()[-2].offset
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:end])
    refused(lambda: load(tmp_path / "cut.tar"), "cut.tar", "cut short")


def test_a_flipped_bit_in_an_archive_is_refused(load, tmp_path):
    damaged = bytearray(write_tar(tmp_path / "a.tar.gz", pictures(), "w:gz").read_bytes())
    damaged[-6] ^= 1  # the checksum at its end
    (tmp_path / "a.tar.gz").write_bytes(damaged)
    refused(lambda: load(tmp_path / "a.tar.gz"), "a.tar.gz", "damaged")


@pytest.mark.parametrize(("option", "flag"), [("image_size", "--image-size"), ("split_seed", "--split-seed")])
def test_impossible_numbers_are_named(option, flag):
    refused(lambda: dataset.load("digits", **{option: -1}), f"{flag} -1")


def test_the_module_leaves_torch_alone():
    code = "import sys, dataset; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(dataset.__file__).parent, check=True)


# ---------------------------------------------------------------------------------------------------------------- cache


def no_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(dataset, "_read_members", fail)
    monkeypatch.setattr(dataset, "decode", fail)


@pytest.fixture(params=["folder", "tar", "official"])
def source(request, tmp_path):
    if request.param == "folder":
        return write_folder(tmp_path / "pets", pictures())
    if request.param == "tar":
        return write_tar(tmp_path / "pets.tar.gz", pictures(), "w:gz")
    return write_tar(tmp_path / "cifar.tar.gz", in_folder(official()), "w:gz")


def test_the_second_start_decodes_nothing(load, monkeypatch, source):
    first, larger = load(source), load(source, image_size=9)
    no_decoding(monkeypatch)
    second = load(source)
    assert same(first, second)
    assert second.train.images.flags.c_contiguous
    assert second.train.labels.dtype == np.int64
    assert same(larger, load(source, image_size=9))
    with pytest.raises(AssertionError, match="decoded again"):
        load(source, image_size=10)


def test_the_cache_leaves_only_its_file(load, tmp_path, source):
    load(source)
    assert [path.suffix for path in (tmp_path / "data" / "cache").iterdir()] == [".npz"]


def test_a_changed_folder_is_read_again(load, tmp_path):
    folder = write_folder(tmp_path / "pets", pictures())
    before = load(folder)
    changed = folder / "train/cat/1.png"
    stat = changed.stat()
    # another image in a file of the same size, its mtime set back as an unpacking program would
    pixels = np.asarray(Image.open(changed))[::-1].copy()
    content = encode(pixels)
    changed.write_bytes(content + bytes(stat.st_size - len(content)))
    assert changed.stat().st_size == stat.st_size
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load(folder)
    assert np.array_equal(after.train.images[1], pixels.transpose(2, 0, 1))
    assert after.digest != before.digest
    (folder / "train/cat/0.png").rename(folder / "train/cat/9.png")
    assert np.array_equal(load(folder).train.images[0], pixels.transpose(2, 0, 1))


def test_a_changed_archive_is_read_again(load, tmp_path):
    archive = write_tar(tmp_path / "a.tar", pictures())
    assert len(load(archive).train) == 6
    write_tar(archive, pictures(per_class=4))
    assert len(load(archive).train) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "other arrays", "pickle"])
def test_a_damaged_cache_is_made_anew(load, tmp_path, monkeypatch, capsys, damage):
    folder = write_folder(tmp_path / "pets", pictures())
    first = load(folder)
    (cached,) = (tmp_path / "data" / "cache").iterdir()
    whole = cached.read_bytes()
    if damage == "flip":
        at = whole.index(first.train.images.tobytes()) + 500
        cached.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "other arrays":
        np.savez(cached, **{**np.load(cached), "train_images": first.train.images[:, :, :4]})
    elif damage == "pickle":
        cached.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    else:
        cached.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no zip file"}[damage])
    capsys.readouterr()
    assert same(first, load(folder))
    assert not (tmp_path / "ran").exists()
    assert str(cached) in capsys.readouterr().err
    no_decoding(monkeypatch)
    assert same(first, load(folder))


def test_a_cache_that_cannot_be_written_is_a_warning(load, tmp_path, capsys):
    (tmp_path / "data").write_text("a file where the folder should be")
    folder = write_folder(tmp_path / "pets", pictures())
    assert len(load(folder).train) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert str(tmp_path / "data" / "cache") in line


def test_a_full_disk_is_a_warning_and_leaves_nothing(load, tmp_path, monkeypatch, capsys):
    def full(file, **_):
        file.write(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(load(write_folder(tmp_path / "pets", pictures())).train) == 6
    assert "No space left" in capsys.readouterr().err
    assert list((tmp_path / "data" / "cache").iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns(load):
    from sklearn.datasets import load_digits

    loaded, original = load("digits"), load_digits()
    assert loaded.classes == tuple("0123456789")
    assert len(loaded.train) + len(loaded.test) == 1797
    assert loaded.train.images.shape[1:] == (3, 8, 8)
    everything = np.concatenate([loaded.train.images, loaded.test.images])
    assert (everything.dtype, everything.min(), everything.max()) == (np.uint8, 0, 255)
    # every original is there once, with its label
    grey = np.round(original.images * 255 / 16).astype(np.uint8)
    labels = np.concatenate([loaded.train.labels, loaded.test.labels])
    ours = sorted((image[0].tobytes(), label) for image, label in zip(everything, labels, strict=True))
    assert ours == sorted((image.tobytes(), label) for image, label in zip(grey, original.target, strict=True))
    assert np.array_equal(everything[:, 0], everything[:, 2])


def test_digits_are_enlarged(load):
    images = load("digits", image_size=32).train.images
    small = Image.fromarray(load("digits").train.images[5, 0])
    assert np.array_equal(images[5, 1], np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR)))
    assert images.flags.c_contiguous


def test_digits_are_split_by_class_and_seed_alone(load):
    one, again, other = load("digits"), load("digits"), load("digits", split_seed=1)
    assert same(one, again)
    assert not np.array_equal(one.test.images, other.test.images)
    assert one.digest == other.digest != load("digits", image_size=9).digest
    for loaded in (one, other):
        train, test = np.bincount(loaded.train.labels), np.bincount(loaded.test.labels)
        assert np.array_equal(test, np.round((train + test) * 0.2))


def test_digits_without_scikit_learn_say_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(lambda: load("digits"), "--data digits", "pip install scikit-learn")


# ------------------------------------------------------------------------------------------------ subsets and hold-outs


@pytest.fixture
def numbered(load, tmp_path):
    """A source whose images are all different and whose classes are not of one size: 12, 9 and 7; in test 5 each."""
    sizes = {"train": (12, 9, 7), "test": (5, 5, 5)}
    names = [
        f"{s}/{'abc'[c]}/{i:02}.png" for s, counts in sizes.items() for c, n in enumerate(counts) for i in range(n)
    ]
    files = {name: encode(np.full((2, 2, 3), seed, np.uint8)) for seed, name in enumerate(names)}
    archive = write_tar(tmp_path / "numbered.tar", files)
    return lambda **options: load(archive, image_size=2, **options)


def numbers(split: dataset.Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("size", [3, 4, 5, 6, 20, 21, 22, 23])
def test_subsets_are_balanced_and_in_order(numbered, size):
    train = numbered(train_size=size).train
    counts = np.bincount(train.labels, minlength=3)
    assert counts.sum() == size == len(set(numbers(train)))
    assert counts.max() - counts.min() <= 1
    assert numbers(train) == sorted(numbers(train))
    whole = numbered().train
    assert all(whole.labels[number] == label for number, label in zip(numbers(train), train.labels, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4, 15])
def test_test_subsets_are_balanced(numbered, size):
    counts = np.bincount(numbered(test_size=size).test.labels, minlength=3)
    assert counts.sum() == size
    assert counts.max() - counts.min() <= 1


def test_a_hold_out_is_balanced_apart_and_the_same_for_every_train_size(numbered):
    one = numbered(val_size=7)
    assert np.ptp(np.bincount(one.val.labels)) == 1
    assert sorted(numbers(one.val) + numbers(one.train)) == numbers(numbered().train)
    assert numbers(one.train) == sorted(numbers(one.train))
    for train_size in (3, 10, 14):
        other = numbered(val_size=7, train_size=train_size)
        assert numbers(other.val) == numbers(one.val)
        assert len(other.train) == train_size
        assert not set(numbers(other.val)) & set(numbers(other.train))
    assert numbered().val is None


def test_choices_follow_from_split_seed_alone(numbered):
    sizes = {"train_size": 9, "test_size": 6, "val_size": 3}
    one, again, other = numbered(**sizes), numbered(**sizes), numbered(**sizes, split_seed=1)
    for split in ("train", "test", "val"):
        assert numbers(getattr(one, split)) == numbers(getattr(again, split))
        assert numbers(getattr(one, split)) != numbers(getattr(other, split))
    assert numbers(numbered(test_size=6).test) == numbers(one.test)
    assert one.digest == other.digest == numbered().digest
    # each choice has a stream of its own: the same size from the same images gives another set
    assert numbers(numbered(val_size=9).val) != numbers(numbered(train_size=9).train)


def test_the_digest_is_that_of_the_whole_source(load, tmp_path, numbered):
    digests = {numbered().digest, numbered(val_size=3).digest, numbered(train_size=3).digest}
    assert len(digests) == 1
    files = pictures()
    renamed = {name.replace("cat", "cow"): content for name, content in files.items()}
    relabelled = {name.replace("cat", "x").replace("dog", "cat").replace("x", "dog"): c for name, c in files.items()}
    # the last cat becomes the first dog, so the images keep their order
    moved = {name.replace("train/cat/2", "train/dog/-"): content for name, content in files.items()}
    repainted = files | {"train/cat/0.png": random_png(99)}
    for number, other in enumerate((files, renamed, relabelled, moved, repainted)):
        digests.add(load(write_tar(tmp_path / f"{number}.tar", other)).digest)
    assert len(digests) == 6
    assert re.fullmatch(r"[0-9a-f]{32,}", digests.pop())


@pytest.mark.parametrize(
    ("sizes", "flag", "least", "largest"),
    [
        ({"train_size": 24}, "--train-size 24", 3, 23),  # seven each and one more of the two larger classes
        ({"train_size": 2}, "--train-size 2", 3, 23),  # a class would have none
        ({"train_size": 0}, "--train-size 0", 3, 23),
        ({"train_size": -5}, "--train-size -5", 3, 23),
        ({"train_size": 21, "val_size": 3}, "--train-size 21", 3, 20),
        ({"test_size": 16}, "--test-size 16", 1, 15),
        ({"test_size": 0}, "--test-size 0", 1, 15),
        ({"val_size": -1}, "--val-size -1", 1, 20),
        ({"val_size": 21}, "--val-size 21", 1, 20),  # one image of the smallest class is left to train on
        ({"val_size": 28}, "--val-size 28", 1, 20),
    ],
)
def test_a_size_that_cannot_be_had_is_named_with_the_largest_that_can(numbered, sizes, flag, least, largest):
    refused(lambda: numbered(**sizes), f"{flag}: expected {least} to {largest}.")


def test_the_largest_sizes_can_be_had(numbered):
    assert len(numbered(train_size=23).train) == 23
    assert len(numbered(test_size=15).test) == 15
    loaded = numbered(val_size=20)
    assert len(loaded.val) == 20
    assert np.bincount(loaded.train.labels, minlength=3).min() == 1
