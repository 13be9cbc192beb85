"""Randomness that a restart, a version or a machine cannot change."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.training import randomness
from tests.helpers import refused

ORDER_0 = [3, 6, 0, 7, 4, 1, 2, 5]
ORDER_7 = [5, 7, 0, 2, 6, 3, 1, 4]
DERIVED = [6017775124710473527, 6930664995468245196]


def drawn() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_captured_states_go_through_json_and_give_the_same_draws() -> None:
    random.gauss(0, 1)  # leaves half a pair behind, as does randn
    np.random.randn()
    state = json.loads(json.dumps(randomness.capture()))
    first = drawn()
    randomness.seed_process(9)
    assert drawn() != first
    randomness.restore(state)
    assert drawn() == first


def test_ranks_draw_differently_and_repeatably() -> None:
    def of(rank: int) -> list[float]:
        randomness.seed_process(5, rank)
        return drawn()

    assert of(0) == of(0) and len({tuple(of(r)) for r in range(8)}) == 8


@given(st.integers(0, 2**64), st.lists(st.integers(-(2**40), 2**64), max_size=4))
def test_derived_seeds_are_63_bits_and_fit_a_generator(seed: int, keys: list[int]) -> None:
    number = randomness.derive(seed, *keys)
    assert 0 <= number < 2**63
    torch.Generator().manual_seed(number)


def test_no_two_of_many_keys_share_a_seed() -> None:
    seeds = {randomness.derive(s, e, i) for s in range(4) for e in range(20) for i in range(500)}
    assert len(seeds) == 4 * 20 * 500
    assert randomness.derive(0, 1) != randomness.derive(0, 1, 0) != randomness.derive(0, 0, 1)


def test_the_order_of_an_epoch_is_the_one_it_always_was() -> None:
    # written down once: a change of this breaks every run that is under way
    assert randomness.order(0, 0, 8).tolist() == ORDER_0
    assert randomness.order(7, 3, 8).tolist() == ORDER_7
    assert [randomness.derive(0), randomness.derive(1, 2, 3)] == DERIVED


@given(st.integers(0, 300), st.integers(0, 9))
def test_an_order_is_a_permutation(length: int, epoch: int) -> None:
    assert sorted(randomness.order(1, epoch, length).tolist()) == list(range(length))


def test_orders_of_epochs_have_nothing_in_common() -> None:
    orders = [randomness.order(0, epoch, 2000) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert (one == other).sum() < 10  # one is expected
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


@pytest.mark.parametrize("broken", [{}, {"python": 1}, {"python": [3, "!!", None]}, {"python": [3, "AAAA", None]}])
def test_a_malformed_state_is_an_error(broken: dict[str, object]) -> None:
    with refused("R01"):
        randomness.restore({**randomness.capture(), **broken} if broken else {})


def test_states_of_devices_that_are_not_here_are_an_error() -> None:
    state = randomness.capture() | {"cuda": ["AAAA"] * 9}
    assert not randomness.fits(state)
    with refused("R01", "9 CUDA devices"):
        randomness.restore(state)


def test_deterministic_kernels_are_asked_for_within_and_no_longer() -> None:
    with pytest.raises(RuntimeError), randomness.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()
    with randomness.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
