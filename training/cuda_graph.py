"""Make a training step faster than in eager mode: with a CUDA graph, with torch.compile, or with both.

A step has hundreds of small operators. On a GPU, launching their kernels from Python takes longer than running them. A
CUDA graph launches all kernels of a step at once; torch.compile fuses kernels, so that they read and write less memory.
"""

import functools
from collections.abc import Callable

from common import distributed
from common.device import is_out_of_memory
from common.errors import UserError, first_line

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3  # before a capture, so that cuDNN and cuBLAS choose algorithms and allocate memory


def pick_compile(choice: str, device: torch.device) -> str:
    """Resolve --compile. `auto` is "graph" on CUDA, else "none". Without CUDA, "graph" and "both" become "none"."""
    if choice == "auto":
        return "graph" if device.type == "cuda" else "none"
    if choice in ("graph", "both") and device.type != "cuda":
        distributed.print_rank0(f"--compile {choice} needs CUDA; using none")
        return "none"
    return choice


class FastStep:
    """A training step in the mode that --compile selects: "none", "graph", "inductor" or "both".

    `step` takes images, labels, and the model or its compiled version. It may change only the tensors in the list that
    `state` returns, always the same ones. At the first batch of each number of images (over all processes)
    and each image size, the step is compiled or captured, which runs it. Then the state is restored, so that these
    runs do not train.

    Raises UserError if that fails. There is no fallback to eager mode: in PyTorch 2.11, the memory allocator does not
    work after a failed capture (github.com/pytorch/pytorch/issues/180395).
    """

    def __init__(self, step: Callable, model: nn.Module, state: Callable, *, choice: str, batch_size: int):
        self.step, self.model, self.state, self.choice, self.batch_size = step, model, state, choice, batch_size
        # By the batch size over all processes, so that all processes prepare the same step at the same time, and by the
        # side of the images.
        self.prepared: dict[tuple[int, int], Callable[[Tensor, Tensor], None]] = {}
        # The graphs never run concurrently, so they can share one memory pool.
        self.pool = torch.cuda.graph_pool_handle() if choice in ("graph", "both") else None
        self.compiled = torch.compile(model, dynamic=False) if choice in ("inductor", "both") else None

    def __call__(self, images: Tensor, labels: Tensor, global_batch_size: int) -> None:
        size = global_batch_size, images.shape[-1]
        if size not in self.prepared:
            self.prepared[size] = self.prepare(images, labels, global_batch_size == self.batch_size)
        self.prepared[size](images, labels)

    def prepare(self, images: Tensor, labels: Tensor, is_full_batch: bool) -> Callable[[Tensor, Tensor], None]:
        """Return the step for batches of this size. The state is the same before and after."""
        # The smaller last batch is not compiled: a second compilation takes longer than it saves.
        network = self.compiled if self.compiled is not None and is_full_batch else self.model
        step = functools.partial(self.step, network=network)
        if network is self.model and not self.pool:
            return step
        before = [tensor.clone() for tensor in self.state()]
        try:
            if self.pool:
                return self.capture(step, images.clone(), labels.clone())
            step(images, labels)
            return step
        except Exception as error:  # compilers and drivers raise many exception types
            if is_out_of_memory(error):
                raise
            # If a step fails during a capture, the end of the capture raises a new error; the first is its __context__.
            reason = "; ".join(first_line(cause) for cause in (error.__context__, error) if cause)
            raise UserError(f"--compile {self.choice} failed ({reason}); use --compile none") from None
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.state(), before, strict=True):
                    tensor.copy_(value)
            self.model.zero_grad(set_to_none=True)

    def capture(self, step: Callable, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], None]:
        """Capture a step with `images` and `labels` as input buffers; return a function that fills and replays it."""
        current, side_stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(current):  # a failed capture does not restore the current stream
            side_stream.wait_stream(current)
            try:
                with torch.cuda.stream(side_stream):
                    for _ in range(WARM_UP_STEPS):
                        step(images, labels)
            finally:
                current.wait_stream(side_stream)  # also after an error: the state is restored on the current stream
            # Other threads may use CUDA at the same time: the thread that saves frees pinned memory.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step(images, labels)

        def replay(new_images: Tensor, new_labels: Tensor) -> None:
            images.copy_(new_images)
            labels.copy_(new_labels)
            graph.replay()

        return replay
