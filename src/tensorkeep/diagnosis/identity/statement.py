"""A statement: what a model's identity was taken of, as an in-toto statement that can be signed.

It names every tensor with its hash, config and tokenizer with theirs, and what the model was made from. A checkpoint in
any format is compared with it tensor by tensor, so that what was changed is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorkeep.diagnosis.evidence.config_fields import differences
from tensorkeep.diagnosis.identity.identify import Leaf, ModelIdentity
from tensorkeep.diagnosis.identity.parts import KINDS, not_counted, part_of, without_nulls
from tensorkeep.diagnosis.identity.proofs import digest, read_leaf
from tensorkeep.diagnosis.identity.tensors import stored_bytes
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.findings import Finding, counted
from tensorkeep.formats.names import grouped
from tensorkeep.storage import merkle
from tensorkeep.storage.canonical_json import canonical
from tensorkeep.storage.certificate import dump, parse_json

TYPE = "https://in-toto.io/Statement/v1"
PREDICATE = "https://github.com/tensorkeep/tensorkeep/identity/v1"
DIGEST = "tensorkeepIdentityV1"
LARGEST = 1 << 28  # bytes of a statement; 200 000 tensors have 60 MB
STATEMENT, SIGNATURE = "identity.json", "identity.sig"
_ABSENT = object()
_ALIKE = 100  # where less than one byte in so many is the statement's, it is another model's: gains may be all ones


@dataclass
class Statement:
    """A statement whose identity is that of the tensors it lists.

    Attributes:
        identity: 64 hex digits.
        leaves: by hf name, sorted.
        name: what its author calls the model.
        of: "model" or "adapter".
        parts: hash by kind.
        files: SHA-256 by file name.
        config: what counts of the config; None without one.
        nulls: whether nulls of NULL_COUNTS count in the config; versions before 0.3 left all nulls out.
        apart: name -> tensor with the same bytes, where the config does not tie them; None of versions before 0.3.
        derivation: what the model was made from, as it says itself; None where it says nothing.
        where: the file, for messages.
    """

    identity: str
    leaves: dict[str, Leaf]
    name: str = ""
    of: str = "model"
    parts: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    nulls: bool = False
    apart: dict[str, str] | None = None
    derivation: dict[str, Any] | None = None
    where: str = STATEMENT


def state(model: ModelIdentity, name: str, derivation: Mapping[str, Any] | None = None) -> bytes:
    """Return the statement of a model's identity.

    Args:
        model: from `identify`.
        name: what the model is called in it.
        derivation: what it was made from, from `derivation.derived`; None to say nothing.

    Returns:
        An in-toto statement as JSON in UTF-8; equal models give equal statements.
    """
    config = parse_json(model.texts["config"], "config.json") if "config" in model.texts else None
    predicate: dict[str, Any] = {
        "schema": 1,
        "of": model.of,
        "parts": dict(model.parts),
        "files": dict(sorted(model.files.items())),
        "config": config,
        "nulls": True,  # as they count in NULL_COUNTS
        "apart": dict(model.apart),
        "tensors": [leaf.to_json(n) for n, leaf in model.leaves.items()],
    }
    if derivation is not None:
        predicate["derivation"] = dict(derivation)
    return dump(
        {
            "_type": TYPE,
            "subject": [{"name": name, "digest": {DIGEST: model.identity}}],
            "predicateType": PREDICATE,
            "predicate": predicate,
        }
    )


def read_statement(data: bytes, where: object) -> Statement:
    """Read a statement and check that its identity is that of the tensors which it lists.

    Args:
        data: the file's bytes, untrusted.
        where: the file, for messages.

    Raises:
        TensorkeepError: F02 where it is cut short or no JSON, F07 where it is no statement of ours, F03 where it
            contradicts itself.
    """
    try:
        document = parse_json(data, where)
    except TensorkeepError as error:
        raise TensorkeepError(f"{error.what}: cut short?", where=error.where, code="F02", hint=_AGAIN) from None
    given = document if isinstance(document, dict) else {}
    subjects, predicate = given.get("subject"), given.get("predicate")
    if given.get("_type") != TYPE or given.get("predicateType") != PREDICATE or not isinstance(predicate, dict):
        raise TensorkeepError("is no statement of a model's identity", where=where, code="F07", hint=_AGAIN)
    if not isinstance(subjects, list) or len(subjects) != 1 or not isinstance(subjects[0], dict):
        raise TensorkeepError("does not speak of one model", where=where, code="F07")
    if predicate.get("schema") != 1 or predicate.get("of") not in ("model", "adapter", "codes"):
        raise TensorkeepError("is a statement of another version", where=where, code="F07", hint="update tensorkeep")
    digests = subjects[0].get("digest")
    wanted = digest(digests.get(DIGEST) if isinstance(digests, dict) else None, "its identity", where).hex()
    leaves = _leaves(predicate.get("tensors"), where)
    made = merkle.identity([leaf.hash(name) for name, leaf in leaves.items()]).hex()
    if made != wanted:
        raise TensorkeepError(f"names the identity {wanted}, its tensors give {made}", where=where, code="F03")
    config, derivation, name = predicate.get("config"), predicate.get("derivation"), subjects[0].get("name")
    out = Statement(wanted, leaves, name if isinstance(name, str) else "", predicate["of"], where=str(where))
    out.parts = {k: digest(v, f"the hash of its {k}", where).hex() for k, v in _texts(predicate, "parts", where)}
    out.files = {k: digest(v, f"the hash of {k}", where).hex() for k, v in _texts(predicate, "files", where)}
    out.config = config if isinstance(config, dict) else None
    out.derivation = derivation if isinstance(derivation, dict) else None
    out.nulls, apart = predicate.get("nulls") is True, predicate.get("apart")
    out.apart = {k: str(v) for k, v in apart.items()} if isinstance(apart, dict) else None
    odd = [k for k in (*out.parts, *out.files) if k not in KINDS and part_of(k) is None]
    if odd or (config is not None and out.config is None) or (derivation is not None and out.derivation is None):
        raise TensorkeepError(f"holds what no statement of this version does: {shown(odd)}", where=where, code="F07")
    return out


_AGAIN = "get it again, or make one: tensorkeep sign"


def _texts(predicate: Mapping[str, Any], key: str, where: object) -> list[tuple[str, Any]]:
    given = predicate.get(key)
    if not isinstance(given, dict):
        raise TensorkeepError(f"has no {key}", where=where, code="F07")
    return list(given.items())


def _leaves(given: Any, where: object) -> dict[str, Leaf]:
    """Return the leaves that a statement lists; their order and their names being one of its own."""
    if not isinstance(given, list):
        raise TensorkeepError("lists no tensors", where=where, code="F07")
    read = [read_leaf(entry, where) for entry in given]
    names = [name for name, _ in read]
    if len(set(names)) != len(names) or names != sorted(names, key=str.encode):
        raise TensorkeepError("lists a tensor twice, or out of order", where=where, code="F07")
    return dict(read)


@dataclass
class Compared:
    """How a checkpoint compares with a statement.

    Attributes:
        findings: what differs; none of severity "error" where it is the model that the statement speaks of.
        parts: by kind: "equal", "differs", "added", "absent" (the checkpoint has no such file), or "fields" where a
            config was made of a GGUF's metadata and the fields of both were compared.
    """

    findings: list[Finding]
    parts: dict[str, str]


def compare_with(statement: Statement, model: ModelIdentity, config: Mapping[str, Any] | None) -> Compared:
    """Compare a model with a statement: every tensor, config, tokenizer and chat template.

    Args:
        statement: from `read_statement`.
        model: from `identify`.
        config: of the checkpoint, also where it was made of its metadata; None without one.

    Returns:
        What differs.

    Raises:
        TensorkeepError: F03 where hardly a byte of the model is in tensors that the statement lists: it is another's.
    """
    mine, theirs = model.leaves, statement.leaves
    same = [n for n in mine if theirs.get(n) == mine[n]]
    if sum(stored_bytes(mine[n].dtype, mine[n].shape) for n in same) * _ALIKE < model.nbytes:
        what = f"speaks of another model: {len(same)} of its {len(theirs)} tensors are those of {model.path}"
        hint = f"its identity is {statement.identity}, the checkpoint's {model.identity}"
        raise TensorkeepError(what, where=statement.where, code="F03", hint=hint)
    findings = []
    changed = [n for n in mine if n in theirs and mine[n] != theirs[n]]
    if changed:
        what = f"{counted(len(changed), 'tensor')} changed since the statement: {', '.join(grouped(changed)[:4])}"
        dtypes = sorted({f"{theirs[n].dtype} is {mine[n].dtype}" for n in changed if theirs[n].dtype != mine[n].dtype})
        findings.append(Finding("F03", "error", what + (f" ({', '.join(dtypes)})" if dtypes else ""), changed))
    missing, extra = [n for n in theirs if n not in mine], [n for n in mine if n not in theirs]
    if missing:
        what = f"{counted(len(missing), 'tensor')} of the statement not there: {', '.join(grouped(missing)[:4])}"
        findings.append(Finding("K01", "error", what, missing))
    if extra:
        what = f"{len(extra)} tensors are not in the statement: {', '.join(grouped(extra)[:4])}"
        findings.append(Finding("K02", "error", what, extra))
    findings += _apart(statement, model)
    if model.instead:
        what = f"{', '.join(model.instead)}: transformers loads this too or instead, and the statement is not about it"
        findings.append(Finding("F03", "error", what, model.instead))
    parts = {}
    for kind in [k for k in KINDS if k in statement.parts or k in model.parts]:
        parts[kind], more = _part(kind, statement, model, config)
        findings += more
    return Compared(findings, parts)


def _apart(statement: Statement, model: ModelIdentity) -> list[Finding]:
    """Compare which tensors have a copy of another's bytes that no config makes of it: without it they are random."""
    if statement.apart is None or model.format == "gguf":
        return []
    found = []
    gone = [n for n in statement.apart if n not in model.tied and n not in model.leaves]
    if gone:
        what = f"{', '.join(gone)}: stored beside {statement.apart[gone[0]]} in what was signed, and not there"
        found.append(Finding("K01", "error", what, gone))
    if more := [n for n in model.apart if n not in statement.apart]:
        what = f"{', '.join(more)}: a copy of {model.apart[more[0]]} that what was signed does not have"
        found.append(Finding("K02", "error", what, more))
    return found


def _before(statement: Statement, model: ModelIdentity) -> bool:
    """Say whether a config is what an older statement is about, which does not count any null."""
    if statement.nulls or "config" not in model.texts:
        return False
    older = canonical(without_nulls(parse_json(model.texts["config"], "config.json")))
    return merkle.part_leaf("config", older).hex() == statement.parts.get("config")


def _part(
    kind: str, statement: Statement, model: ModelIdentity, config: Mapping[str, Any] | None
) -> tuple[str, list[Finding]]:
    """Compare one part, and name the files and fields that are not the statement's."""
    also = ("tokenizer_config.json",) if kind == "chat_template" else ()
    files = [n for n in model.files if part_of(n) == kind or n in also]
    if kind not in model.parts:
        if kind == "config" and config is not None and statement.config is not None:
            odd = differences(config, statement.config)
            if odd:
                what = f"the config that the metadata makes differs: {_spoken(odd)}"
                return "differs", [Finding("F03", "error", what, sorted(odd))]
            return "fields", []
        if kind == "generation" and model.format == "hf" and "config" in model.parts:
            what = "generation_config.json of the statement is not there: transformers makes another of config.json"
            return "absent", [Finding("F05", "error", what, ["generation_config.json"])]
        return "absent", []
    if kind not in statement.parts:
        what = f"{', '.join(files)}: the statement has no {kind.replace('_', ' ')}"
        return "added", [Finding("F03", "error", what, files)]
    other = [n for n in files if statement.files.get(n) != model.files[n]]
    if statement.parts[kind] == model.parts[kind] or (kind == "config" and _before(statement, model)):
        other = [n for n in other if part_of(n) == kind and n in statement.files]
        if other:
            what = f"{', '.join(other)}: other bytes that say the same {kind.replace('_', ' ')}"
            uncounted = dict.fromkeys(name for n in other for name in not_counted(n))
            what += f"; not compared: {', '.join(uncounted)}" if uncounted else ""
            return "equal", [Finding("F03", "info", what, other)]
        return "equal", []
    what = f"{', '.join(other or files)}: not the {kind.replace('_', ' ')} of the statement"
    if kind == "config" and statement.config is not None:
        own = parse_json(model.texts["config"], "config.json")
        mine, theirs = _flat(own), _flat(statement.config)
        both = {k: (mine.get(k, _ABSENT), theirs.get(k, _ABSENT)) for k in {*mine, *theirs}}
        what += f": {_spoken({k: v for k, v in sorted(both.items()) if v[0] != v[1]})}"
    return "differs", [Finding("F03", "error", what, other or files)]


def _flat(config: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Return the fields of a config by dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{under}{key}.") if isinstance(value, Mapping) and value else {f"{under}{key}": value}
    return found


def _spoken(odd: Mapping[str, tuple[Any, Any]]) -> str:
    """Say fields that differ: what is there, and what the statement has."""
    first = list(odd.items())[:4]
    told = {k: ["absent" if value is _ABSENT else shown(value) for value in pair] for k, pair in first}
    return ", ".join(f"{key} is {mine}, was {theirs}" for key, (mine, theirs) in told.items())


def places(checkpoint: str | Path) -> tuple[Path, Path]:
    """Return where the statement of a checkpoint and its signature lie.

    Args:
        checkpoint: a local path: in a folder they lie inside, of a file beside it. A sealed save and a run's own
            checkpoint are closed, so theirs lie beside them as well.
    """
    path = Path(checkpoint)
    closed = (path / "manifest.json").exists()
    if path.is_dir() and not closed:
        return path / STATEMENT, path / SIGNATURE
    return path.with_name(f"{path.name}.{STATEMENT}"), path.with_name(f"{path.name}.{SIGNATURE}")
