"""Files that are written atomically, locks, and a check that a folder is writable."""

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

    A missing folder is created. After an error, `path` is unchanged and the temporary file is deleted; after a
    kill, the next write to the same path overwrites and deletes it. `shared`: several processes may write the
    same file at once, so each has its own temporary file.

    Raises UserError, which names `what` and `path`, if the file system fails or `path` is a folder or device.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    with _explain_failure(path, what):
        if path.exists() and not path.is_file():  # root could replace /dev/null
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
    except BrokenPipeError:  # from another file: this one is not a pipe
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: {what} could not be written ({reason}); free space or use another path") from None


@contextmanager
def locked(path: str | Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Let one process at a time enter the block; the others wait, after a line on stderr that names `what`.

    Without `wait` they raise a UserError. The lock is a file next to `path`. The operating system releases it when its
    process dies. If the file system has no locks (some network file systems), nothing is locked.

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
            print(f"another process is busy with {what}: waiting for it to end", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not delete an open file
            os.unlink(lock.lock_file)  # a waiting process notices this and locks a new file
        lock.release()


def check_writable(folder: str | Path, what: str) -> None:
    """Create `folder` if it is missing. Raises UserError if no file can be written there."""
    with _explain_failure(Path(folder), what):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # leaves no file behind, not even after a kill
            pass


def check_output(path: str | Path, endings: tuple[str, ...]) -> None:
    """Raise UserError if `path` is a file of another kind: the wrong flag or a forgotten name would destroy it."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() not in endings:
        raise UserError(f"{path} exists and is no {' or '.join(endings)} file; it is not replaced, use another name")
