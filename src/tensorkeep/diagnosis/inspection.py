"""Describe what a checkpoint holds, as a document for programs and as lines for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tensorkeep.conversion.naming import Identity
from tensorkeep.formats.layouts import surroundings
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.output import size
from tensorkeep.quantization.stored import find_quantized
from tensorkeep.quantization.stored import members as parts_of
from tensorkeep.storage.archive import saved_value, zip_entries
from tensorkeep.storage.files import Progress
from tensorkeep.storage.record import TensorRecord
from tensorkeep.storage.spreading import in_threads


def digests(view: StateView, names: Sequence[str], progress: Progress) -> dict[str, str]:
    """Return the xxh3_128 digest of each tensor's raw bytes, as hexadecimal.

    Args:
        view: The checkpoint.
        names: Stored names.
        progress: Called with "digest", the bytes done and the bytes in all.

    Raises:
        TensorkeepError: Where a file is damaged.
    """
    total, done, out = sum(view[n].nbytes for n in names), 0, {}
    for name, digest in zip(names, in_threads(view.digest, names, lambda n: view[n].nbytes)):
        out[name] = digest
        done += view[name].nbytes
        progress("digest", done, total)
    return out


def document(view: StateView, identity: Identity, names: Sequence[str], found: dict[str, str]) -> dict[str, Any]:
    """Return the document of `tensorkeep inspect --json`, without its schema number.

    Args:
        view: The checkpoint.
        identity: Its naming, root and wrappers.
        names: The stored names to list.
        found: Digests by stored name, where they were asked for.
    """
    tensors = []
    for name in names:
        record = view[name]
        entry = {
            "name": name,
            "dtype": record.dtype,
            "shape": list(record.shape),
            "bytes": record.nbytes,
            "file": record.file,
            "tied_to": record.tied_to,
        }
        tensors.append(entry | ({"xxh3_128": found[name]} if name in found else {}))
    return {
        "path": view.path,
        "format": view.format,
        "naming": identity.naming,
        "root": identity.root,
        "wrappers": list(identity.wrappers),
        "tensors": tensors,
        "parameters": parameters(view, identity),
        "bytes": sum(r.nbytes for r in _own(view)),
        "quantized": quantized(view),
        "adapter": view.metadata.get("adapter"),
        "run": _run_state(view),
        "folder": _folder(view),
        "opaque": sorted(view.metadata.get("opaque", ())),
        "notes": [{"code": n.code, "message": n.message, "tensors": list(n.names)} for n in view.notes],
    }


def _folder(view: StateView) -> dict[str, Any] | None:
    """Return which part of a folder was read, how, who writes such folders, and what lies beside."""
    found = surroundings(view)
    part = {
        "read": view.metadata.get("taken"),
        "how": view.metadata.get("about"),
        "writers": list(view.metadata.get("writers", ())),
        "beside": [{"name": entry.name, "what": entry.what} for entry in found],
    }
    return part if any(part.values()) else None


def _folder_lines(view: StateView) -> list[str]:
    """Say for people which part of a folder was read, and what lies beside."""
    part = _folder(view)
    if part is None:
        return []
    by = f" (as {' in '.join(reversed(part['writers']))} writes it)" if part["writers"] else ""
    lines = [f"read: {part['read']}{by}"] if part["read"] else []
    lines += [f"how: {part['how']}"] if part["how"] else []
    kinds: dict[str, list[str]] = {}
    for entry in part["beside"]:
        kinds.setdefault(entry["what"], []).append(entry["name"])
    beside = [f"{what} ({_some(names)})" for what, names in kinds.items()]
    return lines + ([f"beside it: {', '.join(beside)}"] if beside else [])


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _own(view: StateView) -> list[TensorRecord]:
    """Return the records that hold bytes of their own: a tied tensor is counted once."""
    return [r for r in view.values() if r.tied_to is None]


def parameters(view: StateView, identity: Identity) -> int:
    """Count the parameters of the model: tied ones once, quantized weights unpacked, no scales, no training state."""
    weights = find_quantized(view, identity.names)
    beside = parts_of(weights)
    return sum(
        weights[n].elements if n in weights and weights[n].shape is not None else view[n].elements
        for n in identity.names
        if view[n].tied_to is None and n not in beside
    )


def quantized(view: StateView) -> list[dict[str, Any]]:
    """List the quantized weights: GGUF blocks, bitsandbytes, fp8 and int8, also those whose scales are missing."""
    out: list[dict[str, Any]] = [{"name": n, "kind": r.encoding} for n, r in view.items() if r.encoding != "plain"]
    for weight in find_quantized(view).values():
        entry: dict[str, Any] = {
            "name": weight.name,
            "kind": weight.kind,
            "shape": list(weight.shape) if weight.shape is not None else None,
        }
        out.append(
            entry | ({"problems": [f"{p.code} {p.message}" for p in weight.problems]} if weight.problems else {})
        )
    return out


# where training programs keep these numbers: MiniMind and torch.save files, torchtitan's DCP
_RUN_NAMES = {
    "step": ("step", "train_state.step", "global_step", "iteration"),
    "epoch": ("epoch",),
    "samples": ("samples",),
    "world_size": ("world_size", "dataloader.world_size"),
}


def _run_state(view: StateView) -> dict[str, int | None] | None:
    """Return step, epoch, samples and world size where the checkpoint holds them as plain numbers; else None."""
    if "run" in view.metadata:
        return {field: view.metadata["run"].get(field) for field in _RUN_NAMES}
    found = {
        field: next((v for n in names if (v := _whole(view, n)) is not None), None)
        for field, names in _RUN_NAMES.items()
    }
    return found if any(v is not None for v in found.values()) else None


def _whole(view: StateView, name: str) -> int | None:
    """Return an entry that is a whole number, or None. DCP keeps each as an archive, read here without running it."""
    value = view.entries.get(name)
    if view.format == "dcp" and isinstance(value, tuple):
        file, start, length = value
        value = saved_value(view.folder, file, zip_entries(view.folder, file, start, length), set())
    return value if type(value) is int else None


def summary(view: StateView, identity: Identity) -> list[str]:
    """Return the lines at the head of `tensorkeep inspect`.

    Args:
        view: The checkpoint.
        identity: Its naming, root and wrappers.
    """
    naming = identity.naming or "not a known scheme"
    root = f", nested under {identity.root}" if identity.root else ""
    wrappers = f", wrapped in {' '.join(identity.wrappers)}" if identity.wrappers else ""
    lines = [
        f"{view.path}",
        f"format {view.format}, naming {naming}{root}{wrappers}",
        f"{len(view)} tensors, {parameters(view, identity):,} parameters, {size(sum(r.nbytes for r in _own(view)))}",
    ]
    other: dict[str, int] = {}
    for reason in identity.other.values():
        other[reason] = other.get(reason, 0) + 1
    lines += [f"{count} tensors of {reason}" for reason, count in other.items()]
    lines += _folder_lines(view)
    if opaque := sorted(view.metadata.get("opaque", ())):
        lines.append(f"objects that stay opaque, never imported: {_some(opaque, 6)}")
    kinds = sorted({q["kind"] for q in quantized(view)})
    if kinds:
        lines.append(f"{len(quantized(view))} quantized weights: {', '.join(kinds)}")
    adapter = view.metadata.get("adapter")
    if adapter:
        lines.append(
            f"adapter {adapter.get('peft_type')}: r {adapter.get('r')}, alpha {adapter.get('lora_alpha')}, "
            f"base {adapter.get('base_model_name_or_path')}"
        )
    state = _run_state(view)
    if state:
        lines.append(", ".join(f"{k} {v}" for k, v in state.items() if v is not None))
    return lines


def rows(view: StateView, names: Sequence[str], found: dict[str, str], gathered: bool) -> list[tuple[object, ...]]:
    """Return the rows of the table of `tensorkeep inspect`: name, dtype, shape, size, file and perhaps digest.

    Args:
        view: The checkpoint.
        names: The stored names to list.
        found: Digests by stored name, where they were asked for.
        gathered: Put layers that look alike into one row.
    """
    if not gathered:
        return [
            (n + _shared(r), r.dtype, list(r.shape), size(r.nbytes), r.file, *([found[n]] if found else []))
            for n in names
            for r in (view[n],)
        ]
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        record = view[name]
        shape = re.sub(r"\d+", "#", name)
        groups.setdefault((shape, record.dtype, record.shape, record.tied_to), []).append(name)
    out: list[tuple[object, ...]] = []
    for alike in groups.values():
        records = [view[n] for n in alike]
        label = ", ".join(grouped(alike)) + _shared(records[0])
        files = sorted({r.file for r in records})
        where = files[0] if len(files) == 1 else f"{len(files)} files"
        out.append((label, records[0].dtype, list(records[0].shape), size(sum(r.nbytes for r in records)), where))
    return out


def _shared(record: TensorRecord) -> str:
    """Return " = NAME" for a tensor that shares the bytes of another."""
    return f" = {record.tied_to}" if record.tied_to else ""
