"""A whole training step as one CUDA graph: the head and the losses are thousands of launches of microseconds each.

Launched one by one they leave the GPU idle for 10 to 30 ms a step (H200). A graph replays them from the GPU's side;
the price is that nothing may change shape, and nothing may be read back by the host inside the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[], Tensor]


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer` be recorded, before its first step: its learning rates become tensors, for a schedule to fill."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(group["params"][0].device)


def capture_step(step: Step, warmup: int = 3) -> Step:
    """Run `step` `warmup` times, record it once, and return what replays it; its result is overwritten each time.

    `step` reads the same tensors at each call: copy a new batch into them. Random numbers advance with each replay.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
