"""UserError, the exception for problems that the user can fix, and how a script exits on it."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's, or of the machine around the program: bad flag, bad file, no network, full disk.

    The message names the file or flag, what was found, what was expected, and what to do. `silent` says that another
    process prints it.
    """

    def __init__(self, message: str, *, silent: bool = False):
        super().__init__(message)
        self.silent = silent


def first_line(error: BaseException) -> str:
    """What an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def ending_signals() -> list[int]:
    """SIGTERM and, where there is one and nohup does not ignore it, SIGHUP, which a closed terminal sends."""
    hangup = getattr(signal, "SIGHUP", None)
    return [signal.SIGTERM, *([hangup] if hangup and signal.getsignal(hangup) != signal.SIG_IGN else [])]


def run(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and end the process with its exit status.

    A UserError ends with status 2, a Ctrl-C with 130, and a standard output that nobody reads any more with 141, all
    without a traceback; a SIGTERM with 143 and a SIGHUP with 129, after the clean-up that `finally` blocks promise.
    """
    for number in ending_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class's name need not fit the terminal's encoding
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        if not error.silent:
            rank = f" in process {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
            print(f"error{rank}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        status = 128 + 13  # as a shell shows SIGPIPE, which Windows does not have
        if error.errno == errno.ENOSPC:
            print(f"error: standard output could not be written ({error.strerror}); free that place", file=sys.stderr)
            status = 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A thread of Gloo's that hands a tensor back while Python takes itself down would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
