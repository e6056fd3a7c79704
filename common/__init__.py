"""Import this before torch: it shortens the busy-waiting of OpenMP's threads, and lets Ctrl-C stop a script at import.

A step has thousands of parallel regions, and at the end of each, the threads wait for the last one. libgomp, which
PyTorch uses on Linux, spins for a long time by default. If a program of another session keeps one of two cores busy,
both threads run on the other core, and each wastes its time slice spinning: training was 14 times slower. With this
setting it was only 2 times slower, and not slower on idle cores (benchmarks/results/busy.json). libgomp reads the
variable when it is loaded. A value set by the user is kept.
"""

import os
import signal
import sys
from pathlib import Path

SPIN_COUNT = "4000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

# Until errors.run, Ctrl-C kills a script of this project at once: some packages catch a KeyboardInterrupt during their
# import, and would then be only partly imported.
_script = getattr(sys.modules["__main__"], "__file__", None)
if _script and Path(_script).resolve().parent == Path(__file__).resolve().parents[1]:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
