"""Run a training step faster than in eager mode: captured as one CUDA graph, with its network compiled, or both.

With hundreds of small operators, launching the kernels from Python takes longer than running them on a GPU. A CUDA
graph launches all kernels of a step at once; torch.compile fuses them, so that they read and write less memory.
"""

import functools
from collections.abc import Callable

from common import distributed
from common.device import is_out_of_memory
from common.errors import UserError, first_line

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3  # runs before a recording, for cuDNN and cuBLAS to choose algorithms and allocate memory

Step = Callable[[Tensor, Tensor, nn.Module], None]  # takes images, labels, and a network that has the model's weights


def pick_compile(choice: str, device: torch.device) -> str:
    """Resolve --compile: `auto` is "graph" on CUDA, "none" elsewhere."""
    if choice == "auto":
        return "graph" if device.type == "cuda" else "none"
    if choice in ("graph", "both") and device.type != "cuda":
        distributed.print_rank0(f"--compile {choice} needs CUDA; using none")
        return "none"
    return choice


class FastStep:
    """A training step in the mode that --compile selects: "none", "graph", "inductor" or "both".

    `step` may only change the tensors that `state` returns, always the same ones. At the first batch of each size, over
    all processes, the step is compiled or captured by running it; then the state is restored, so that this trains
    nothing.

    Raises UserError if that fails. It does not go on in eager mode: on PyTorch 2.11 a capture that failed leaves the
    memory allocator as if it were still captured (github.com/pytorch/pytorch/issues/180395).
    """

    def __init__(
        self, step: Step, model: nn.Module, state: Callable[[], list[Tensor]], *, choice: str, batch_size: int
    ):
        self.step, self.model, self.state, self.choice, self.batch_size = step, model, state, choice, batch_size
        # By the batch's size over all processes, so that all of them prepare the same step at the same time.
        self.prepared: dict[int, Callable[[Tensor, Tensor], None]] = {}
        # The graphs never run concurrently: they share one pool.
        self.pool = torch.cuda.graph_pool_handle() if choice in ("graph", "both") else None
        self.compiled = torch.compile(model, dynamic=False) if choice in ("inductor", "both") else None

    def __call__(self, images: Tensor, labels: Tensor, global_batch_size: int) -> None:
        if global_batch_size not in self.prepared:
            self.prepared[global_batch_size] = self.prepare(images, labels, global_batch_size == self.batch_size)
        self.prepared[global_batch_size](images, labels)

    def prepare(self, images: Tensor, labels: Tensor, is_full_batch: bool) -> Callable[[Tensor, Tensor], None]:
        """Return the step for batches of this size. The state is unchanged when this returns."""
        # The smaller last batch runs uncompiled: compiling twice costs more than it saves.
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
        except Exception as error:  # compilers and drivers fail in more ways than can be listed
            if is_out_of_memory(error):
                raise
            # When a capture fails, the original error is the __context__ of the one raised at its end.
            reason = "; ".join(first_line(cause) for cause in (error.__context__, error) if cause)
            raise UserError(f"--compile {self.choice} fails here ({reason}); take --compile none") from None
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.state(), before, strict=True):
                    tensor.copy_(value)
            self.model.zero_grad(set_to_none=True)

    def capture(self, step: Callable, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], None]:
        """Capture a step on the buffers `images` and `labels`; return a function that fills them and replays it."""
        current, side_stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(current):  # a failed capture does not restore the current stream
            side_stream.wait_stream(current)
            try:
                with torch.cuda.stream(side_stream):
                    for _ in range(WARM_UP_STEPS):
                        step(images, labels)
            finally:
                current.wait_stream(side_stream)  # also after a failure: the state is put back on the current one
            with torch.cuda.graph(graph, pool=self.pool):
                step(images, labels)

        def replay(new_images: Tensor, new_labels: Tensor) -> None:
            images.copy_(new_images)
            labels.copy_(new_labels)
            graph.replay()

        return replay
