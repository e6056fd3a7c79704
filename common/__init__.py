"""Import this before torch: it sets how long OpenMP's threads wait for one another, and lets Ctrl-C end an import.

A step has thousands of parallel parts, and at the end of each the threads wait for the last one. libgomp, which PyTorch
uses on Linux, spins for a long time by default. Where a program of another session keeps a core busy, two threads share
the core that is left, and each uses up its time by waiting for the other: training became 14 times slower, and twice
slower with this setting, which costs nothing on quiet cores (benchmarks/results/busy.json). libgomp reads the variable
when it is loaded. What the user has set stays.
"""

import os
import sys
from types import TracebackType

SPINS = "4000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

_excepthook = sys.excepthook


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # while a script still imports; common/errors.py sees to the rest
        print("interrupted", file=sys.stderr)
    else:
        _excepthook(kind, error, trace)


sys.excepthook = _without_traceback
