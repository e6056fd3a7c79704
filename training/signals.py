"""Ctrl-C, SIGTERM and SIGHUP stop a run after the current step, on several GPUs within 16 steps."""

import os
import signal
import sys
import threading

from common import distributed
from common.errors import termination_signals

import torch
from torch.distributed import ReduceOp


class StopSignals:
    """Within the block, the first signal sets a flag, which the training loop checks. The second exits at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignals":
        in_main_thread = threading.current_thread() is threading.main_thread()  # no other thread can set handlers
        numbers = (signal.SIGINT, *termination_signals()) if in_main_thread else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        # Ctrl-C reaches the process twice under torchrun, from the terminal and from torchrun: ignore the second one.
        if self.number is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            sys.exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None

    def should_stop(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step. All processes must call this after the same steps."""
        # Not after every step on GPUs: to exchange the signals, each process must wait for its GPU.
        if distributed.world_size() > 1 and device.type == "cuda" and step % 16:
            return False
        return self.in_any_process()

    def in_any_process(self) -> bool:
        """Whether any process got a signal. All processes must call this at the same point."""
        if number := int(distributed.all_reduce([self.number or 0], ReduceOp.MAX)[0]):
            self.number = number  # never reset: a signal may have arrived since the exchange
        return bool(number)
