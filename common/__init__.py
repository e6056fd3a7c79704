"""Import this before torch: it sets how long OpenMP's threads wait for one another, and lets Ctrl-C end an import.

A step has thousands of parallel parts. At the end of each, the threads wait for the last one. libgomp, which PyTorch
uses on Linux, spins for a long time by default. If a program of another session keeps one of two cores busy, the two
threads share the other core, and each uses up its time by waiting for the other: training became 14 times slower, and
2 times slower with this setting, which costs nothing on quiet cores (benchmarks/results/busy.json). libgomp reads the
variable when it is loaded. A value set by the user is kept.
"""

import os
import signal
import sys
from pathlib import Path

SPIN_COUNT = "4000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

# Until errors.run, Ctrl-C ends a script of this project at once: a package can swallow a KeyboardInterrupt while it is
# imported, and is then half imported.
_script = getattr(sys.modules["__main__"], "__file__", None)
if _script and Path(_script).resolve().parent == Path(__file__).resolve().parents[1]:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
