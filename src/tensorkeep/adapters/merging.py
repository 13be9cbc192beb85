"""Carry out a merge plan by streaming, compute it again from the output, leave a certificate.

What is proven before the output appears under its name: every tensor read back is what was written; every merged one,
computed a second time from base and adapters, has the same bits; base and adapters did not change meanwhile and are
what their own certificates say; the base did not hold the update before (A03).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorkeep.adapters._blas import one_thread as one_thread
from tensorkeep.adapters._matching import WeightedAdapter
from tensorkeep.adapters._view import Moved
from tensorkeep.adapters.planning import MergePlan
from tensorkeep.adapters.reading import DIGEST
from tensorkeep.adapters.shares import Share, times_merged
from tensorkeep.conversion.dequantizing import DecodedView
from tensorkeep.conversion.execution import carry_out
from tensorkeep.conversion.naming import identify
from tensorkeep.conversion.proof import certify, read_certificate, refuse_damaged
from tensorkeep.conversion.sink import Checks, Progress, quiet
from tensorkeep.conversion.streams import Cast, Sums, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage import certificate as manifest
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import digest_of_all, parse_json
from tensorkeep.storage.files import LocalFolder, refuse_changed


@dataclass
class Merged:
    """What a merge did.

    Args:
        path: the file or folder that was written.
        nbytes: bytes of tensor data.
        digests: xxh3_128 of each tensor's bytes in hex, by name.
        base_digest: the base's digest, over all of its tensors.
        moved: how much each merged tensor changed, by the base's stored name.
        seconds: how long each phase took ("write", "prove", "sync").
        notes: what was found on the way: parts of adapters that did nothing (A05).
        cleared: as in the result of `convert`, like the next.
        resumed: bytes that a killed command had sent already.
    """

    path: str
    nbytes: int
    digests: dict[str, str]
    base_digest: str
    moved: dict[str, Moved]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    resumed: int = 0


# -- before -----------------------------------------------------------------------------------------------------------


def base_digests(view: StateView) -> list[str]:
    """Return the digests under which an adapter may have recorded this base.

    They are over stored names (first), over clean names, and over clean names with a tied tensor counted once.

    Args:
        view: the base.

    Returns:
        Each is `manifest.digest_of_all` over the xxh3_128 of the tensors' raw bytes, quantization state included.
    """
    identity = identify(view)
    digests = {name: view.digest(name) for name in view}
    clean = {c: digests[n] for n, c in identity.names.items()}
    once = {c: digests[n] for n, c in identity.names.items() if view[n].tied_to is None and c != "lm_head.weight"}
    whole = {c: digests[n] for n, c in identity.names.items() if view[n].tied_to is None}
    return list(dict.fromkeys(digest_of_all(d) for d in (digests, clean, whole, once)))


def refuse_other_base(base: StateView, sources: Sequence[WeightedAdapter]) -> None:
    """Stop where an adapter names the digest of the base that it was trained on, and this is another.

    Args:
        base: the base.
        sources: the adapters.

    Raises:
        TensorkeepError: A04.
    """
    for source in sources:
        _refuse_other_type(base, source)
    recorded = {
        s.path: d
        for s in sources
        if isinstance(d := s.adapter.document.get(DIGEST) or s.adapter.view.metadata.get(DIGEST), str)
    }
    if not recorded:
        return
    certificate = read_certificate(base) or {}
    here = [*base_digests(base), *[d for d in [certificate.get("digest")] if isinstance(d, str)]]
    for path, digest in recorded.items():
        if digest not in here:
            raise TensorkeepError(
                f"was trained on the base {digest}; {base.path} is {here[0]}",
                where=path,
                code="A04",
                hint="give the base it was trained on, or --allow-other-base if you know that these fit",
            )


def _refuse_other_type(base: StateView, source: WeightedAdapter) -> None:
    """Stop where the folder that an adapter names as its base is here, and holds a model of another type."""
    named = source.adapter.document.get("base_model_name_or_path")
    kind = (base.config or {}).get("model_type")
    if not isinstance(named, str) or not isinstance(kind, str) or not (Path(named) / "config.json").is_file():
        return
    folder = LocalFolder(Path(named))
    theirs = parse_json(read_small_from(folder, "config.json"), f"{named}/config.json")
    other = theirs.get("model_type") if isinstance(theirs, dict) else None
    if isinstance(other, str) and other != kind:
        raise TensorkeepError(
            f"was trained on {named}, a {other}; {base.path} is a {kind}",
            where=source.path,
            code="A04",
            hint="give the base it was trained on, or --allow-other-base if you know that these fit",
        )


def refuse_merged_before(base: StateView, sources: Sequence[WeightedAdapter]) -> None:
    """Stop where the base's certificate says that one of these adapters is in it.

    Args:
        base: the base.
        sources: the adapters.

    Raises:
        TensorkeepError: A03.
    """
    for entry in _merged_before(base):
        for source in sources:
            if entry.get("digest") == source.digest:
                raise TensorkeepError(
                    f"is in the base {base.path} already, merged with weight {entry.get('weight', 1):g}",
                    where=source.path,
                    code="A03",
                    hint="use the merged model as it is; to remove or scale the update, merge anew from the base "
                    "it was merged into",
                )


def _merged_before(base: StateView) -> list[dict[str, Any]]:
    """Return the adapters that the base's certificate lists, over all merges that led to it."""
    said = (read_certificate(base) or {}).get("merge")
    found = [*said.get("before", []), *said.get("adapters", [])] if isinstance(said, dict) else []
    return [e for e in found if isinstance(e, dict)]


# -- carrying it out --------------------------------------------------------------------------------------------------


def merge(
    job: MergePlan,
    out: str,
    to: str = "hf",
    shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Merged:
    """Write the merged model to `out`, prove it, and say how much each tensor changed.

    Args:
        job: from `plan_merge`.
        out: a local path or a URL, as in `convert`.
        to: the format, "hf", "dcp" or "pth".
        shard_size: largest size of one weight file in bytes; None for the format's usual one.
        overwrite: replace what is there.
        progress: called as `progress(what, done, total)` with bytes while it runs.

    Returns:
        Where the model is, its digests, and what changed by how much.

    Raises:
        TensorkeepError: the base holds the update already (A03), a merged value is not finite (V01), a source is
            damaged or the result read back or computed again differs (F03), or the place cannot be written. Nothing
            is left then.

    Example:
        >>> job = plan_merge(read("base"), open_adapters([(read("adapter"), 1.0)]))  # doctest: +SKIP
        >>> merge(job, "merged").moved["model.layers.0.self_attn.q_proj.weight"].change  # doctest: +SKIP
    """
    base, digests, moved = job.view.base, [""], dict[str, Moved]()
    assert base is not None

    def sources(sums: dict[str, Sums]) -> None:
        moved.update(job.view.moved or {})
        job.view.moved = None
        _refuse_spoiled(job, moved)
        _refuse_present(job, moved)
        digests[0] = _check_base(job, sums)

    checks = Checks(
        sources, lambda sums: replay(job, sums, progress), lambda sums: certificate(job, sums, to, digests[0])
    )
    job.view.moved = {}
    opened = [base, *(s.adapter.view for s in job.sources)]
    with one_thread():
        done = carry_out(job.plan, opened, checks, out, to, shard_size, overwrite, progress)
    notes = _idle(job, moved)
    return Merged(
        done.path, done.nbytes, done.digests, digests[0], moved, done.seconds, notes, done.cleared, done.resumed
    )


def replay(job: MergePlan, sums: dict[str, Sums], progress: Progress = quiet) -> None:
    """Compute every merged or dequantized tensor again; stop (F03) where its bits are not those that were written."""
    steps = [s for s in job.plan.steps if s.sink is not None and any(p.name in job.view.made for p in s.parts)]
    total, done = sum(s.sink.nbytes for s in steps if s.sink), 0
    for step in steps:
        assert step.sink is not None
        again = write_tensor(step, job.plan.sources, lambda _: None, False)
        if again.digest != sums[step.sink.name].digest:
            raise TensorkeepError(
                f"computed twice, {step.sink.name} differs: the machine does not calculate reliably",
                code="F03",
                hint="check its memory, then run again",
            )
        done += step.sink.nbytes
        progress("replay", done, total)


def _check_base(job: MergePlan, sums: dict[str, Sums]) -> str:
    """Return the base's digest as it was read; stop where base or adapters changed or are damaged."""
    base = job.view.base
    floats = set(base.made) if isinstance(base, DecodedView) else set()
    base = base.base if isinstance(base, DecodedView) else base
    assert base is not None
    made = floats | {m.source for m in job.view.made.values()} | (set(base) - set(job.view))
    read = {n: d for s in sums.values() for (_, n), d in s.sources.items() if n in base and n not in made}
    digests = {n: read.get(n) or base.digest(n) for n in base}
    refuse_damaged(base, 0, {"": Sums(0, "", {(0, n): d for n, d in digests.items()}, Cast())})
    for source in job.sources:
        view = source.adapter.view
        refuse_damaged(view, 0, {"": Sums(0, "", {(0, n): view.digest(n) for n in source.adapter.stored}, Cast())})
        refuse_changed(view.folder)
    refuse_changed(base.folder)
    return digest_of_all(digests)


def _refuse_spoiled(job: MergePlan, moved: dict[str, Moved]) -> None:
    """Stop (V01) where a finite weight became infinite or NaN: an adapter that holds such, or a dtype too narrow."""
    wrong = {n: m.spoiled for n, m in moved.items() if m.spoiled}
    if wrong:
        name = next(iter(wrong))
        raise TensorkeepError(
            f"{sum(wrong.values())} merged values are not finite, first in {name}",
            where=job.view.path,
            code="V01",
            tensors=wrong,
            hint="look at the adapter with: tensorkeep diagnose ADAPTER; "
            "a dtype with more range is --dtype bf16 or fp32",
        )


def _refuse_present(job: MergePlan, moved: dict[str, Moved]) -> None:
    """Stop (A03) where the base already held an adapter's update: its coefficient in the weights is 1, not 0."""
    for number, source in enumerate(job.sources):
        shares: list[Share] = []
        for name, made in job.view.made.items():
            term = next((t for t in made.terms if t.number == number), None)
            found = moved[name].share(number, term.name) if term is not None and name in moved else None
            shares += [found] if found is not None else []
        times, figures = times_merged(shares)
        if times:
            raise TensorkeepError(
                f"is in the base's weights already, {'twice' if times == 2 else 'once'} "
                f"(coefficient {figures['coefficient']}, noise {figures['noise']})",
                where=source.path,
                code="A03",
                hint="BASE is a merged model: give the base it was merged into",
            )


def _idle(job: MergePlan, moved: dict[str, Moved]) -> list[Note]:
    """Say (A05) which tensors an adapter was to change and did not, and where the dtype is too coarse for it."""
    wanted = {n: moved[n] for n, made in job.view.made.items() if made.terms and n in moved}
    idle = [n for n, m in wanted.items() if m.added == 0]
    lost = [n for n, m in wanted.items() if m.added > 0 and m.change == 0]
    notes = []
    if idle:
        what = "the adapter does nothing: " if len(idle) == len(wanted) else ""
        text = f"{what}{len(idle)} of the {len(wanted)} tensors it is for stay as they are: "
        notes.append(Note("A05", text + ", ".join(grouped(idle)[:4]), tuple(idle)))
    if lost:
        text = f"the change of {len(lost)} of {len(wanted)} tensors is too small for the dtype written (--dtype fp32 "
        notes.append(Note("A05", f"{text}keeps it): {', '.join(grouped(lost)[:4])}", tuple(lost)))
    return notes


# -- what is left behind ----------------------------------------------------------------------------------------------


def certificate(job: MergePlan, sums: dict[str, Sums], to: str, base_digest: str) -> bytes:
    """Make the certificate of a merge: a conversion's, with base and adapters as sources and what was added."""
    base = job.view.base
    assert base is not None
    document = json.loads(certify(job.plan, sums, to))
    document["source"] = [
        {"format": base.format, "digest": base_digest},
        *({"format": s.adapter.view.format, "digest": s.digest} for s in job.sources),
    ]
    document["merge"] = {
        "onto": job.onto,
        "quantization": job.kind,
        "adapters": [{"digest": s.digest, "weight": s.weight, "kind": s.adapter.kind} for s in job.sources],
        "before": _merged_before(base),
        "terms": {
            name: [
                {"adapter": t.number, "kind": "dora" if t.magnitude else t.kind, "scale": t.scale, "weight": t.weight}
                for t in terms
            ]
            for name, terms in sorted(job.terms.items())
        },
    }
    return manifest.dump(document)


def figures(job: MergePlan, moved: dict[str, Moved]) -> list[dict[str, Any]]:
    """Return one row for each merged tensor: how far it moved, and how much of that a requantization would keep.

    Args:
        job: the merge plan.
        moved: from the result of `merge`.

    Returns:
        Rows with name, change, kept, original_distance (see `relative`), the adapters' numbers, and the kind of change.
    """
    rows = []
    for name, made in job.view.made.items():
        found = moved.get(name)
        if found is None or not made.terms:
            continue
        rows.append(
            {
                "name": name,
                **relative(found),
                "adapters": sorted({t.number for t in made.terms}),
                "kind": _spoken_kind(made.terms),
            }
        )
    return rows


_WHOLE = {"saved": "replaced", "tokens": "rows replaced"}


def _spoken_kind(terms: Sequence[Any]) -> str:
    """Say how a tensor changes: LoRA, DoRA, replaced, bias."""
    return " + ".join(dict.fromkeys(_WHOLE.get(t.kind) or t.adapter.plug.variant(t) for t in terms))


def relative(moved: Moved) -> dict[str, float | None]:
    """Return |W' - W| / |W|, the share of the update that requantizing keeps, |W trained on - W original| / |W|.

    `kept` is the projection of the change that survives on the update: (Q(W + dW) - W) · dW / |dW|^2.
    """
    norm = math.sqrt(moved.weight)
    kept = (moved.kept - moved.along) / moved.square if moved.square and moved.kept else None
    return {
        "change": math.sqrt(moved.change) / norm if norm else None,
        "kept": kept,
        "original_distance": math.sqrt(moved.original) / norm if norm and moved.original else None,
    }


def overall(moved: dict[str, Moved]) -> dict[str, float | None]:
    """Return the figures of `relative` over all merged tensors together.

    Args:
        moved: from the result of `merge`.
    """
    touched = [m for m in moved.values() if m.change or m.square]
    whole = Moved()
    for name in ("weight", "change", "along", "square", "kept", "original"):
        setattr(whole, name, sum(getattr(m, name) for m in touched))
    return relative(whole)
