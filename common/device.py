"""The device that a script runs on: which one, in which precision, and what to say when its memory runs out."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16")


def set_up_device(name: str, *, deterministic: bool = False) -> torch.device:
    """The device that --device names, and the settings of this process that make it fast.

    `auto` takes CUDA, then MPS, then the CPU. `deterministic`: runs on CUDA are bit-identical, but slower; on the
    CPU they always are. On the CPU, freed memory is kept for reuse, and allocating more than is free is an error.

    Raises UserError where there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        have = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such device here, only {have}")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        # The sizes stay the same for a whole run: try which algorithm is fastest, where the choice may differ by run.
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a guard for code that reads such memory
    if name == "cpu":
        keep_freed_memory()
        refuse_missing_memory()
    return torch.device(name)


def pick_precision(choice: str, device: torch.device) -> str:
    """What --precision comes to: "float32" or "bfloat16".

    `auto` takes bfloat16 on CUDA and on a CPU with instructions for it; without them it is slower than float32, by up
    to 499 times (github.com/pytorch/pytorch/issues/146508).
    """
    if choice != "auto":
        return choice
    fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
    return "bfloat16" if fast else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers, and PyTorch may use them.

    ATEN_CPU_CAPABILITY=avx2 in the environment, PyTorch's own variable, forbids it.
    """
    there = torch.cpu.get_capabilities()
    if there.get("avx2") and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return any(there.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that PyTorch frees, for the next layer to take.

    By default glibc hands each back to the system, which then clears every page anew: an eighth to a third of the time
    of a training step on two cores (benchmarks/memory.py). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never shrink the heap
        mallopt(m_mmap_max, 0)  # take no block from outside it


def refuse_missing_memory() -> None:
    """On Linux, let an allocation beyond the free memory fail, so that an error can say so.

    By default Linux grants any amount and kills the process, without a word, when it comes to use it.
    """
    if sys.platform != "linux":
        return
    import resource

    limit = kilobytes("/proc/self/status", "VmData") * 1024 + free_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def free_memory(root: str | Path = "/") -> int:
    """Bytes that this process can still take on Linux: what the machine has, and what its container allows."""
    root = Path(root)
    free = [kilobytes(root / "proc/meminfo", "MemAvailable") * 1024]
    cgroups = root / "sys/fs/cgroup"
    for folder, limit, used in (
        (cgroups, "memory.max", "memory.current"),  # version 2
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
    ):
        try:
            # The page cache counts as used, and is given back when memory is needed.
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
            free.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + reclaimable)
        except (OSError, ValueError):  # no such version here, or "max"
            continue
    return max(0, min(free))


def kilobytes(path: str | Path, name: str) -> int:
    """A number of kB from a file of /proc, by the name that begins its line."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left, in whichever of its ways PyTorch says so.

    Where memory runs out while a CUDA graph is captured, the end of the capture fails in turn, and its error comes out.
    """
    signs = ("out of memory", "ALLOC_FAILED", "not enough memory", "DefaultCPU")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


@contextlib.contextmanager
def explain_out_of_memory(batch_size: int) -> Iterator[None]:
    """Turn PyTorch's errors about memory into one that names --batch-size and a smaller one."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_host = isinstance(error, MemoryError) or "not enough memory" in str(error) or "DefaultCPU" in str(error)
        room = ""
        if not on_host and torch.cuda.is_available():
            room = f" of {torch.cuda.get_device_properties('cuda').total_memory / 2**30:.1f} GiB"
        smaller = f"--batch-size {batch_size // 2}" if batch_size >= 4 else "smaller images or a smaller network"
        raise UserError(
            f"--batch-size {batch_size}: the {'memory' if on_host else 'device memory'}{room} is too small for it; "
            f"try {smaller}"
        ) from None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """With "bfloat16", convolutions and matrix products take and give it; the weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
