"""Identify a model: one hash of its tensors, whatever the format, made by streaming with all cores at work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.evidence.bytewise import hf_bytes
from tensorkeep.diagnosis.identity.parts import FILES, canonical_parts
from tensorkeep.diagnosis.identity.tensors import Canonical, canonical_tensors, stored_bytes
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView, read
from tensorkeep.models.alignment import tied_names
from tensorkeep.storage import merkle
from tensorkeep.storage.files import CERTIFICATE, LocalFolder, Progress, refuse_changed
from tensorkeep.storage.record import DTYPES, PASSED_BLOCKS
from tensorkeep.storage.spreading import in_threads

_PIECE = 1 << 20  # bytes read at a time: they are hashed while they are in the core's cache


class Leaf(NamedTuple):
    """What an identity takes of one tensor.

    Attributes:
        dtype: as safetensors spells it; of a GGUF's blocks as ggml does.
        shape: its sizes.
        content: the hash of its bytes, from `merkle.content_hash`.
    """

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def hash(self, name: str) -> bytes:
        """Return the leaf in the model's tree.

        Args:
            name: the tensor's hf name.
        """
        return merkle.tensor_leaf(name, self.dtype, self.shape, self.content)

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the entry of statements and proofs.

        Args:
            name: the tensor's hf name.
        """
        return {"name": name, "dtype": self.dtype, "shape": list(self.shape), "content": self.content.hex()}


# index of shards -> the file that is loaded before it
_INDEXES = {"model.safetensors.index.json": "model.safetensors", "pytorch_model.bin.index.json": "pytorch_model.bin"}
_OWN = (CERTIFICATE, "identity.json", "identity.sig")  # what is written beside a checkpoint here
_TOOLS = (".git", ".cache", "__pycache__")  # folders of git, of the Hub's client, and of Python, which no loader reads
_MOST_CODE = 16 << 20  # bytes of a Python file


@dataclass
class ModelIdentity:
    """The identity of a model, and all that it was taken of.

    Attributes:
        path: what was identified.
        leaves: by hf name, in the order of the names' UTF-8 bytes.
        parts: hash of the config, tokenizer and so on, as far as they are there, in hex.
        texts: their canonical bytes.
        files: SHA-256 of each file that they are in, in hex.
        beside: other files and folders of the folder, which nothing is said of.
        instead: those of them that transformers would load weights from, instead of these or on top of them.
        tied: name that shares another's tensor -> that other.
        apart: those of them that the config does not tie: without its own copy such a tensor would be a random one.
        left_out: what does not count, by stored name.
        not_in_config: keys of a GGUF's metadata that say something of its architecture and no config is made of.
        narrowed: tensors that count in a narrower dtype than their file could store, their values being the same.
        format: of the checkpoint.
        nbytes: of all its tensors that count.
        adapter: whether it is an adapter.
        coded: whether it is an identity of codes: of a quantized GGUF, as it is stored.
    """

    path: str
    leaves: dict[str, Leaf]
    parts: dict[str, str] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    instead: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_in_config: list[str] = field(default_factory=list)
    narrowed: list[str] = field(default_factory=list)
    format: str = ""
    nbytes: int = 0
    adapter: bool = False
    coded: bool = False

    @property
    def of(self) -> str:
        """What it is an identity of: "model", "adapter" or "codes"."""
        return "adapter" if self.adapter else "codes" if self.coded else "model"

    @property
    def hashes(self) -> list[bytes]:
        """The leaves of the tree, in order."""
        return [leaf.hash(name) for name, leaf in self.leaves.items()]

    @property
    def identity(self) -> str:
        """The identity: 64 hex digits."""
        return merkle.identity(self.hashes).hex()

    def to_json(self) -> dict[str, Any]:
        """Return the document of `tensorkeep identify --json`, without its schema."""
        return {
            "path": self.path,
            "identity": self.identity,
            "of": self.of,
            "format": self.format,
            "tensors": len(self.leaves),
            "bytes": self.nbytes,
            "parts": dict(self.parts),
            "tied": dict(self.tied),
            "narrowed": len(self.narrowed),
            "left_out": len(self.left_out),
        }


def identify(checkpoint: StateView | str | Path, progress: Progress | None = None) -> ModelIdentity:
    """Return a model's identity: equal for every format, naming and sharding of the same tensors.

    Args:
        checkpoint: an opened checkpoint, or its path.
        progress: called with "identify", the bytes done and the bytes in all.

    Returns:
        The identity, with the leaf of every tensor and the hashes of config, tokenizer and chat template.

    Raises:
        TensorkeepError: with exit code 3 where its tensors cannot be brought under hf names; F codes where a file is
            damaged or changed while it was read.

    Example:
        >>> identify("model").identity == identify("model.gguf").identity      # doctest: +SKIP
        True
    """
    view = checkpoint if isinstance(checkpoint, StateView) else read(checkpoint)
    canonical = canonical_tensors(view)
    leaves = _leaves(canonical, progress)
    refuse_changed(view.folder)
    tied = _told_by_bytes(canonical, leaves)
    out = ModelIdentity(view.path, {n: leaves[n] for n in sorted(leaves, key=str.encode) if n not in tied}, tied=tied)
    if view.format != "gguf":  # there config and tokenizer are made of the metadata, and no file holds them
        code = _code(view)
        out.texts = canonical_parts(view.companions, code)
        out.parts = {kind: merkle.part_leaf(kind, text).hex() for kind, text in out.texts.items()}
        out.files = {c.name: hashlib.sha256(c.data).hexdigest() for c in view.companions if c.name in FILES} | code
        out.beside, out.instead = _beside(view, out.files)
    if view.config is not None and view.format != "gguf":
        together = tied_names(view.config, {*leaves})
        out.apart = {n: e for n, e in tied.items() if together.get(n, n) != e and together.get(e, e) != n}
    out.left_out, out.format, out.adapter = canonical.left_out, view.format, canonical.adapter
    out.coded, out.not_in_config = canonical.coded, list(view.metadata.get("not_in_config", ()))
    out.narrowed = [n for n in out.leaves if out.leaves[n].dtype != canonical.tensors[n].dtype]
    out.nbytes = sum(stored_bytes(leaf.dtype, leaf.shape) for leaf in out.leaves.values())
    return out


def _code(view: StateView) -> dict[str, str]:
    """Return the hashes of a model folder's Python files."""
    code = {}
    for name in (n for n in _names(view) if n.endswith(".py")):
        if view.folder.size(name) > _MOST_CODE:
            raise TensorkeepError(f"{name} is too large for code", where=view.path, code="F07")
        code[name] = hashlib.sha256(view.folder.read(name)).hexdigest()
    return code


def _names(view: StateView) -> list[str]:
    """Return the files of a folder that transformers or PEFT would load; none of another format."""
    names = [] if view.folder is None else view.folder.names()
    fits = view.format in ("hf", "peft") and {"config.json", "adapter_config.json"} & set(names)
    return names if fits else []


def _bare(view: StateView) -> list[str]:
    """Return the files of a model's own folder that has no config, such as one that it was taken out of."""
    own = view.format == "hf" and isinstance(view.folder, LocalFolder) and Path(view.path).is_dir()
    return view.folder.names() if own else []


def _beside(view: StateView, files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return what lies beside a model and is in no hash, and what of it transformers would load in its place."""
    names = _names(view) or _bare(view)
    data = {block.file for record in view.records.values() for block in record.blocks}
    ends = {n: Path(single).suffix for n, single in _INDEXES.items() if single not in data}
    index = {n for n, end in ends.items() if any(d.endswith(end) for d in data)}
    rest = [n for n in names if n not in {*data, *index, *_OWN, *files}]
    if view.format == "hf":
        instead = [n for n in ("model.safetensors", "adapter_config.json") if n in rest]
        safe = [n for n in ("model.safetensors.index.json",) if n in rest and not any(_safe(d) for d in data)]
        return [*rest, *_folders(view)], [*instead, *safe]
    return [*rest, *_folders(view)], []


def _safe(name: str) -> bool:
    return name.endswith(".safetensors")


def _folders(view: StateView) -> list[str]:
    """Return the folders inside a local folder that a loader may look into: templates and modules lie in some."""
    if not (_names(view) or _bare(view)) or not isinstance(view.folder, LocalFolder):
        return []
    found = (p.name for p in view.folder.path.iterdir() if p.is_dir())
    return sorted(f"{name}/" for name in found if name not in _TOOLS)


def leaf_of(canonical: Canonical, name: str) -> Leaf:
    """Return the leaf of one tensor, for which no other is read.

    Args:
        canonical: from `canonical_tensors`.
        name: its hf name, or a name that shares its tensor.

    Raises:
        TensorkeepError: no tensor has that name.
    """
    if name not in canonical.tensors:
        raise TensorkeepError(f"has no tensor {name!r} under hf names", where=canonical.view.path, code="K01")
    jobs = list(_jobs(canonical, [name]))
    done = list(in_threads(lambda job: _chunks(canonical, job), jobs, lambda job: job.nbytes))
    return _joined(canonical, name, done)


class _Job(NamedTuple):
    """Chunks of one tensor that one thread hashes: elements from `first` to `last`, or all of it."""

    name: str
    nbytes: int
    first: int | None = None
    last: int = 0


def _leaves(canonical: Canonical, progress: Progress | None) -> dict[str, Leaf]:
    """Hash every tensor, chunk by chunk, in threads."""
    jobs = list(_jobs(canonical, list(canonical.tensors)))
    total, done = sum(job.nbytes for job in jobs), 0
    found: dict[str, list[tuple[str, list[bytes]]]] = {}
    for job, made in zip(jobs, in_threads(lambda job: _chunks(canonical, job), jobs, lambda job: job.nbytes)):
        found.setdefault(job.name, []).append(made)
        done += job.nbytes
        if progress:
            progress("identify", done, total)
    return {name: _joined(canonical, name, made) for name, made in found.items()}


def _joined(canonical: Canonical, name: str, made: list[tuple[str, list[bytes]]]) -> Leaf:
    tensor = canonical.tensors[name]
    chunks = [chunk for _, own in made for chunk in own]
    return Leaf(made[0][0], tuple(tensor.shape), merkle.content_hash(chunks))


def _jobs(canonical: Canonical, names: list[str]) -> Iterator[_Job]:
    """Yield what one thread is to hash: a chunk where a tensor can be read from any element on, else all of it."""
    for name in names:
        tensor = canonical.tensors[name]
        size = stored_bytes(tensor.dtype, tensor.shape)
        bits = 0 if tensor.dtype in PASSED_BLOCKS else DTYPES[tensor.dtype].bits
        if (
            not bits
            or size <= merkle.CHUNK
            or bits % 8
            or name in canonical.narrow
            or not _in_order(canonical.view, tensor)
        ):
            yield _Job(name, size)
            continue
        step, width = merkle.CHUNK * 8 // bits, bits // 8
        count = size // width
        for first in range(0, count, step):
            last = min(first + step, count)
            yield _Job(name, (last - first) * width, first, last)


def _in_order(view: StateView, tensor: HfTensor) -> bool:
    """Say whether a tensor is one stored one as it lies, whose bytes can be read from any element on."""
    part = tensor.parts[0]
    whole = len(tensor.parts) == 1 and part.plain and part.rows is None and part.inner is None
    return whole and type(view) is StateView and view.spans(part.name) is not None


def _chunks(canonical: Canonical, job: _Job) -> tuple[str, list[bytes]]:
    """Return a tensor's dtype and the hashes of the chunks that a job asks for."""
    tensor, view = canonical.tensors[job.name], canonical.view
    if tensor.dtype in PASSED_BLOCKS:
        return tensor.dtype, _hashed(_blocks(view, job.name))
    if job.first is not None:
        state = merkle.chunk_hasher()
        for piece in view.elements(tensor.parts[0].name, job.first, job.last, chunk=_PIECE):
            state.update(piece)
        return tensor.dtype, [state.digest()]
    if job.name in canonical.narrow:
        dtype = canonical.narrow[job.name]
        try:
            return dtype, _hashed(_narrowed(hf_bytes(tensor, [view]), tensor.dtype, dtype))
        except _DoesNotFit:
            pass
    return tensor.dtype, _hashed(hf_bytes(tensor, [view]))


def _blocks(view: StateView, name: str) -> Iterator[memoryview]:
    """Yield a tensor's blocks as they lie in the file."""
    for block in view[name].blocks:
        for at in range(0, block.nbytes, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, block.nbytes - at)))
            view.folder.read_into(block.file, block.start + at, piece)
            yield piece


class _DoesNotFit(Exception):
    """A value changes in the narrower dtype."""


def _narrowed(stream: Iterator[memoryview], dtype: str, narrow: str) -> Iterator[memoryview]:
    """Yield values in a narrower dtype; raise at the first that it does not hold bit for bit."""
    for piece in stream:
        values = np.frombuffer(piece, np_dtype(dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            made = values.astype(np_dtype(narrow))
            if made.astype(np_dtype(dtype)).tobytes() != bytes(piece):
                raise _DoesNotFit
        yield made.view(np.uint8).reshape(-1).data


def _hashed(stream: Iterator[memoryview]) -> list[bytes]:
    """Return the hashes of a stream's chunks of 16 MiB, wherever its pieces end."""
    out: list[bytes] = []
    state, room = merkle.chunk_hasher(), merkle.CHUNK
    for piece in stream:
        while len(piece):
            taken = piece[:room]
            state.update(taken)
            room -= len(taken)
            piece = piece[len(taken) :]
            if not room:
                out.append(state.digest())
                state, room = merkle.chunk_hasher(), merkle.CHUNK
    return out if room == merkle.CHUNK else [*out, state.digest()]


def _told_by_bytes(canonical: Canonical, leaves: dict[str, Leaf]) -> dict[str, str]:
    """Return which tensors are another's: of the pairs that may be, those with the same dtype, shape and bytes."""
    return {name: other for name, other in canonical.pairs.items() if leaves[name] == leaves[other]}
