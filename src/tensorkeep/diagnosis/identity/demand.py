"""Demand that a checkpoint is a certain model, before anything is made of it: `name@identity`."""

from __future__ import annotations

import re
from pathlib import Path

from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.view import StateView, read


def split_demand(text: str) -> tuple[str, str | None]:
    """Return a checkpoint's name and the identity that is demanded of it.

    Args:
        text: `name@identity`, or a name alone; a path that exists as it stands is never taken apart.

    Raises:
        TensorkeepError: F07 where what stands behind the @ is hexadecimal and no identity.

    Example:
        >>> split_demand("base@" + "ab" * 32)[1] == "ab" * 32, split_demand("org/name")
        (True, ('org/name', None))
    """
    name, found, identity = text.rpartition("@")
    if not found or not name or not re.fullmatch("[0-9a-fA-F]+", identity) or Path(text).exists():
        return text, None
    if not re.fullmatch("[0-9a-f]{64}", identity):
        what = f"{identity[:80]!r} has {len(identity)} digits; an identity is 64 lower-case hex digits"
        raise TensorkeepError(what, where=name, code="F07", hint=f"tensorkeep identify {word(name)}")
    return name, identity


def demand(checkpoint: StateView | str | Path, identity: str) -> None:
    """Stop where a checkpoint is not the model that is demanded.

    Args:
        checkpoint: an opened checkpoint, or its path.
        identity: 64 hex digits.

    Raises:
        TensorkeepError: F03 where its identity is another, F07 where the demanded one is none; as `identify` does.
    """
    from tensorkeep.diagnosis.identity.identify import identify
    from tensorkeep.diagnosis.identity.proofs import digest

    view = checkpoint if isinstance(checkpoint, StateView) else read(checkpoint)
    digest(identity, "the identity", view.path)
    found = identify(view).identity
    if found != identity:
        what = f"is not the model that is demanded: its identity is {found}, not {identity}"
        raise TensorkeepError(what, where=view.path, code="F03", hint="get the model again, or change what is demanded")
