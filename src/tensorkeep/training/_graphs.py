"""Record forward and backward as a CUDA graph, and replay it for every batch.

A detector's head and losses are thousands of launches of microseconds each; made one by one they leave the GPU idle for
10 to 30 ms a step (H200). A graph replays them from the GPU's side; the price is that nothing may change shape, and
nothing may be read back by the host inside of what is recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.training import randomness

T = TypeVar("T")
Named = Mapping[str, Tensor]


def capture_step(step: Callable[[], T], warmup: int = 3) -> Callable[[], T]:
    """Run a step a few times, record it once, and make a function that replays it.

    Args:
        step: reads the same tensors at each call: a new batch must be copied into them.
        warmup: so many plain calls come first.

    Returns:
        A function that replays the step. It returns the same tensors each time, overwritten; random numbers advance
        with each replay.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    # other threads may go on: a loader's, which pins memory meanwhile, would spoil a capture that minds them
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay


class Recorded:
    """Forward and backward of a micro-batch, recorded with the first batch and replayed for all.

    Recording rehearses the work twice; gradients and random states are put back, so every call is a replay and draws
    the numbers that a launched one would. Gradients must keep their memory: `zero_grad(set_to_none=False)`. What in a
    batch is no tensor stays that of the first one for ever.

    Args:
        work: called with a batch and the divisor, it adds to the gradients of `parameters`, changes nothing else, and
            returns named scalars.
        parameters: whose gradients it adds to.

    Raises:
        TensorkeepError: `work` cannot be recorded, or a later batch has other shapes; raised by the call.

    Example:
        >>> forward_backward = Recorded(work, parameters)                    # doctest: +SKIP
        >>> optimizer.zero_grad(set_to_none=False)                           # doctest: +SKIP
        >>> forward_backward(batch, divisor)["loss"]                         # doctest: +SKIP
    """

    def __init__(self, work: Callable[[Any, Tensor], Named], parameters: Sequence[Tensor]) -> None:
        self._work, self._parameters = work, parameters
        self._held: tuple[Any, Tensor] | None = None
        self._replay: Callable[[], Named] | None = None

    def __call__(self, batch: Any, divisor: float | Tensor) -> dict[str, Tensor]:
        """Replay with a batch that is on the device; the scalars returned are copies."""
        if self._held is None or self._replay is None:
            device = self._parameters[0].device
            self._held = copy.deepcopy(batch), torch.as_tensor(divisor, dtype=torch.float32).to(device, copy=True)
            self._replay = self._recorded(*self._held)
        fill(self._held[0], batch)
        self._held[1].copy_(torch.as_tensor(divisor), non_blocking=True)
        return {name: value.clone() for name, value in self._replay().items()}

    def _recorded(self, batch: Any, divisor: Tensor) -> Callable[[], Named]:
        """Record the work, and leave gradients and random states as they were."""
        before = randomness.capture()
        try:
            replay = capture_step(lambda: self._work(batch, divisor), warmup=2)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            what = f"the step cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}"
            hint = "graph: false, where dropout is recomputed, or with checkpointing: blocks or attention"
            raise TensorkeepError(what, where="training.graph", hint=hint) from error
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        randomness.restore(before)
        return replay


def fill(place: Any, batch: Any) -> None:
    """Copy every tensor of `batch` (in dicts, lists and tuples) into its counterpart in `place`.

    Raises:
        TensorkeepError: one has another shape or dtype.

    >>> held = {"x": torch.zeros(2), "name": "first"}
    >>> fill(held, {"x": torch.ones(2), "name": "second"})
    >>> held
    {'x': tensor([1., 1.]), 'name': 'first'}
    """
    if isinstance(place, Tensor):
        if place.shape != batch.shape or place.dtype != batch.dtype:
            what = f"a batch holds {_form(batch)} where the recorded one held {_form(place)}"
            raise TensorkeepError(what, where="training.graph", hint="graph: false, or batches of one shape")
        place.copy_(batch, non_blocking=True)
    elif isinstance(place, Mapping):
        for key, value in place.items():
            fill(value, batch[key])
    elif isinstance(place, (list, tuple)):
        if len(place) != len(batch):
            what = f"a batch holds a list of {len(batch)} where the recorded one held {len(place)}"
            raise TensorkeepError(what, where="training.graph", hint="graph: false, or batches of one shape")
        for one, other in zip(place, batch):
            fill(one, other)


def _form(tensor: Tensor) -> str:
    """Dtype and shape, for an error."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
