"""Read averaged weights out of other tools' files: OpenTAD and timm (`state_dict_ema`, `model_ema`), AveragedModel.

Those tools average a copy of the whole state dict, frozen floats, counters and packed codes included. Only what trains
in the model at hand is taken, by name; everything else is compared with the live copy in the same file, named in the
notes and left out. Where the right weights are not in the file, an error says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import EMA_ROOTS, opentad
from tensorkeep.diagnosis.evidence import ema as copies
from tensorkeep.diagnosis.evidence.quantized import averaged_blocks
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.findings import Finding, Severity
from tensorkeep.formats.memory import raw_bytes, tensor_of
from tensorkeep.formats.names import strip_root, unwrap
from tensorkeep.formats.run import read_part
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.description import QuantizedWeight
from tensorkeep.storage import run_folder
from tensorkeep.storage.record import DTYPES
from tensorkeep.training.ema import trainable

ROOTS = (*sorted(EMA_ROOTS), "ema_model")
LIVE = (*copies.LIVE_ROOTS, "online_model")
UPDATES, DECAY = ("n_averaged", "num_updates", "ema_updates", "updates"), ("decay", "ema_decay", "model_ema_decay")
_COUNTERS = (*UPDATES, *DECAY, "initted", "step")
ROUNDING = 1e-5  # relative: what averaging a constant leaves of it


@dataclass(frozen=True)
class Averages:
    """Averaged weights of a file.

    Attributes:
        tensors: by the model's names, float32.
        root: the part of the file that they were taken from.
        decay: of the average; None where the file does not say.
        updates: how often it was updated; None where the file does not say.
        notes: what else the average held, and what was wrong with it.
    """

    tensors: dict[str, Tensor]
    root: str
    decay: float | None = None
    updates: int | None = None
    notes: list[Finding] = field(default_factory=list)


class _Copies(NamedTuple):
    """The averaged copy of the weights in a file, and the live one.

    Attributes:
        root: the part of the file that holds the average.
        averaged: name as the model spells it -> stored name, of the average.
        live: the same of the live copy.
        counters: name -> stored name of the average's own counters.
    """

    root: str
    averaged: dict[str, str]
    live: dict[str, str]
    counters: dict[str, str]


def read_ema(source: str | Path | StateView, model: nn.Module | Iterable[str], root: str | None = None) -> Averages:
    """Read the average of what trains in a model out of a checkpoint of OpenTAD, timm or torch.

    Names are strict: every trainable tensor must be averaged in its own shape, and nothing may be there that the model
    does not have.

    Args:
        source: the checkpoint.
        model: a model, or the names of its trainable tensors.
        root: the part of the file that holds the average, where it holds several or does not say; `""` is all of it.

    Raises:
        TensorkeepError: The file has no average (K08), lacks a tensor (K01), has one too many (K02), has one of another
            shape (S01) or with NaN or Inf (V01), or holds packed codes where the model trains (Q03).

    Example:
        >>> averages = read_ema("epoch_59.pth", detector)  # doctest: +SKIP
        >>> ema.load_state_dict(averages.tensors, averages.updates or 0)  # doctest: +SKIP
    """
    view = _opened(source)
    wanted = _wanted(model)
    own = dict(model.state_dict()) if isinstance(model, nn.Module) else None
    found = _spelled(_copies(view, root), wanted)
    weights = quantized.find_quantized(view, {stored: stored for stored in found.averaged.values()})
    _refuse(view, found, wanted, own, weights)
    tensors = {raw: tensor_of(view, found.averaged[name]).to(torch.float32) for raw, (name, _) in wanted.items()}
    spoiled = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if spoiled:
        what = f"{spoiled[0]} is not finite in the average ({len(spoiled)} tensors): every later update keeps that"
        raise TensorkeepError(what, where=view.path, code="V01", tensors=spoiled, hint="take an earlier checkpoint")
    names = [name for name, _ in wanted.values()]
    notes = [*_packed(view, found, weights, own), *_rest(view, found, weights, names), *_taken(view, found, names)]
    return Averages(tensors, found.root, _decay(view), _updates(view, found), notes)


# -- finding the copies -----------------------------------------------------------------------------------------------


def _opened(source: str | Path | StateView) -> StateView:
    """Open the checkpoint; of a step folder of ours, its average."""
    if isinstance(source, StateView):
        return source
    beside = Path(source) / run_folder.EMA
    found = read_part(source, "ema") if Path(source).is_dir() and not beside.is_file() else None
    if found is not None:
        found.metadata["average"] = True
        return found
    return read(beside if beside.is_file() else source)


def _wanted(model: nn.Module | Iterable[str]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Map each name of the model that trains to its name without wrappers, and its shape."""
    if isinstance(model, nn.Module):
        wanted = {n: (unwrap(n)[0], tuple(p.shape)) for n, p in trainable(model).items()}
        return dict(wanted)
    return {name: (unwrap(name)[0], None) for name in model}


def _under(view: StateView, root: str) -> dict[str, str]:
    """Map names without wrappers to stored names below a root; wrappers stand before it, after it, or both."""
    out: dict[str, str] = {}
    for stored in view:
        rest = strip_root(stored, root) if root else stored
        rest = strip_root(unwrap(stored)[0], root) if rest is None else rest
        if rest is None:
            continue
        name = unwrap(rest)[0]
        if name in out:
            what = f"{out[name]} and {stored} are both {name} without wrappers"
            raise TensorkeepError(what, where=view.path, code="K03", hint="keep one of them")
        out[name] = stored
    return out


def _copies(view: StateView, root: str | None) -> _Copies:
    """Find the averaged copy and the live one."""
    chosen = _root(view) if root is None else root
    names = _under(view, chosen)
    if not names:
        raise TensorkeepError(f"holds nothing under {chosen!r}", where=view.path, code="K08")
    counters = {n: s for n, s in names.items() if n in _COUNTERS and view[s].elements == 1}
    averaged = {n: s for n, s in names.items() if n not in counters}
    others = [_under(view, other) for other in LIVE if other != chosen] if chosen else []
    live = max(others, key=lambda found: len(found.keys() & averaged.keys()), default={})
    return _Copies(chosen, averaged, live, counters)


def _root(view: StateView) -> str:
    """Return the root of the only average in the file; "" where the whole file is an average."""
    found = [root for root in ROOTS if any(strip_root(unwrap(n)[0], root) is not None for n in view)]
    if len(found) == 1:
        return found[0]
    if found:
        what = f"holds {len(found)} averages: {', '.join(found)}"
        raise TensorkeepError(what, where=view.path, code="K08", hint=f"say which: root={found[0]!r}")
    if "n_averaged" in view or "average" in view.metadata or Path(view.path).name == run_folder.EMA:
        return ""
    if any(n.split(".")[0] == "shadow_params" for n in view):
        what = "holds an average by position (shadow_params): no name says which weight is which"
        raise TensorkeepError(
            what, where=view.path, code="K08", hint="load it with the tool that wrote it, save by name"
        )
    raise TensorkeepError(
        "nothing in it says that it is an average",
        where=view.path,
        code="K08",
        hint="root='' takes the whole file as one (timm's ModelEma saved by itself has only a module. prefix)",
    )


def _spelled(found: _Copies, wanted: Mapping[str, tuple[str, object]]) -> _Copies:
    """Spell the copies as the model does: as they are, or with OpenTAD's names in ours where those fit it better."""
    names = {name for name, _ in wanted.values()}
    ours = {n: opentad.to_hf(n) or n for n in {*found.averaged, *found.live}}
    if len(names & {ours[n] for n in found.averaged}) <= len(names & found.averaged.keys()):
        return found
    averaged, live = ({ours[n]: s for n, s in c.items()} for c in (found.averaged, found.live))
    return found._replace(averaged=averaged, live=live)


# -- strictness -------------------------------------------------------------------------------------------------------


def _refuse(
    view: StateView,
    found: _Copies,
    wanted: Mapping[str, tuple[str, tuple[int, ...] | None]],
    own: Mapping[str, Tensor] | None,
    weights: Mapping[str, QuantizedWeight],
) -> None:
    """Raise one error for everything that does not fit, the gravest first."""
    problems: list[tuple[str, str, str]] = []
    for name, shape in wanted.values():
        stored = found.averaged.get(name)
        if stored is None:
            problems.append(("K01", name, "trains in the model and is not in the average"))
        elif stored in weights or not DTYPES[view[stored].dtype].floating:
            kind = weights[stored].kind + " codes" if stored in weights else view[stored].dtype
            problems.append(
                ("Q03", name, f"trains in the model and is {kind} in the file, which no averaging survives")
            )
        elif shape is not None and view[stored].shape != shape:
            problems.append(("S01", name, f"is {list(view[stored].shape)} in the average, {list(shape)} in the model"))
    parts = {part for weight in weights.values() for part in weight.parts.values()}
    known = {unwrap(n)[0] for n in own} if own is not None else {*found.live, *(n for n, _ in wanted.values())}
    if own is not None or found.live:
        problems += [
            ("K02", name, f"is in the average and not in the {'model' if own is not None else 'live copy'}")
            for name, stored in found.averaged.items()
            if name not in known and stored not in parts
        ]
    if not problems:
        return
    problems.sort(key=lambda p: ("Q03", "S01", "K01", "K02").index(p[0]))
    code, first, what = problems[0]
    more = "".join(f"; {name} {line}" for _, name, line in problems[1:4])
    raise TensorkeepError(
        f"{first} {what}{more}" + (f" ({len(problems)} in all)" if len(problems) > 4 else ""),
        where=view.path,
        code=code,
        hint=near_misses(first, found.averaged) or "freeze and unfreeze the model as it was when it was trained",
        tensors=[name for _, name, _ in problems],
    )


# -- what else the average holds --------------------------------------------------------------------------------------


def _packed(
    view: StateView, found: _Copies, weights: Mapping[str, QuantizedWeight], own: Mapping[str, Tensor] | None
) -> list[Finding]:
    """Tell whether averaging changed the codes, integer scales or state of quantized weights in the average.

    It shows against the live copy, against the model's own weights, or by what no sound quantization leaves.
    """
    clean = {stored: name for name, stored in found.averaged.items()}
    shares = {
        clean.get(stored, stored): _changed(view, found, clean, weight, own) for stored, weight in weights.items()
    }
    wrong = {name: round(share, 4) for name, share in shares.items() if share}
    sound = sorted(n for n, share in shares.items() if share == 0)
    unknown = sorted(n for n, share in shares.items() if share is None)
    worst = f"up to {max(wrong.values(), default=0.0):.1%}"
    findings = []
    if wrong:
        text = f"quantized weights were averaged as if codes were numbers, {worst} of them changed"
        message = f"{len(wrong)} {text}: left out, take the base's own"
        findings.append(Finding("Q03", "warning", message, sorted(wrong), {"changed": wrong}))
    for names, text in (
        (sound, "quantized weights in the average are the base's, unchanged: left out"),
        (unknown, "quantized weights in the average have nothing to be compared with: left out"),
    ):
        findings += [Finding("E02", "info", f"{len(names)} {text}", names, {})] if names else []
    return findings


def _changed(
    view: StateView, found: _Copies, clean: Mapping[str, str], weight: QuantizedWeight, own: Mapping[str, Tensor] | None
) -> float | None:
    """Return the share of a quantized weight's integer bytes (else of its blocks) that averaging changed.

    None where there is nothing to tell it from; 1 where the weight's state can no longer be read.
    """
    changed = total = 0
    for stored in (s for s in weight.stored if s in clean):
        integer = not DTYPES[view[stored].dtype].floating or stored == weight.name  # codes may be stored as floats
        before = _before(view, found, clean[stored], own) if integer else None
        if before is not None:
            now = np.frombuffer(view.bytes(stored), np.uint8)
            changed += int(np.count_nonzero(now != before)) if now.size == before.size else now.size
            total += now.size
    if total:
        return changed / total
    if weight.problems:
        return 1.0
    lost, looked = averaged_blocks(view, weight)
    return lost / looked if lost else None


def _before(
    view: StateView, found: _Copies, name: str, own: Mapping[str, Tensor] | None
) -> np.ndarray[tuple[int], np.dtype[np.uint8]] | None:
    """Return the bytes that a tensor had before it was averaged: those of the live copy, or else the model's own."""
    if name in found.live:
        return np.frombuffer(view.bytes(found.live[name]), np.uint8)
    mine = (own or {}).get(name)
    return None if mine is None or mine.is_floating_point() else np.frombuffer(raw_bytes(mine), np.uint8)


def _rest(
    view: StateView, found: _Copies, weights: Mapping[str, QuantizedWeight], names: Iterable[str]
) -> list[Finding]:
    """Tell whether frozen floats, buffers and counters in the average are unchanged, or moved as trained tensors do."""
    quantized = {stored for weight in weights.values() for stored in weight.stored}
    taken = set(names)
    left = {n: s for n, s in found.averaged.items() if s not in quantized and n not in taken}
    pairs = {
        n: (s, found.live[n]) for n, s in left.items() if n in found.live and view[s].shape == view[found.live[n]].shape
    }
    apart = copies.differences(copies.Average(view, found.root, pairs))
    moved = sorted(n for n, (a, norm) in apart.items() if a > ROUNDING * norm and DTYPES[view[left[n]].dtype].floating)
    numbers = sorted(n for n, (a, _) in apart.items() if a > 0 and not DTYPES[view[left[n]].dtype].floating)
    still = sorted(apart.keys() - {*moved, *numbers})
    alone = sorted(left.keys() - pairs.keys())
    because = "another part trained, or running statistics"
    groups: tuple[tuple[Severity, list[str], str], ...] = (
        ("warning", moved, f"tensors that do not train in the model were averaged and moved ({because}): left out"),
        ("info", numbers, "integers were averaged and truncated: left out"),
        ("info", still, "frozen tensors in the average repeat the live copy: left out"),
        ("info", alone, "further tensors in the average have no live copy to be compared with: left out"),
    )
    return [Finding("E02", severity, f"{len(n)} {text}", n) for severity, n, text in groups if n]


def _taken(view: StateView, found: _Copies, names: list[str]) -> list[Finding]:
    """Tell what is odd about the averages that were taken: equal to the live weights, or kept in a narrow dtype."""
    pairs = {n: (found.averaged[n], found.live[n]) for n in names if n in found.live}
    apart = copies.differences(copies.Average(view, found.root, pairs))
    notes = []
    if len(apart) > 1 and not any(a for a, _ in apart.values()):
        notes.append(
            Finding("E01", "warning", f"the average equals the live weights in all {len(apart)} tensors", names)
        )
    narrow = sorted({view[found.averaged[n]].dtype for n in names if DTYPES[view[found.averaged[n]].dtype].bits < 32})
    if narrow:
        message = f"the average was kept in {', '.join(narrow)}, which swallows small updates"
        notes.append(Finding("E03", "warning", message, names))
    if _updates(view, found) == 0:
        notes.append(Finding("E01", "warning", "the average was never updated: it is where training began", names))
    return notes


def _updates(view: StateView, found: _Copies) -> int | None:
    """Return how often the average was updated, where the file says so."""
    stored = next((found.counters[n] for n in UPDATES if n in found.counters), None)
    if stored is not None:
        return int(tensor_of(view, stored).item())
    return next((int(v) for _, v in copies.entries(view, *UPDATES) if 0 <= v < 1 << 53), None)


def _decay(view: StateView) -> float | None:
    """Return the average's decay, where the file says so."""
    return next((float(v) for _, v in copies.entries(view, *DECAY) if 0 <= v < 1), None)
