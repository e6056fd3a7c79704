"""UserError, the exception for problems that the user can fix, and the exit status of scripts."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """An error of the user or the environment: bad flag, bad file, no internet connection, full disk.

    The message names the file or flag, what was found, what was expected, and what to do. `silent`: it is not printed,
    because another process prints it.
    """

    def __init__(self, message: str, *, silent: bool = False):
        super().__init__(message)
        self.silent = silent


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def termination_signals() -> list[int]:
    """SIGTERM, and SIGHUP (a closed terminal) if the system has it and it is not ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    return [signal.SIGTERM, *([hangup] if hangup and signal.getsignal(hangup) != signal.SIG_IGN else [])]


def run(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and end the process with its exit status.

    The status is 2 for a UserError, 130 for Ctrl-C and 141 for a broken pipe, all without a traceback. It is 143 for
    SIGTERM and 129 for SIGHUP, after the `finally` blocks have run.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # was SIG_DFL, see common/__init__.py
    for number in termination_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # class names may not exist in the terminal's encoding
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        status = 128 + 13  # as after SIGPIPE, which Windows does not have
        if error.errno == errno.ENOSPC:
            print(f"error: standard output could not be written ({error.strerror}); free disk space", file=sys.stderr)
            status = 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Skip Python's shutdown: a Gloo thread that frees a tensor during it would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
