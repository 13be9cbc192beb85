from __future__ import annotations

import pytest

from tensorkeep.detection.recipe.schema import ScheduleConfig, TrainingConfig
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.schedules import learning_rate, schedule_of


def test_warm_up_starts_at_zero_and_reaches_the_base_on_its_last_update() -> None:
    rates = [learning_rate(k, 2e-4, 40, 800) for k in range(801)]
    assert rates[0] == 0 and rates[39] == rates[40] == 2e-4
    assert rates[800] == pytest.approx(1e-8) and rates[799] < rates[41]


def test_a_warm_up_of_one_or_none() -> None:
    assert learning_rate(0, 1.0, 1, 4) == 0 and learning_rate(1, 1.0, 1, 4) == 1
    assert learning_rate(0, 1.0, 0, 4) == 1


def test_a_run_that_stops_before_its_cosine_has_the_rates_of_the_whole() -> None:
    whole = schedule_of(ScheduleConfig(warmup=2), TrainingConfig(epochs=5), 20)
    stopped = schedule_of(ScheduleConfig(warmup=2, ends_at=5), TrainingConfig(epochs=3), 20)
    rates = [whole(update, 0.3) for update in range(50)]
    assert rates == [learning_rate(update, 0.3, 20, 50) for update in range(50)]
    assert rates == [stopped(update, 0.3) for update in range(50)]


def test_a_warm_up_longer_than_the_schedule_is_refused() -> None:
    with pytest.raises(TensorkeepError, match="does not fit"):
        learning_rate(0, 1.0, 5, 5)
