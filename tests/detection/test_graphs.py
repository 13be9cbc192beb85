from __future__ import annotations

import pytest
import torch

from tensorkeep.detection.graphs import capture_step, make_capturable
from tests.detection import tiny


def test_a_capturable_optimizer_holds_its_rates_in_tensors() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.25)
    make_capturable(optimizer)
    assert optimizer.param_groups[0]["capturable"] and float(optimizer.param_groups[0]["lr"]) == 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_step_trains_as_a_launched_one() -> None:
    losses = []
    for recorded in (False, True):
        torch.manual_seed(0)
        detector = tiny.detector(checkpointing="segments").cuda().train()
        frames, mask, segments, labels = tiny.batch()
        moved = frames.cuda(), mask.cuda(), [s.cuda() for s in segments], [y.cuda() for y in labels]
        optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
        make_capturable(optimizer)

        def step() -> torch.Tensor:
            loss = detector.loss(detector(*moved[:2]), *moved[2:]).cost  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            return loss.detach()

        run = capture_step(step, warmup=2) if recorded else step
        losses.append([run().item() for _ in range(3 if recorded else 5)])
    assert losses[1] == pytest.approx(losses[0][2:], rel=1e-4)
