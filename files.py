"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from errors import UserError


@contextmanager
def replacing(path: str | Path, what: str, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends without an error, it takes the place of `path`.

    The folder is made where it is missing. After an error `path` is as it was and the temporary file is gone; after a
    kill the next write to the same path clears it away, since it has the same name. `shared` says that several
    processes may write the same file at once: each then has a temporary file of its own.

    Raises UserError, naming `what` and `path`, where the file system refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    try:
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
        cause = error.strerror or error
        raise UserError(f"{path}: {what} could not be written ({cause}); free that place or name another") from None


def check_writable(folder: str | Path, what: str) -> None:
    """Make `folder` where it is missing, and raise UserError where no file can be written there."""
    with replacing(Path(folder) / ".writable", what, shared=True):
        pass
    (Path(folder) / ".writable").unlink(missing_ok=True)
