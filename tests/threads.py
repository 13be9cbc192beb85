"""One thread for the tests of a module: `from tests.threads import one_thread  # noqa: F401`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Children are forked, which takes no pool of threads along; and the same threads make the same sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
