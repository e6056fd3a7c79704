"""Atomic writes, file locks, and checks of output paths."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: str | Path, what: str, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; it replaces `path` when the block ends without an error.

    A missing folder is created. After an error, `path` is unchanged and the temporary file is deleted. If the process
    is killed, the temporary file stays until the next write to `path`. `shared`: several processes may write `path` at
    once, so each has its own temporary file, which nothing deletes after a kill.

    Raises UserError, which names `what` and `path`, if the file system fails or `path` is a folder or device.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    with _explain_failure(path, what):
        if path.exists() and not path.is_file():  # e.g. /dev/null, which root could replace
            raise OSError("it is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _explain_failure(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # comes from stdout, since `path` is not a pipe
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: {what} could not be written ({reason}); free space, or use another path") from None


@contextmanager
def locked(path: str | Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Lock `path`: only one process at a time enters the block. The others print a line on stderr and wait.

    Without `wait` they raise UserError instead. The lock is a file next to `path`. The operating system releases it
    when the process dies. Some network file systems have no locks; there, nothing is locked.

    Raises UserError, which names `what` and `path`, if the lock file cannot be created.
    """
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with _explain_failure(path, what), suppress(NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise UserError(
                    f"{path}: another process is writing {what} there; wait for it to end, or use another path"
                ) from None
            print(f"waiting for another process to finish {what}", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot delete an open file
            os.unlink(lock.lock_file)  # a waiting process detects this and locks a new file
        lock.release()


def check_writable(folder: str | Path, what: str) -> None:
    """Create `folder` if it is missing. Raises UserError if no file can be written there."""
    with _explain_failure(Path(folder), what):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # leaves no file behind, even if the process is killed
            pass


def check_output(path: str | Path, extensions: tuple[str, ...]) -> None:
    """Raise UserError if `path` exists with another extension: a mistaken flag would replace, e.g., an image."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() not in extensions:
        raise UserError(f"{path} exists and is no {' or '.join(extensions)} file; it is not replaced, use another name")
