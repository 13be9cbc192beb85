"""MiniMind's epochs and steps in samples, compared with counting one by one; its orders and its learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.minimind._position import Batching, batchings, first_rate, learning_rate, position, step_of
from tensorkeep.language.minimind.continue_from import CosinePerMicroBatch, order
from tensorkeep.training.batches import Stream, micro_batches

batching = st.builds(
    Batching, st.integers(1, 60), st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.booleans()
)


def walk(b: Batching, epoch: int, step: int) -> tuple[int, int, int]:
    """Count one by one: samples that optimizer steps have used by (epoch, step), samples since, and the steps."""
    used = since = updates = 0
    for e in range(epoch + 1):
        seen = 0
        for number in range(1, (step if e == epoch else b.iterations) + 1):
            taken = min(number * b.batch * b.world_size, b.length) - seen
            seen, since = seen + taken, since + taken
            if (number + b.early) % b.accumulation == 0:
                used, since, updates = used + since, 0, updates + 1
        if e < epoch and b.stepped(b.iterations)[1] < b.iterations:
            used, since, updates = used + since, 0, updates + 1
    return used, since, updates


@given(batching, st.integers(0, 3), st.data())
def test_a_position_is_what_optimizer_steps_have_used_and_no_gradient_is_lost(
    b: Batching, epoch: int, data: Any
) -> None:
    step = data.draw(st.integers(0, b.iterations))
    used, since, updates = walk(b, epoch, step)
    assert position(epoch, step, b) == (used, since)
    found = batchings(b.length, b.batch, b.world_size, epoch, step, updates, old=True)
    if not b.early and b.accumulation <= b.iterations:
        assert b in found  # Adam's counter leaves the truth among the candidates


@given(batching, st.integers(0, 3), st.data())
def test_step_and_samples_go_back_and_forth(b: Batching, epoch: int, data: Any) -> None:
    step = data.draw(st.integers(0, b.length // (b.batch * b.world_size)))
    samples = epoch * b.length + step * b.batch * b.world_size
    whole = step * b.batch * b.world_size == b.length  # the epoch's end is the next one's start
    assert step_of(samples, b) == ((epoch + 1, 0, 0) if whole else (epoch, step, 0))
    assert position(epoch, step, b._replace(accumulation=1, early=False)).samples == samples


@given(st.integers(0, 400), batching)
def test_what_a_step_cannot_say_is_less_than_a_micro_batch_of_all_ranks(samples: int, b: Batching) -> None:
    epoch, step, rest = step_of(samples, b)
    assert epoch * b.length + step * b.batch * b.world_size + rest == samples
    assert 0 <= rest < b.batch * b.world_size


def test_a_step_beyond_the_epoch_names_both_numbers() -> None:
    with pytest.raises(TensorkeepError, match=r"step 51 of an epoch that has 50 .*micro-batches of 4") as caught:
        position(1, 51, Batching(200, 4, 2))
    assert caught.value.code == "R02"


@given(st.integers(0, 2), st.integers(1, 30), st.integers(1, 4))
def test_the_rate_a_run_began_with_is_read_off_its_file(epoch: int, step: int, more: int) -> None:
    b = Batching(120, 4, 2)
    now = learning_rate(3e-4, epoch * b.iterations + step, (epoch + more) * b.iterations)
    found = first_rate(now, epoch, step, epoch + more, b)
    assert found is not None and abs(found - 3e-4) < 1e-12
    assert first_rate(now, epoch + 1, step, epoch + 1, b) is None


@given(batching.filter(lambda b: b.length >= b.update and not b.early))
def test_the_schedule_is_minimind_s_at_the_micro_batch_that_steps(b: Batching) -> None:
    schedule = CosinePerMicroBatch(7, 0, b.update, b, epochs=2)
    for update in range(b.length // b.update):
        theirs = learning_rate(1.0, (update + 1) * b.accumulation, 2 * b.iterations)
        assert schedule(7 + update, 1.0) == theirs


# -- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_one_process_shuffles_by_its_global_generator(epoch: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42 + epoch)
        assert order(epoch, 101, distributed=False) == torch.randperm(101).tolist()


@pytest.mark.parametrize("length", [24, 26])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_get_what_their_sampler_gave_them(length: int, world: int) -> None:
    batch, accumulation, epoch = 2, 2, 3
    theirs = []
    for rank in range(world):
        sampler = DistributedSampler(range(length), world, rank)
        sampler.set_epoch(epoch)
        theirs.append(list(BatchSampler(sampler, batch, drop_last=False)))
    b = Batching(length, batch, accumulation, world)
    stream = Stream(0, length, {epoch: order(epoch, length, distributed=True)})
    for update in range(length // b.update):
        keys = stream.keys(epoch * length + update * b.update, b.update)
        for rank in range(world):
            parts = [[i for _, i in part] for part in micro_batches(keys, rank, world, batch)]
            assert parts == theirs[rank][update * accumulation : (update + 1) * accumulation]
