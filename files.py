"""Files that are written whole or not at all."""

import errno
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from errors import UserError

try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

LOCK_POLL = 0.2  # seconds between two looks at a lock that another process holds


@contextmanager
def replacing(path: str | Path, what: str, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends without an error, it takes the place of `path`.

    The folder is made where it is missing. After an error `path` is as it was and the temporary file is gone; after a
    kill the next write to the same path clears it away, since it has the same name. `shared` says that several
    processes may write the same file at once: each then has a temporary file of its own.

    Raises UserError, naming `what` and `path`, where the file system refuses and where a folder or device lies there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    try:
        if path.exists() and not path.is_file():  # the super-user would put a file in the place of /dev/null
            raise OSError("what lies there is no ordinary file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, what, error) from None


def _not_written(path: Path, what: str, error: OSError) -> UserError:
    return UserError(
        f"{path}: {what} could not be written ({error.strerror or error}); free that place or name another"
    )


@contextmanager
def locked(path: str | Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Let one process at a time into the block; the others wait, after a line on stderr that names `what`.

    Without `wait` they get a UserError that names the process within. The lock is a file beside `path`, held through
    the operating system, which frees it when its process dies. Where there is no such lock (some network file systems),
    everybody gets in at once.

    Raises UserError, naming `what` and `path`, where the lock file cannot be made.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("ab")
        except OSError as error:
            raise _not_written(path, what, error) from None
        with file:
            # Whoever had the lock may have removed its file after this process opened it: then a newer file counts.
            if _try_lock(file) and _is_at(file, lock):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
                file.flush()
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows keeps a file that is open
                        lock.unlink()
                return
        if not wait:
            raise UserError(f"{path}: {_holder(lock)} writes {what} there; wait for it to end, or name another file")
        if not told:
            print(f"another process is busy with {what}: waiting for it to end", file=sys.stderr)
            told = True
        time.sleep(LOCK_POLL)


def _try_lock(file: BinaryIO) -> bool:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
    return True


def _holder(lock: Path) -> str:
    """Who has a lock; on Windows nobody else can read that."""
    with suppress(OSError):
        return lock.read_text() or "another process"
    return "another process"


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def check_writable(folder: str | Path, what: str) -> None:
    """Make `folder` where it is missing, and raise UserError where no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # leaves nothing there, not even after a kill
            pass
    except OSError as error:
        raise _not_written(Path(folder), what, error) from None
