"""Data-parallel training of one network in several processes, started by torchrun: one per GPU, or several on a CPU.

Without torchrun there is one process, rank 0, and nothing here has an effect.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from common.errors import UserError

import torch
from torch import Tensor, nn
from torch import distributed as dist

# Long enough for one process to decode the images while the others wait.
TIMEOUT = timedelta(minutes=30)
# Seconds to wait before exiting after another process has died. torchrun polls ten times per second and reports the
# process that exits first. This should be the one that failed.
EXIT_DELAY = 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process (rank 0) that prints, plots and saves."""
    return rank() == 0


def print_rank0(*text: object) -> None:
    """Print from rank 0 only. A closed stdout does not stop the run."""
    if is_main_process():
        try:
            print(*text, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Initialize torch.distributed within the block, under torchrun; `device` is the value of --device.

    Raises UserError for more processes than GPUs on a machine, for MPS, and if another process of the run dies.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if device == "mps":
        raise UserError(f"--device mps has one GPU, for one process, but torchrun started {local_world_size}")
    if on_cuda and local_world_size > (gpus := torch.cuda.device_count()):
        raise UserError(f"found {gpus} GPUs for {local_world_size} processes; start fewer, or give --device cpu")
    if on_cuda:
        torch.cuda.set_device(local_rank)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if local_world_size == world_size:  # after a restart, torchrun's store still has the addresses of dead processes
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        time.sleep(EXIT_DELAY)
        raise UserError("another process of this run has died; torchrun's report below names it") from None
    dist.destroy_process_group()  # not after an error: it would wait for collectives that never complete


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block first in local rank 0 of each machine, then in its other processes."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


def from_main_process(function: Callable[[], Any]) -> Any:
    """Call `function` in rank 0 only. Return its result, or raise its UserError, in all processes."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]  # the result, the error message
    if is_main_process():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise UserError(outcome[1], silent=not is_main_process())
    return outcome[0]


def local_slice(count: int) -> slice:
    """This process's slice of `count` items. The lengths of the slices differ by at most one."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def all_reduce(values: list[float], operation: dist.ReduceOp = dist.ReduceOp.SUM) -> list[float]:
    """The sum of each value over the processes, or their maximum (ReduceOp.MAX), in float64."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the values of rank 0's tensors to all processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def average_gradients(model: nn.Module, *, weight: float) -> None:
    """Average a model's gradients over the processes; `weight` is this process's fraction of the batch."""
    if world_size() == 1:
        return
    # One all-reduce, which a CUDA graph can capture, instead of DistributedDataParallel's hooks.
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # Flattened in memory order, which is the same in all processes and needs no transposed copies.
    rows = [gradient.as_strided((gradient.numel(),), (1,)) for gradient in gradients]
    flat = torch.cat(rows).mul_(weight)
    dist.all_reduce(flat)
    torch._foreach_copy_(rows, flat.split([len(row) for row in rows]))
