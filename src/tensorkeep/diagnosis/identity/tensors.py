"""Bring a checkpoint's tensors into the one form that an identity is taken of: hf names, hf rows, ties once.

What cannot be brought there is said, with exit code 3: no identity is given to names that nobody vouches for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.coded_rows import refuse_moved_codes
from tensorkeep.conversion.model_names import ModelNames
from tensorkeep.conversion.plan import HfTensor, Part, Step
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.models.alignment import as_loaded, from_memory, rearranges, tied_names
from tensorkeep.models.names import as_computed, known
from tensorkeep.storage.record import PASSED_BLOCKS, nbytes

# an output head and the embedding that it may be, in files that no config lies beside
HEADS = {
    "lm_head.weight": ("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight"),
    "embed_out.weight": ("gpt_neox.embed_in.weight",),
}
_HALVES = ("F16", "BF16")
UNDECIDED = 3


@dataclass
class Canonical:
    """A checkpoint's tensors in canonical form; no data is read yet.

    Attributes:
        view: the checkpoint.
        tensors: by hf name, each with the stored rows that it is made of.
        pairs: name of a tensor that may be another's -> that other; which are is told by their bytes.
        narrow: F32 tensor -> the 16 bits that it counts in where they hold its values.
        left_out: what no identity counts, by stored name: optimizer state, computed buffers.
        adapter: whether it is an adapter, whose names are PEFT's.
        coded: whether it is a quantized GGUF, whose tensors count as they are stored, under llama.cpp's names; the
            dtype of blocks is ggml's name of their type.
    """

    view: StateView
    tensors: dict[str, HfTensor]
    pairs: dict[str, str] = field(default_factory=dict)
    narrow: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    adapter: bool = False
    coded: bool = False


def canonical_tensors(view: StateView) -> Canonical:
    """Bring a checkpoint's tensors under hf names, with rows in hf's order.

    Args:
        view: the opened checkpoint.

    Raises:
        TensorkeepError: with exit code 3 where that cannot be done: names of no known scheme, a config that is needed
            and is not there, blocks of a type that is not known here.
    """
    if any(r.encoding != "plain" for r in view.values()):
        return _coded(view)
    if view.metadata.get("over a base") and view.format != "peft":
        raise undecided(
            view, "holds an adapter beside a base", "name the run's folder, or convert it: tensorkeep convert"
        )
    if view.format == "peft":
        own = {n: HfTensor(n, r.dtype, r.shape, (Part(0, n),)) for n, r in view.items()}
        return Canonical(view, own, adapter=True)
    config = complete(view.config, view.companions) if view.config is not None else None
    naming = namings.identify(view)
    dropped: list[Step] = []
    try:
        tensors = to_hf_tensors(view, 0, naming, config, dropped)
        refuse_moved_codes([tensor.parts for tensor in tensors.values()], [view])
    except TensorkeepError as error:
        if error.code not in ("C01", "C03", "K06", "K07", "Q01"):
            raise
        raise undecided(view, error.what, error.hint, error.code) from None
    if not tensors:
        raise TensorkeepError("holds no tensor of a model", where=view.path, code="K05")
    names = None
    if not namings.renames(naming.naming):
        tensors, names = _as_files_have_them(view, config, naming.naming, tensors)
    out = Canonical(view, tensors)
    out.left_out = {p.name: s.reason for s in dropped for p in s.parts}
    made = names.computed if names is not None else ()
    for name in [n for n, t in tensors.items() if n in made or (names is not None and as_computed(names, t, [view]))]:
        out.left_out |= {p.name: "a buffer that the model computes from its config" for p in tensors.pop(name).parts}
    if not tensors:
        raise TensorkeepError("holds no tensor of a model", where=view.path, code="K05")
    _tie(out, config)
    out.narrow = _narrowed(tensors, out.pairs)
    return out


def _coded(view: StateView) -> Canonical:
    """Return a quantized GGUF's tensors as they are stored; an identity of codes is another than that of any floats."""
    strange = Counter(r.encoding for r in view.values() if r.encoding not in ("plain", *PASSED_BLOCKS))
    strange += Counter(r.encoding for r in view.values() if r.encoding != "plain" and not r.blocks)
    if strange:
        what = f"{strange.total()} tensors are blocks of {', '.join(sorted(strange))}, which are not known as they lie"
        raise undecided(view, what, "its values have one: tensorkeep convert SRC OUT --to hf --dtype bf16")
    dtypes = {n: r.dtype if r.encoding == "plain" else r.encoding for n, r in view.items()}
    own = {n: HfTensor(n, dtypes[n], r.shape, (Part(0, n),)) for n, r in view.items()}
    return Canonical(view, own, coded=True)


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor that an identity counts, of blocks too.

    Args:
        dtype: safetensors' name, or ggml's of a type of blocks.
        shape: of the tensor.
    """
    if dtype not in PASSED_BLOCKS:
        return nbytes(dtype, tuple(shape))
    elements, size = PASSED_BLOCKS[dtype]
    return math.prod(shape) // elements * size


def _as_files_have_them(
    view: StateView, config: Mapping[str, Any] | None, naming: str | None, tensors: dict[str, HfTensor]
) -> tuple[dict[str, HfTensor], ModelNames | None]:
    """Return tensors under the names that transformers' files have, and what transformers says of them, if asked."""
    kind = (config or {}).get("model_type")
    stacked = [n for n, t in tensors.items() if ".experts." in n and len(t.shape) > 2]
    if naming is None and kind is None:
        what = f"its names are of no known scheme, e.g. {next(iter(tensors))}"
        raise undecided(view, what, "a config.json beside it says which model this is: --config DIR_OR_FILE", "K06")
    if kind is None and stacked:
        what = f"{grouped(stacked)[0]} is a stack of experts, and no config says how files have it"
        raise undecided(view, what, "give its config: --config DIR_OR_FILE", "C03")
    if not rearranges(config):
        return tensors, None
    names = known(config, sum(r.nbytes for r in view.values()))
    if names is None or (names.problem and not _as_in_file(names, tensors)):
        if _single_matrices(tensors) and naming is not None:
            return tensors, None  # names of files, and nothing in them that memory would have otherwise
        why = names.problem if names is not None else f"transformers cannot say how files of {kind!r} name it"
        raise undecided(view, why, "pip install 'tensorkeep[language]'", "K06")
    for translated in (from_memory, as_loaded):
        tensors = translated(config, tensors, (view,))
    strange = [n for n in tensors if n in names.live and n not in names.file and n not in names.tied]
    if strange:
        what = f"{grouped(strange)[0]} is a name of memory that could not be brought under the names of files"
        raise undecided(view, what, None, "K06")
    return tensors, names


def _as_in_file(names: ModelNames, tensors: Mapping[str, HfTensor]) -> bool:
    return all(n in names.file or n in names.tied for n in tensors)


def _single_matrices(tensors: Mapping[str, HfTensor]) -> bool:
    return not any(".experts." in n for n in tensors)


def _tie(out: Canonical, config: Mapping[str, Any] | None) -> None:
    """Note which tensors may be another's; one whose partner is not there takes its name."""
    tensors = out.tensors
    pairs = {n: e for n, others in HEADS.items() for e in others if n in tensors and e in tensors}
    for name, tensor in tensors.items():
        if tensor.tied_to in tensors and tensor.tied_to is not None and pairs.get(tensor.tied_to) != name:
            pairs.setdefault(name, tensor.tied_to)
    said = tied_names(config, tensors)
    for name, source in said.items():
        if name in tensors and source not in tensors and source not in said:
            tensors[source] = replace(tensors.pop(name), name=source, tied_to=None)
        elif name in tensors and source in tensors:
            pairs.pop(source, None)
            pairs[name] = source
    out.pairs = {n: e for n, e in pairs.items() if n in tensors and e in tensors and n != e}


def _narrowed(tensors: Mapping[str, HfTensor], pairs: Mapping[str, str]) -> dict[str, str]:
    """Return what F32 tensors beside weights of 16 bits count in, where it holds their values.

    GGUF stores vectors and routers as F32 whatever the model's dtype is, and what is converted from it keeps them so.
    """
    elements = Counter[str]()
    for name, tensor in tensors.items():
        elements[tensor.dtype] += math.prod(tensor.shape) if name not in pairs else 0  # a tie is stored once or twice
    halves = [d for d in _HALVES if elements[d]]
    if len(halves) != 1 or elements["F32"] >= elements[halves[0]]:
        return {}
    return {n: halves[0] for n, t in tensors.items() if t.dtype == "F32"}


def undecided(view: StateView, what: str, hint: str | None, code: str | None = None) -> TensorkeepError:
    """Return the error for a checkpoint that no identity can be given to.

    Args:
        view: the checkpoint.
        what: why, as the rest of a sentence.
        hint: what to do.
        code: the finding code that applies.
    """
    return TensorkeepError(f"no identity: {what}", where=view.path, hint=hint, code=code, exit_code=UNDECIDED)
