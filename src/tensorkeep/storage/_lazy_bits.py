"""Refuse tensors that torch saved as a lazy conjugate or a lazy minus of the numbers in the file."""

from __future__ import annotations

from typing import Any

from tensorkeep.errors import TensorkeepError, shown

_AT = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}  # the argument that torch calls metadata


def refuse_lazy(name: str, args: tuple[Any, ...], where: object) -> None:
    """Stop at a tensor whose values are not the stored numbers but their conjugate or negative.

    Args:
        name: the `_rebuild_tensor*` that a pickle calls.
        args: its arguments.
        where: the file, for messages.

    Raises:
        TensorkeepError: one of torch's bits is set, or something else is said that nobody here knows.
    """
    for bits in args[_AT[name] :]:
        on = [k for k, v in bits.items() if v is not False] if isinstance(bits, dict) else [bits] * (bits is not None)
        if on:
            raise TensorkeepError(
                f"a tensor is saved with torch's bit {shown(on[0])}: its values are not the stored numbers",
                where=where,
                hint="save it again after .resolve_conj().resolve_neg()",
            )
