from __future__ import annotations

import pytest
import torch

from tensorkeep.detection.model.schedule import ScheduleConfig, learning_rate, set_learning_rates
from tensorkeep.errors import TensorkeepError


def test_warm_up_starts_at_zero_and_reaches_the_base_on_its_last_update() -> None:
    rates = [learning_rate(k, 2e-4, 40, 800) for k in range(801)]
    assert rates[0] == 0 and rates[39] == rates[40] == 2e-4
    assert rates[800] == pytest.approx(1e-8) and rates[799] < rates[41]


def test_a_warm_up_of_one_or_none() -> None:
    assert learning_rate(0, 1.0, 1, 4) == 0 and learning_rate(1, 1.0, 1, 4) == 1
    assert learning_rate(0, 1.0, 0, 4) == 1


def test_every_group_keeps_its_own_base() -> None:
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "base_lr": b} for b in (2.0, 1.0)])
    config = ScheduleConfig(warmup_epochs=1, epochs=3, stop_epoch=2)
    assert set_learning_rates(optimizer, config, 10, 10) == [2.0, 1.0]
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 1.0]
    assert config.epochs_run == 2 and ScheduleConfig().epochs_run == 100


def test_a_warm_up_longer_than_the_schedule_is_refused() -> None:
    with pytest.raises(TensorkeepError, match="does not fit"):
        learning_rate(0, 1.0, 5, 5)
