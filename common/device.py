"""The device that a script runs on, its precision, and the error if its memory runs out."""

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
    """Resolve --device, and apply the settings of this process that make the device fast.

    `auto` takes CUDA, then MPS, then the CPU. `deterministic`: runs on CUDA are bit-identical, but slower; on the
    CPU they always are. On the CPU, freed memory is kept for reuse, and allocating more than is free is an error.

    Raises UserError if this machine has no such device.
    """
    modules = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    available = [kind for kind, module in modules.items() if module.is_available()]
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} finds no such device, only {', '.join(available)}"
        )
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the operators that autocast leaves in float32
        # The sizes stay the same for a whole run: time the algorithms, unless every run must take the same one.
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # only helps to find bugs
    if name == "cpu":
        keep_freed_memory()
        limit_memory()
    return torch.device(name)


def pick_precision(choice: str, device: torch.device) -> str:
    """Resolve --precision: "float32" or "bfloat16".

    `auto` takes bfloat16 on CUDA and on a CPU with instructions for it. Without them bfloat16 is up to 499 times slower
    than float32 (github.com/pytorch/pytorch/issues/146508).
    """
    if choice != "auto":
        return choice
    fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
    return "bfloat16" if fast else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions, and no ATEN_CPU_CAPABILITY=avx2 keeps PyTorch from using them."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx2") and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Make the C library keep large blocks that PyTorch frees, for reuse by the next layer.

    By default glibc returns each block to the system, which then clears every page again: an eighth to a third of the
    time of a training step on two cores (benchmarks/memory.py). Other C libraries are not changed.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never shrink the heap
        mallopt(m_mmap_max, 0)  # allocate every block in the heap


def limit_memory() -> None:
    """Make Linux refuse an allocation beyond the free memory, instead of killing the process when it is used."""
    if sys.platform != "linux":
        return
    import resource

    limit = proc_bytes("/proc/self/status", "VmData") + free_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def free_memory(root: str | Path = "/") -> int:
    """Bytes that this process can still allocate on Linux: the free memory of the machine, or of its container."""
    root = Path(root)
    free = [proc_bytes(root / "proc/meminfo", "MemAvailable")]
    cgroups = root / "sys/fs/cgroup"
    for folder, limit, used in (
        (cgroups, "memory.max", "memory.current"),  # version 2
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
    ):
        try:
            # The page cache counts as used, but is freed when memory is needed.
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
            free.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + reclaimable)
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
    return max(0, min(free))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: by PyTorch on CUDA, by this process on a CPU under Linux; None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not resource.getrusage, to which a process started from another counts the other's peak too.
    return proc_bytes("/proc/self/status", "VmHWM") if sys.platform == "linux" else None


def proc_bytes(path: str | Path, name: str) -> int:
    """The value, which the file has in kB, of the line of a /proc file that begins with `name`."""
    lines = Path(path).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left, however PyTorch reports it."""
    signs = ("out of memory", "ALLOC_FAILED", "not enough memory", "DefaultCPU")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        return True
    # If memory runs out while a CUDA graph is captured, the end of the capture raises another error.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


@contextlib.contextmanager
def explain_out_of_memory(batch_size: int) -> Iterator[None]:
    """Turn PyTorch's errors about memory into a UserError that names --batch-size and a smaller value."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_host = isinstance(error, MemoryError) or "not enough memory" in str(error) or "DefaultCPU" in str(error)
        memory = "memory" if on_host else "device memory"
        if not on_host and torch.cuda.is_available():
            memory += f" ({torch.cuda.get_device_properties('cuda').total_memory / 2**30:.1f} GiB)"
        smaller = f"--batch-size {batch_size // 2}" if batch_size >= 4 else "smaller images or a smaller network"
        raise UserError(f"--batch-size {batch_size}: out of {memory}; try {smaller}") from None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 autocast if `precision` is "bfloat16"; the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
