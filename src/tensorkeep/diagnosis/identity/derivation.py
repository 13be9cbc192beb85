"""What a model was made from: recorded in its statement, and checked by whoever has the sources, by making it again.

A statement names its sources by identity, so that they are found in any format, and the sources' own statements by
SHA-256, so that statements make a chain. Nothing of it is believed: sources are identified, signatures checked where
there is somebody to trust, and the model is made again from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from tensorkeep.adapters.merging import one_thread
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.identity.identify import ModelIdentity, identify
from tensorkeep.diagnosis.identity.merging import name_as_files
from tensorkeep.diagnosis.identity.parts import part_of
from tensorkeep.diagnosis.identity.planned import planned
from tensorkeep.diagnosis.identity.proofs import digest
from tensorkeep.diagnosis.identity.signing import Trust, check_signature
from tensorkeep.diagnosis.identity.statement import Statement, compare_with
from tensorkeep.diagnosis.identity.stored import Stored, find_statement
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.view import StateView
from tensorkeep.models.alignment import tied_names
from tensorkeep.models.names import names_for
from tensorkeep.storage.files import Progress
from tensorkeep.storage.record import DTYPES, PASSED_BLOCKS

# (sources, recipe, progress) -> the identity of what they make; None where it is not made here
Again = Callable[["Sequence[Source]", Mapping[str, Any], "Progress | None"], "ModelIdentity | None"]
_MADE = ("merge", "convert", "repair", "train")
_DEEPEST = 32  # links of a chain
_MOST = 64  # sources of one model


@dataclass
class Source:
    """A checkpoint that a model was made from.

    Attributes:
        path: where it is.
        role: "base", "adapter", "reference", "source" or "start".
        view: the opened checkpoint.
        model: its identity.
        stored: its own statement; None without one.
        weight: what an adapter was multiplied by.
    """

    path: str
    role: str
    view: StateView
    model: ModelIdentity
    stored: Stored | None = None
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a statement."""
        held: dict[str, Any] = {
            "role": self.role,
            "identity": self.model.identity,
            "of": "adapter" if self.model.adapter else "model",
        }
        if self.weight != 1.0:
            held["weight"] = repr(self.weight)
        if self.model.files:  # by them a check names what changed of a source that has no statement
            held |= {"parts": dict(self.model.parts), "files": dict(sorted(self.model.files.items()))}
        return held | ({"statement_sha256": self.stored.hash} if self.stored is not None else {})


def derived(made: str, sources: Sequence[Source], result: ModelIdentity, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a statement says of how its model was made.

    Args:
        made: the command: "merge", "convert", "repair" or "train".
        sources: what it was made from, the first of them the one that it is compared with.
        result: its identity.
        recipe: the command's settings that decide values.
    """
    same = sum(sources[0].model.leaves.get(n) == leaf for n, leaf in result.leaves.items())
    return {
        "made": made,
        "from": [source.to_json() for source in sources],
        "recipe": dict(recipe),
        "unchanged": same,
        "changed": len(result.leaves) - same,
    }


def source_of(view: StateView, role: str, weight: float = 1.0, progress: Progress | None = None) -> Source:
    """Identify a checkpoint that something is made from, and read the statement beside it.

    Args:
        view: the opened checkpoint.
        role: what it is to what is made.
        weight: what an adapter is multiplied by.
        progress: as of `identify`.

    Returns:
        The source.

    Raises:
        TensorkeepError: as `identify` and `find_statement`; F03 where its statement speaks of another model: then the
            tensors and files that are not the statement's are named.
    """
    model = identify(view, progress)
    stored = find_statement(view.path)
    if stored is not None:
        wrong = [f for f in compare_with(stored.statement, model, view.config).findings if f.severity == "error"]
        if wrong or stored.statement.identity != model.identity:
            what = f"speaks of {stored.statement.identity}, the checkpoint beside it is {model.identity}"
            if stored.statement.identity == model.identity:
                what = "speaks of what the checkpoint beside it is not"
            what += "".join(f"; {f.message}" for f in wrong)
            names = [name for f in wrong for name in f.tensors]
            hint = "get it again, or sign it again: tensorkeep sign"
            raise TensorkeepError(what, where=stored.statement.where, code="F03", hint=hint, tensors=names)
    return Source(view.path, role, view, model, stored, weight)


@dataclass
class Checked:
    """What a check of a derivation did.

    Attributes:
        said: sentences for people.
        links: for each model of the chain its identity, how it was made, and whether it was made again.
    """

    said: list[str] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)


def check_derivation(
    statement: Statement,
    sources: Sequence[Source],
    trust: Trust | None = None,
    progress: Progress | None = None,
    others: Mapping[str, Again] = MappingProxyType({}),
) -> Checked:
    """Check what a statement says its model was made from, and make it again.

    Args:
        statement: of the model, which was compared with it already.
        sources: every checkpoint of the chain, in any order.
        trust: who must have signed the sources' statements too; None where nobody is to be believed.
        progress: called with what is being done, the bytes done and the bytes in all.
        others: makes again what nothing here can: "repair", and "trained", codes of a quantize-aware run.

    Returns:
        What was checked, in words; what cannot be made again here is said to be so.

    Raises:
        TensorkeepError: F05 where a link of the chain is missing, F07 where it is malformed, F03 where a count, a
            statement or what is made again is not what the statement says.
    """
    link = _Chain({s.model.identity: s for s in sources}, trust, progress, {**_AGAIN, **others})
    _check(statement, link, 0)
    return link.out


@dataclass
class _Chain:
    """What every link of a chain is checked with."""

    known: Mapping[str, Source]
    trust: Trust | None
    progress: Progress | None
    again: Mapping[str, Again]
    out: Checked = field(default_factory=Checked)


def _check(statement: Statement, chain: _Chain, depth: int) -> None:
    """Check one link, then those of its sources."""
    said, where = statement.derivation, statement.where
    if said is None:
        raise TensorkeepError("does not say what its model was made from", where=where, code="F05", hint=_RECORD)
    made, recipe = said.get("made"), said.get("recipe")
    if not isinstance(made, str) or made not in _MADE or not isinstance(recipe, dict) or depth > _DEEPEST:
        raise TensorkeepError(f"says that its model was made by {shown(made)}", where=where, code="F07")
    sources = [_link(entry, chain.known, where) for entry in _entries(said, where)]
    for source, entry in zip(sources, _entries(said, where)):
        _check_statement(source, entry, chain.trust, where)
        _check_parts(source, entry, where)
    if made == "train" and any(source.role == "adapter" for source in sources):
        raise TensorkeepError("says that a training was made from an adapter", where=where, code="F07")
    base = sources[0].model
    same = sum(base.leaves.get(n) == leaf for n, leaf in statement.leaves.items())
    if [said.get("unchanged"), said.get("changed")] != [same, len(statement.leaves) - same]:
        what = f"says that {shown(said.get('unchanged'))} tensors are unchanged; {same} are"
        raise TensorkeepError(what, where=where, code="F03")
    same_again, how = _made_again(statement, made, sources, recipe, chain)
    names = " + ".join(f"{s.role} {s.model.identity[:16]} ({s.path})" for s in sources)
    chain.out.said.append(f"{made} of {names}: {how}; {same} of {len(statement.leaves)} tensors unchanged")
    link = {"identity": statement.identity, "made": made, "from": [s.to_json() for s in sources]}
    chain.out.links.append(link | {"unchanged": same, "made_again": same_again, "said": how})
    for source in sources:
        if source.stored is not None and source.stored.statement.derivation is not None:
            _check(source.stored.statement, chain, depth + 1)


def _made_again(
    statement: Statement, made: str, sources: Sequence[Source], recipe: Mapping[str, Any], chain: _Chain
) -> tuple[bool, str]:
    """Make a model again from its sources; say whether that was done and came out equal, and how, in words."""
    rounding = recipe.get("rounding")
    if made == "merge" and recipe.get("to_bits") is not None:
        rounding = rounding if isinstance(rounding, Mapping) else {}
        by = rounding.get("by")
        if by == "texts":
            return False, f"codes not made again: {_texts_said(rounding, statement.where)}"
        if by != "training":
            raise TensorkeepError(f"says that codes were rounded by {shown(by)}", where=statement.where, code="F07")
        again = chain.again["trained"](sources, recipe, chain.progress)
        return _compared(statement, again) if again is not None else (False, _NO_RUN)
    if any(leaf.dtype in PASSED_BLOCKS for leaf in statement.leaves.values()):
        return False, "not made again: it holds codes"
    again = chain.again[made](sources, recipe, chain.progress)
    if again is None:
        return False, _NOT_AGAIN
    if again.identity != statement.identity:
        odd = [n for n, leaf in statement.leaves.items() if again.leaves.get(n) != leaf]
        what = f"made again from its sources the model is {again.identity}, not {statement.identity}"
        first = f"{len(odd)} tensors differ, first {odd[0]}" if odd else "it has more tensors"
        raise TensorkeepError(what, where=statement.where, code="F03", hint=first, tensors=odd)
    return True, "made again, equal"


def _texts_said(rounding: Mapping[str, Any], where: str) -> str:
    """Say what decided codes that were rounded by texts; the texts must be named by their SHA-256."""
    texts = rounding.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, dict) for t in texts):
        raise TensorkeepError("names no texts that codes were rounded by", where=where, code="F07")
    for text in texts:
        digest(text.get("sha256"), "the hash of a text", where)
    return f"{len(texts)} texts, threads, BLAS and device decide them. Compared: the sources, and what is unchanged"


def _compared(statement: Statement, again: ModelIdentity) -> tuple[bool, str]:
    """Compare a trained model of codes with what was made again; codes alone may differ between machines."""
    odd = [n for n in {**statement.leaves, **again.leaves} if again.leaves.get(n) != statement.leaves.get(n)]
    mine, theirs = ((m.leaves[n][:2] if n in m.leaves else None for n in odd) for m in (again, statement))
    floats = [n for n in odd if n in statement.leaves and not _of_codes(n, statement.leaves[n].dtype)]
    if floats or list(mine) != list(theirs):
        what = f"made again from its sources the model is {again.identity}, not {statement.identity}"
        hint = f"{len(odd)} tensors differ, first {(floats or odd)[0]}"
        raise TensorkeepError(what, where=statement.where, code="F03", hint=hint, tensors=odd)
    if odd:
        what = f"made again, and {len(odd)} tensors of codes came out otherwise, first {odd[0]}: arithmetic of another"
        return False, f"{what} machine, or another model"
    return True, "made again, equal"


def _of_codes(name: str, dtype: str) -> bool:
    """Say whether a tensor holds codes or scales of nf4 or of blocks."""
    return dtype == "U8" or dtype in PASSED_BLOCKS or name.endswith((".absmax", ".quant_map"))


_NO_RUN = "codes not made again: for that give the run itself, --from RUN. Compared: the sources, and what is unchanged"
_RECORD = "merge, convert and repair record it with --identify or --sign-key"
_NOT_AGAIN = "not made again: tensorkeep replay RUN --steps A..B makes steps of a training again"


def _entries(said: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the sources that a derivation names."""
    given = said.get("from")
    if not isinstance(given, list) or not 0 < len(given) <= _MOST or not all(isinstance(e, dict) for e in given):
        raise TensorkeepError("names no sources", where=where, code="F07")
    return given


def _link(entry: Mapping[str, Any], known: Mapping[str, Source], where: str) -> Source:
    """Return the source that an entry names, with the role and weight that it says."""
    wanted = digest(entry.get("identity"), "the identity of a source", where).hex()
    role, weight = entry.get("role"), entry.get("weight", "1.0")
    if wanted not in known:
        given = "".join(f"; {s.path} is {name[:16]}" for name, s in list(known.items())[:8])
        what = (
            f"a link is missing: its {shown(role)[1:-1]} {wanted} is none of the {len(known)} checkpoints given{given}"
        )
        raise TensorkeepError(what, where=where, code="F05", hint="give every checkpoint of the chain: --from CKPT")
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < 1e6:
        raise TensorkeepError(f"gives the weight {shown(weight)}", where=where, code="F07")
    return replace(known[wanted], role=str(role)[:40], weight=number)


def _check_statement(source: Source, entry: Mapping[str, Any], trust: Trust | None, where: str) -> None:
    """Check the statement of a source: that it is the one which was recorded, and who signed it."""
    wanted = entry.get("statement_sha256")
    if wanted is not None:
        digest(wanted, "the hash of a source's statement", where)
        if source.stored is None:
            what = f"a link is missing: the statement of {source.path}, which its SHA-256 is recorded of"
            raise TensorkeepError(what, where=where, code="F05", hint="put its identity.json beside it")
        if source.stored.hash != wanted:
            what = f"was made from {source.path} with another statement than the one beside it"
            raise TensorkeepError(what, where=where, code="F03")
    if trust is not None and source.stored is not None:
        if source.stored.signature is None:
            raise TensorkeepError("is not signed", where=source.stored.statement.where, code="F05")
        check_signature(source.stored.data, source.stored.signature, trust, source.stored.where)


def _check_parts(source: Source, entry: Mapping[str, Any], where: str) -> None:
    """Compare config, tokenizer and so on of a source with what was recorded, as far as its format has them."""
    parts, files = ({} if entry.get(k) is None else entry[k] for k in ("parts", "files"))
    if not isinstance(parts, dict) or not isinstance(files, dict):
        raise TensorkeepError(f"names no parts of a source: {shown(parts)}, {shown(files)}", where=where, code="F07")
    odd = [kind for kind, value in source.model.parts.items() if kind in parts and parts[kind] != value]
    names = [n for n, value in source.model.files.items() if part_of(n) in odd and files.get(n) != value]
    if odd:
        what = f"was made from another {' and '.join(odd).replace('_', ' ')} than that of {source.path}"
        named = f": {', '.join(names)} changed" if names else ""
        raise TensorkeepError(what + named, where=where, code="F03", hint="get the source again", tensors=names)


# -- making it again ---------------------------------------------------------------------------------------------------


def _text(recipe: Mapping[str, Any], key: str, words: Collection[str]) -> str | None:
    """Return a setting that is one of some words, or not given."""
    value = recipe.get(key)
    if value is not None and not (isinstance(value, str) and value in words):
        raise TensorkeepError(f"the recipe's {key} is {shown(value)}", code="F07")
    return value


def _texts(recipe: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = recipe.get(key) or []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise TensorkeepError(f"the recipe's {key} is {shown(value)}", code="F07")
    return tuple(value)


def _merged(sources: Sequence[Source], recipe: Mapping[str, Any], progress: Progress | None) -> ModelIdentity:
    """Merge again, and identify what comes of it without writing it."""
    base, *adapters = sources
    opened = open_adapters([(s.view, s.weight) for s in adapters] or [(base.view, 1.0)])
    name_as_files(base.view, [s.adapter for s in opened])
    onto, dtype = _text(recipe, "onto", ("trained", "original")) or "trained", _text(recipe, "dtype", DTYPES)
    job = plan_merge(base.view, opened, onto=onto, dtype=dtype, untie=bool(recipe.get("untie")), ask=names_for)
    with one_thread():  # as a merge computes
        return identify(planned(job.plan), progress)


def _converted(sources: Sequence[Source], recipe: Mapping[str, Any], progress: Progress | None) -> ModelIdentity:
    """Convert again to hf, with the casts and losses that the recipe names."""
    dtype, drop = _text(recipe, "dtype", DTYPES), _texts(recipe, "drop")
    if dtype is None and not drop and len(sources) == 1:
        return sources[0].model
    views = [s.view for s in sources]
    prefer = _text(recipe, "prefer", ("first", "last"))
    plan = make_plan(views, "hf", dtype=dtype, drop=drop, prefer=prefer, ask=None, ties=tied_names)
    return identify(planned(plan), progress)


def _not_again(sources: Sequence[Source], recipe: Mapping[str, Any], progress: Progress | None) -> None:
    """Make nothing: a training is made again step by step, by another command."""


_AGAIN: dict[str, Again] = {"merge": _merged, "convert": _converted, "train": _not_again, "repair": _not_again}
_AGAIN["trained"] = _not_again  # no command of its own: a merge whose recipe says so
