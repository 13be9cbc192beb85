"""Prove that one tensor is part of a model, to someone who knows the model's identity and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorkeep.diagnosis.identity.identify import Leaf, ModelIdentity, leaf_of
from tensorkeep.diagnosis.identity.tensors import canonical_tensors
from tensorkeep.errors import TensorkeepError, near_misses, shown, word
from tensorkeep.formats.view import StateView
from tensorkeep.storage import merkle
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.record import DTYPES, PASSED_BLOCKS

KIND = "tensorkeep inclusion proof"
_LARGEST = 1 << 20
_MOST = 1 << 40  # leaves that a proof may speak of


def prove_tensor(model: ModelIdentity, tensor: str) -> dict[str, Any]:
    """Return the proof that a tensor is part of a model.

    Args:
        model: from `identify`.
        tensor: the tensor's hf name; a tied one is proven under the name that holds it.

    Returns:
        The proof as plain data: the tensor's leaf, its place, and the hashes that lead to the identity.

    Raises:
        TensorkeepError: K01 where the model has no such tensor.

    Example:
        >>> check_proof(prove_tensor(identify("model"), "model.norm.weight"))      # doctest: +SKIP
    """
    name = model.tied.get(tensor, tensor)
    if name not in model.leaves:
        raise TensorkeepError(
            f"has no tensor {tensor!r} under hf names",
            where=model.path,
            code="K01",
            hint=near_misses(tensor, model.leaves) or f"tensorkeep identify {word(model.path)} --tensors lists them",
        )
    hashes = model.hashes
    index = list(model.leaves).index(name)
    return {
        "schema": 1,
        "kind": KIND,
        "identity": merkle.identity(hashes).hex(),
        "tensor": model.leaves[name].to_json(name),
        "index": index,
        "leaves": len(hashes),
        "path": [h.hex() for h in merkle.path(hashes, index)],
    }


def check_proof(proof: Mapping[str, Any], where: object = "proof") -> tuple[str, str, Leaf]:
    """Check that a proof's leaf and hashes lead to the identity that it names.

    Args:
        proof: as `prove_tensor` gives it; from an untrusted file.
        where: the file, for messages.

    Returns:
        The identity, the tensor's name and its leaf.

    Raises:
        TensorkeepError: F03 where they do not, F07 where it is no such proof.
    """
    if proof.get("kind") != KIND or proof.get("schema") != 1:
        raise TensorkeepError("is no inclusion proof of schema 1", where=where, code="F07", hint="tensorkeep prove")
    wanted = digest(proof.get("identity"), "identity", where)
    name, leaf = read_leaf(proof.get("tensor"), where)
    index, count, path = proof.get("index"), proof.get("leaves"), proof.get("path")
    if type(index) is not int or type(count) is not int or not 0 <= index < count <= _MOST:
        raise TensorkeepError("names no place in a tree", where=where, code="F07")
    if not isinstance(path, list):
        raise TensorkeepError("has no path", where=where, code="F07")
    hashes = [digest(h, f"hash {i} of its path", where) for i, h in enumerate(path[:64])]
    if len(path) > 64 or merkle.identity_by(leaf.hash(name), index, count, hashes) != wanted:
        raise TensorkeepError(
            f"{name} with these bytes is not proven to be part of {wanted.hex()}: the hashes lead elsewhere",
            where=where,
            code="F03",
            hint="make the proof anew from a model that you trust: tensorkeep prove",
        )
    return wanted.hex(), name, leaf


def check_tensor(view: StateView, name: str, leaf: Leaf) -> bool:
    """Tell whether a checkpoint's tensor is the one of a proof; no other tensor is read.

    Args:
        view: the checkpoint.
        name: the tensor's hf name.
        leaf: from `check_proof`.
    """
    return leaf_of(canonical_tensors(view), name) == leaf


def read_proof(path: str | Path) -> dict[str, Any] | None:
    """Read a file as an inclusion proof.

    Args:
        path: the file.

    Returns:
        The proof, not yet checked; None where the file is something else.
    """
    place = Path(path)
    if place.suffix != ".json" or not place.is_file():
        return None
    document = parse_json(read_small(place, _LARGEST), place)
    return document if isinstance(document, dict) and document.get("kind") == KIND else None


def digest(value: Any, what: str, where: object) -> bytes:
    """Return a SHA-256 from its 64 hex digits.

    Args:
        value: from an untrusted file or the command line.
        what: what it is, for messages.
        where: the file, for messages.

    Raises:
        TensorkeepError: F07 where it is anything else, a hash of another length for one.
    """
    if isinstance(value, str) and len(value) == 2 * merkle.SIZE:
        try:
            return bytes.fromhex(value) if value == value.lower() and value.isalnum() else _no_digest(value)
        except ValueError:
            pass
    long = f" of {len(value)} digits" if isinstance(value, str) else ""
    raise TensorkeepError(f"{what} is {shown(value)}{long}, not 64 hex digits", where=where, code="F07")


def _no_digest(value: str) -> bytes:
    raise ValueError(value)


def read_leaf(entry: Any, where: object) -> tuple[str, Leaf]:
    """Return a tensor's name and leaf from the entry of a proof or statement.

    Args:
        entry: as `Leaf.to_json` makes it; from an untrusted file.
        where: the file, for messages.

    Raises:
        TensorkeepError: F07 where it is anything else.
    """
    given = entry if isinstance(entry, dict) else {}
    name, dtype, shape = given.get("name"), given.get("dtype"), given.get("shape")
    if (
        not isinstance(name, str)
        or not isinstance(dtype, str)
        or dtype not in {*DTYPES, *PASSED_BLOCKS}
        or not isinstance(shape, list)
    ):
        raise TensorkeepError(f"describes no tensor: {shown(entry)}", where=where, code="F07")
    if not all(type(side) is int and 0 <= side < 1 << 63 for side in shape):
        raise TensorkeepError(f"{shown(name)} has no shape", where=where, code="F07")
    if dtype in PASSED_BLOCKS and (not shape or shape[-1] % PASSED_BLOCKS[dtype][0]):
        raise TensorkeepError(f"{shown(name)} has no whole blocks of {dtype}", where=where, code="F07")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise TensorkeepError(f"a tensor's name is no text: {shown(name)}", where=where, code="F07")
    return name, Leaf(dtype, tuple(shape), digest(given.get("content"), f"the content of {shown(name)}", where))
