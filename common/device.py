"""The device that a script uses: its settings, its precision, its memory and the error if that runs out."""

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
    """Resolve --device, and apply process-wide settings that make the device fast.

    `auto` is CUDA if available, else MPS, else the CPU. `deterministic`: runs on CUDA are bit-identical, but slower; on
    the CPU they always are. On a Linux CPU, freed memory is kept for reuse, and allocations beyond free memory fail.

    Raises UserError if this machine has no such device.
    """
    modules = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    found = [kind for kind, module in modules.items() if module.is_available()]
    if name == "auto":
        name = found[0]
    if name not in found:
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such device, only {', '.join(found)}")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for operators in float32
        # cuDNN searches for the fastest algorithm, which can differ between runs. Batch sizes hardly vary: it pays off.
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only useful for debugging
    if name == "cpu":
        keep_freed_memory()
        limit_memory()
    return torch.device(name)


def pick_precision(choice: str, device: torch.device) -> str:
    """Resolve --precision to "float32" or "bfloat16".

    `auto` is bfloat16 on CUDA and on CPUs with bfloat16 instructions. Without them, bfloat16 can be hundreds of
    times slower than float32 (github.com/pytorch/pytorch/issues/146508).
    """
    if choice != "auto":
        return choice
    fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
    return "bfloat16" if fast else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions and PyTorch uses them, which ATEN_CPU_CAPABILITY=avx2 prevents."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx2") and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse.

    By default it returns large blocks to the system, which must clear every page when they are allocated again: 1/8 to
    1/3 of the time of a training step on two cores (benchmarks/memory.py). Other C libraries are not changed.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never shrink the heap
        mallopt(m_mmap_max, 0)  # allocate every block in the heap


def limit_memory() -> None:
    """Make an allocation beyond the free memory fail. By default Linux grants it and kills the process later."""
    if sys.platform != "linux":
        return
    import resource

    limit = proc_bytes("/proc/self/status", "VmData") + free_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def free_memory(root: str | Path = "/") -> int:
    """Bytes that this process can still allocate on Linux: the free memory of the machine or the container."""
    root = Path(root)
    free = [proc_bytes(root / "proc/meminfo", "MemAvailable")]
    cgroups = root / "sys/fs/cgroup"
    for folder, limit, used in (
        (cgroups, "memory.max", "memory.current"),  # version 2
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
    ):
        try:
            # The page cache counts as used, but is freed on demand.
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
            free.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + reclaimable)
        except (OSError, ValueError):  # not this version of cgroups, or the limit is "max"
            continue
    return max(0, min(free))


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: of PyTorch on CUDA, of this process on a Linux CPU; otherwise None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not resource.getrusage: it includes the peak of the parent process.
    return proc_bytes("/proc/self/status", "VmHWM") if sys.platform == "linux" else None


def proc_bytes(path: str | Path, name: str) -> int:
    """The value of the line `name` in a /proc file, converted from kB to bytes."""
    lines = Path(path).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host is out of memory; PyTorch has several such errors."""
    phrases = ("out of memory", "ALLOC_FAILED", "not enough memory", "DefaultCPU")
    if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases):
        return True
    # If memory runs out during a CUDA graph capture, the end of the capture raises another error.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


@contextlib.contextmanager
def explain_out_of_memory(batch_size: int) -> Iterator[None]:
    """Turn out-of-memory errors into a UserError that suggests a smaller --batch-size."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_host = isinstance(error, MemoryError) or "not enough memory" in str(error) or "DefaultCPU" in str(error)
        memory = "memory" if on_host else "device memory"
        smaller = f"--batch-size {batch_size // 2}" if batch_size >= 4 else "smaller images or a smaller network"
        raise UserError(f"--batch-size {batch_size}: out of {memory}; try {smaller}") from None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """autocast to bfloat16 if `precision` is "bfloat16". The weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
