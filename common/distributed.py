"""Several processes that train one network together, as torchrun starts them: one for each GPU, or some on a CPU.

A process that torchrun did not start is the first of one; nothing here does anything then.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from common.errors import UserError

import torch
from torch import distributed as dist
from torch import nn

# One process decodes the images while the others wait for it.
TIMEOUT = timedelta(minutes=30)
# Seconds that a process outlives one that it found dead: torchrun, which looks ten times a second, reports whom it sees
# end first.
SEEN_DEAD = 1


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this process is the one that downloads, prints, draws and saves."""
    return rank() == 0


def print_rank0(*text: object) -> None:
    """Print, in the first process alone."""
    if is_main_process():
        print(*text, flush=True)


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Within the block the processes that torchrun started know each other; `device` is what --device names.

    Raises UserError where there are more processes on a machine than GPUs, on MPS, and where another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    place, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if device == "mps":
        raise UserError(f"--device mps has one GPU, for one process; torchrun has started {here}")
    if on_cuda:
        if here > torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc_per_node={here}: there are {torch.cuda.device_count()} GPUs here, and each process "
                "needs its own; start as many, or give --device cpu"
            )
        torch.cuda.set_device(place)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if here == world_size:  # torchrun keeps the store when it starts them again, with the dead ones' addresses in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    with explain_lost_processes():
        yield
    dist.destroy_process_group()  # after an error it would wait for the others' part in exchanges that never come


@contextlib.contextmanager
def first_here() -> Iterator[None]:
    """The first process of each machine goes through the block before the machine's others do."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


def from_main_process(function: Callable[[], Any]) -> Any:
    """What `function` gives in the first process, in all of them; its UserError too, which the first one prints."""
    if world_size() == 1:
        return function()
    found: list[Any] = [None, None]
    if is_main_process():
        try:
            found[0] = function()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    if found[1] is not None:
        raise UserError(found[1], silent=not is_main_process())
    return found[0]


def error_in_all(message: str) -> UserError:
    """The error to raise where every process finds the same mistake: the first one prints it."""
    return UserError(message, silent=not is_main_process())


def share(count: int, rank: int, world_size: int) -> slice:
    """The part of `count` things that falls to a process; two parts differ by one at most."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def all_reduce_sum(values: list[float]) -> list[float]:
    """Each value's sum over the processes, in float64."""
    return _reduced(values, dist.ReduceOp.SUM)


def all_reduce_max(value: float) -> float:
    return _reduced([value], dist.ReduceOp.MAX)[0]


def _reduced(values: list[float], operation: dist.ReduceOp) -> list[float]:
    if world_size() == 1:
        return values
    together = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(together, operation)
    return together.tolist()


def copy_buffers(model: nn.Module) -> None:
    """Give every process the first one's batch-norm statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Turn what is raised where another process of the run is gone into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        time.sleep(SEEN_DEAD)
        raise UserError("another process of this run is gone; torchrun's report below names it") from None
