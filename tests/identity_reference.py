"""The identity as docs/reference/identity.md says it, written a second time: what the vectors are checked with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent / "data" / "identity" / "vectors.json"


def fields(*given: bytes) -> bytes:
    return b"".join(len(f).to_bytes(8, "little") + f for f in given)


def hashed(first: int, data: bytes) -> bytes:
    return hashlib.sha256(bytes([first]) + data).digest()


def tree(leaves: Sequence[bytes], node: int) -> bytes:
    """RFC 6962, section 2.1, with the page's bytes before nodes."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while left * 2 < len(leaves):
        left *= 2
    return hashed(node, tree(leaves[:left], node) + tree(leaves[left:], node))


def content(data: bytes, chunk: int = 16 << 20) -> bytes:
    return tree([hashed(2, data[at : at + chunk]) for at in range(0, len(data), chunk)], 3)


def leaf(name: str, dtype: str, shape: Iterable[int], data: bytes) -> bytes:
    sides = b"".join(s.to_bytes(8, "little") for s in shape)
    return hashed(0, fields(b"tensor", name.encode(), dtype.encode(), sides, content(data)))


def identity(tensors: dict[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    leaves = [leaf(n, *tensors[n]) for n in sorted(tensors, key=lambda n: n.encode())]
    return hashed(4, fields(b"tensorkeep identity 1", len(leaves).to_bytes(8, "little"), tree(leaves, 1)))


def part(kind: str, text: bytes) -> bytes:
    return hashed(0, fields(b"part", kind.encode(), text))


MODELS: list[dict[str, Any]] = [
    {},
    {"a.weight": ("F32", [2, 2], "0000803f000000400000404000008040")},
    {"b": ("BF16", [3], "803f00404040"), "a": ("I64", [], "0100000000000000"), "ü": ("F16", [0, 4], "")},
    {f"layers.{n}.w": ("U8", [n + 1], "07" * (n + 1)) for n in range(11)},
    {"blk.0.attn_q.weight": ("Q4_0", [2, 32], "003c" + "78" * 16 + "00bc" + "01" * 16), "t": ("F32", [1], "0000803f")},
    {"large": ("U8", [(16 << 20) + 5], {"repeat": "a5", "times": (16 << 20) + 5})},
]
PARTS = [
    ("config", {"model_type": "llama", "rms_norm_eps": 1e-05, "hidden_size": 8, "rope_theta": 10000.0, "x": None}),
    ("chat_template", {"default": "{{ 'é\u2028' }}\n"}),
    ("tokenizer", {"tokenizer_config.json": {"model_max_length": int(1e30), "b": [True, -0.0, 1e21]}}),
]


def bytes_of(given: Any) -> bytes:
    return bytes.fromhex(given) if isinstance(given, str) else bytes.fromhex(given["repeat"]) * given["times"]


def vectors() -> dict[str, Any]:
    """What the file of vectors holds, made from the page's rules alone."""
    import rfc8785

    def plain(value: Any) -> Any:  # what RFC 8785 leaves open: whole numbers that no double holds
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return float(value) if type(value) is int and abs(value) > 1 << 53 else value

    models = []
    for model in MODELS:
        given = {n: (d, s, bytes_of(b)) for n, (d, s, b) in model.items()}
        tensors = [
            {"name": n, "dtype": d, "shape": s, "bytes": b, "content": content(bytes_of(b)).hex()}
            | {"leaf": leaf(n, d, s, bytes_of(b)).hex()}
            for n, (d, s, b) in model.items()
        ]
        models.append({"tensors": tensors, "identity": identity(given).hex()})
    parts = []
    for kind, document in PARTS:
        counted = {k: v for k, v in document.items() if v is not None}
        if "rope_theta" in counted:
            counted["rope_parameters"] = {"rope_type": "default", "rope_theta": counted.pop("rope_theta")}
        text = rfc8785.dumps(plain(counted))
        entry = {"kind": kind, "document": document, "canonical": text.decode(), "hash": part(kind, text).hex()}
        parts.append(entry)
    return {"models": models, "parts": parts}


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
