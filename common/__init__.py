"""Import this before torch: it sets how long OpenMP's threads wait for one another, and lets Ctrl-C end an import.

A step has thousands of parallel parts. At the end of each, the threads wait for the last one. libgomp, which PyTorch
uses on Linux, spins for a long time by default. If a program of another session keeps one of two cores busy, the two
threads share the other core, and each uses up its time by waiting for the other: training became 14 times slower, and
2 times slower with this setting, which costs nothing on quiet cores (benchmarks/results/busy.json). libgomp reads the
variable when it is loaded. A value set by the user is kept.
"""

import os
import sys
from types import TracebackType

SPIN_COUNT = "4000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

_excepthook = sys.excepthook


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # during the imports; common/errors.py handles it later
        print("interrupted", file=sys.stderr)
    else:
        _excepthook(kind, error, trace)


sys.excepthook = _without_traceback
