"""What the whole suite shares: Python looks seldom for garbage in what was imported, which all stays to the end.

Torch, transformers and the modules of tests are a million objects. A look at all of them takes a third of a second,
in a forked child half of one, where it also copies them. Importing them made 24 such looks; now it makes none, and the
looks of tests pass over what was there before the first of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.test_signing import Keys

# compiled code has no vectors, in every process: to find out which of them the compiler knows takes 8 s of each
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

with contextlib.suppress(ModuleNotFoundError):  # `make test-gpu` runs without it, too
    from hypothesis import settings

    # no example fails for its seconds of the clock: where other processes take turns, any one may take 0.2 s
    settings.register_profile("suite", parent=settings.default, deadline=None)
    settings.load_profile("suite")

MANY = 10_000  # new objects between two looks at the youngest; Python's own number is 700


@contextlib.contextmanager
def alone_where_nothing_is_compiled() -> Iterator[None]:
    """Python compiles all that is imported once: where it has not yet, the next worker waits for what the first makes.

    It takes 17 s, which two workers side by side would both pay; meanwhile mypy has the other core.
    """
    handle = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        torch = importlib.util.find_spec("torch")
        if sys.dont_write_bytecode or torch is None or Path(str(torch.cached)).exists():
            fcntl.flock(handle, fcntl.LOCK_UN)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile holds the handle, too
        os.close(handle)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the modules of tests without a look, and keep what they left out of later ones."""
    gc.disable()
    try:
        with alone_where_nothing_is_compiled():
            return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(MANY, *gc.get_threshold()[1:])
        gc.enable()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Keys and certificates to sign with, made anew."""
    from tests.test_signing import Keys

    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(model: Path, keys: Keys, tmp_path: Path) -> Path:
    """A signed copy of a test file's `model`."""
    from tensorkeep.cli import main

    shutil.copytree(model, tmp_path / "signed")
    assert main(["sign", str(tmp_path / "signed"), "--key", str(keys / "own.pem"), "--quiet"]) == 0
    return tmp_path / "signed"
