"""Ctrl-C, SIGTERM and SIGHUP end a run after the step in flight."""

import os
import signal
import sys
import threading

from common import distributed
from common.errors import termination_signals

import torch


class StopSignals:
    """Within the block the first signal sets a flag that the loop checks; the second one exits at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignals":
        in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles no signals in others
        numbers = (signal.SIGINT, *termination_signals()) if in_main_thread else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        # torchrun passes on what the terminal has sent already, so a second signal changes nothing there.
        if self.number is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            sys.exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None

    def should_stop(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step; all processes must ask after the same steps."""
        # To exchange signals, all hosts must wait for their GPUs.
        if distributed.world_size() > 1 and device.type == "cuda" and step % 16:
            return False
        return self.in_any_process()

    def in_any_process(self) -> bool:
        """Whether any process got a signal; all processes must ask at the same place."""
        if number := int(distributed.all_reduce_max(self.number or 0)):
            self.number = number  # never reset: a signal may have arrived since the exchange
        return bool(number)
