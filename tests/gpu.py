"""Tests that need a GPU: `make test-gpu` runs them all, elsewhere they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

T = TypeVar("T", bound=Callable[..., Any])
HERE = torch.cuda.is_available()


def needs_gpus(count: int) -> Callable[[T], T]:
    """Mark a test that needs so many GPUs."""

    def mark(test: T) -> T:
        reason = "needs a GPU" if count == 1 else f"needs {count} GPUs"
        marked: T = pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)(test))
        return marked

    return mark


needs_gpu = needs_gpus(1)
# devices to run a test on: the CPU everywhere, a GPU where there is one
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if HERE else [])]
