"""Ctrl-C and SIGTERM end a run after the step in flight."""

import signal
import sys

from common import distributed


class StopSignals:
    """Within the block the first Ctrl-C or SIGTERM is noted, for the loop to stop at; the second one exits at once.

    torchrun passes on what the terminal has sent already, so under it a second signal changes nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, _: object) -> None:
        if self.number is not None and not distributed.under_torchrun():
            sys.exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None

    def in_any_process(self) -> bool:
        """Whether any process got a signal; all processes must ask at the same place."""
        if number := int(distributed.all_reduce_max(self.number or 0)):  # not reset here: one may have come meanwhile
            self.number = number
        return bool(number)
