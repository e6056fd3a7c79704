"""Import this before torch: it says how long OpenMP's threads wait for one another without sleeping.

A step has thousands of parallel parts, and at the end of each the threads wait for the last one. libgomp, which PyTorch
uses on Linux, spins for a millisecond or so by default. Where a program of another session keeps a core busy, two
threads then share what is left, and each uses up its time by waiting for the other: training becomes 16 times slower.
A short wait loses nothing on quiet cores and little on busy ones (benchmarks/busy.py). libgomp reads the variable when
it is loaded, and what the user has set stays.
"""

import os

SPINS = "4000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
