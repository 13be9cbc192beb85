"""Which samples make up which batch is a pure function of seed, position and nothing else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.training.batches import Stream, batches, micro_batches, parts_of
from tests.helpers import refused
from tests.training import Noisy, collate

sizes = st.integers(1, 40)


@given(length=sizes, start=st.integers(0, 200), count=st.integers(0, 90), seed=st.integers(0, 3))
def test_the_stream_is_the_same_wherever_it_is_entered(length: int, start: int, count: int, seed: int) -> None:
    stream = Stream(seed, length)
    assert stream.keys(start, count) == stream.keys(0, start + count)[start:]


@given(length=sizes, seed=st.integers(0, 3), epoch=st.integers(0, 5))
def test_every_sample_comes_once_an_epoch(length: int, seed: int, epoch: int) -> None:
    keys = Stream(seed, length).keys(epoch * length, length)
    assert {e for e, _ in keys} == {epoch} and sorted(i for _, i in keys) == list(range(length))


@given(batch=st.integers(1, 30), world=st.integers(1, 6), micro=st.integers(1, 9))
def test_ranks_and_parts_make_up_the_batch_whatever_the_split(batch: int, world: int, micro: int) -> None:
    keys = [(0, i) for i in range(batch)]
    if batch < world:
        with refused(None, "cannot be split"):
            micro_batches(keys, 0, world, micro)
        return
    split = [micro_batches(keys, rank, world, micro) for rank in range(world)]
    assert sorted(key for parts in split for part in parts for key in part) == keys
    assert {len(parts) for parts in split} == {parts_of(batch, world, micro)}  # all ranks go in step
    assert all(len(part) <= micro for parts in split for part in parts)
    assert all(parts[-1] for parts in split)  # the last one carries the exchange


def test_an_order_from_elsewhere_holds_for_its_epoch_only() -> None:
    stream, ours = Stream(0, 3, {1: [2, 0, 1]}), Stream(0, 3)
    assert [i for _, i in stream.keys(3, 3)] == [2, 0, 1]
    assert stream.keys(0, 3) == ours.keys(0, 3) and stream.keys(6, 3) == ours.keys(6, 3)


def test_no_data_is_an_error() -> None:
    with refused(None, "empty"):
        Stream(0, 0).keys(0, 1)


def fetched(start: int, updates: int, workers: int, **split: Any) -> list[list[Any]]:
    return list(batches(Noisy(), collate, Stream(0, 23), start, updates, 5, workers=workers, **split))


@pytest.mark.parametrize("workers", [1, 2])
def test_augmentation_is_the_same_for_every_number_of_workers(workers: int) -> None:
    alone, helped = fetched(10, 6, 0, micro=2), fetched(10, 6, workers, micro=2)
    assert len(alone) == len(helped) == 6
    for ours, theirs in zip(alone, helped):
        for a, b in zip(ours, theirs, strict=True):
            assert a["index"] == b["index"] and torch.equal(a["x"], b["x"])


def test_augmentation_is_the_same_on_every_rank_and_new_in_every_epoch() -> None:
    rows = {}
    for rank in range(3):
        for part in (p for update in fetched(0, 10, 0, micro=1, rank=rank, world=3) for p in update if p is not None):
            for index, x in zip(part["index"], part["x"]):
                rows.setdefault(index, []).append(x)
    alone: dict[int, list[torch.Tensor]] = {}
    for part in (p for update in fetched(0, 10, 0, micro=5) for p in update):
        for index, x in zip(part["index"], part["x"]):
            alone.setdefault(index, []).append(x)
    assert rows.keys() == alone.keys()
    for index, once in alone.items():
        assert {tuple(x.tolist()) for x in rows[index]} == {tuple(x.tolist()) for x in once}
        assert len({tuple(x.tolist()) for x in once}) == len(once) >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_fetching_draws_from_no_global_generator(workers: int) -> None:
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())
    fetched(0, 3, workers, micro=5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_a_run_with_nothing_left_fetches_nothing() -> None:
    assert fetched(10, 0, 0, micro=5) == [] and fetched(10, -3, 0, micro=5) == []
