"""The one exception that means "the user can mend this", and how a script ends on it."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's, or of the machine around the program: bad flag, bad file, no network, full disk.

    The message names the file or flag, what was found, what was expected, and what to do.
    """


def run(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and end the process with its exit status.

    A UserError ends with status 2 and a Ctrl-C with 130, both without a traceback; a SIGTERM with 143, after the
    clean-up that `finally` blocks promise.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
