"""Files that are written whole or not at all."""

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
def replacing(path: str | Path, what: str, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends without an error, it takes the place of `path`.

    The folder is made where it is missing. After an error `path` is as it was and the temporary file is gone; after a
    kill the next write to the same path removes it, since it has the same name. `shared` says that several
    processes may write the same file at once: each then has a temporary file of its own.

    Raises UserError, naming `what` and `path`, where the file system refuses and where a folder or device lies there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    try:
        if path.exists() and not path.is_file():  # the super-user would put a file in the place of /dev/null
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
    except BrokenPipeError:  # of another file: this one is no pipe
        raise
    except OSError as error:
        raise _not_written(path, what, error) from None


def _not_written(path: Path, what: str, error: OSError) -> UserError:
    return UserError(
        f"{path}: {what} could not be written ({error.strerror or error}); free that place or name another"
    )


@contextmanager
def locked(path: str | Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Let one process at a time into the block; the others wait, after a line on stderr that names `what`.

    Without `wait` they get a UserError. The lock is a file beside `path`, held through the operating system, which
    frees it when its process dies. Where there is no such lock (some network file systems), all get in at once.

    Raises UserError, naming `what` and `path`, where the lock file cannot be made.
    """
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise UserError(
                    f"{path}: another process is writing {what} there; wait for it to end, or name another file"
                ) from None
            print(f"another process is busy with {what}: waiting for it to end", file=sys.stderr)
            lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        raise _not_written(path, what, error) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            os.unlink(lock.lock_file)  # whoever waits for this one finds it removed, and takes the next
        lock.release()


def check_writable(folder: str | Path, what: str) -> None:
    """Make `folder` where it is missing, and raise UserError where no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # leaves nothing there, not even after a kill
            pass
    except OSError as error:
        raise _not_written(Path(folder), what, error) from None
