"""Open a case: read both sides, bring them under Hugging Face names, and compare them once.

What cannot be read becomes the case's `read_error` and, through the F checks, a finding. Names that differ from the
reference's by one prefix as a whole are matched without it, and the prefix is remembered for K04.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from tensorkeep.conversion import architecture, dequantizing
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.adapters import halves
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import HfTensor
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.diagnosis.evidence.bytewise import elements
from tensorkeep.diagnosis.evidence.case import Case, Target
from tensorkeep.diagnosis.evidence.survey import survey
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.models.alignment import as_loaded, from_memory, tied_names, with_tied
from tensorkeep.quantization import stored as quantized
from tensorkeep.storage.files import local_path

# ends of names that only the parts of quantized weights have
_PACKED_PARTS = tuple(
    ".absmax .quant_map .nested_absmax .nested_quant_map .SCB .weight_format "  # bitsandbytes
    ".weight_scale .weight_scale_inv .weight_scale_2 .input_scale _scale_inv "  # fp8 and int8
    ".qweight .qzeros .g_idx .scales "  # GPTQ and AWQ
    ".weight_packed .weight_shape .weight_zero_point .weight_blocks .weight_scales _blocks _scales".split()  # others
)
_PACKED_MARK = ".quant_state."
_MEETING = 0.5  # part of the names that must meet once a prefix is taken away, and must not meet before


def open_case(path: str, reference: str | None, target: Target | None = None) -> Case:
    """Read a checkpoint and its reference.

    Args:
        path: The checkpoint. Damage is kept as `read_error`, for the F checks to report.
        reference: The checkpoint to compare with, or None.
        target: The program that is to load it.

    Raises:
        TensorkeepError: For what is no checkpoint at all (a path that is not there, several steps in one folder), and
            for a reference that cannot be read.
    """
    case = Case(path, target=target)
    if reference is not None:
        case.reference = read(reference)
        case.reference_config = case.reference.config
    try:
        case.view = read(path)
    except TensorkeepError as error:
        if error.code is None or ("://" not in path and not local_path(path).exists()):
            raise
        case.read_error = error
        return case
    case.config = case.view.config
    if case.reference is not None:
        case.reference = dequantizing.beside(case.reference, case.view)
        case.reference_config = case.reference.config
    return case


def compare_sides(case: Case) -> None:
    """Find the names of both sides, match them, and compare every shared tensor by its bytes; fills the case.

    Raises:
        TensorkeepError: Where the reference cannot be read to its end.
    """
    if case.view is None:
        return
    try:
        case.identity = namings.identify(case.view)
        _set_adapter_aside(case)
        case.tensors = to_hf_tensors(case.view, 0, case.identity, case.model_config, case.left_out)
    except TensorkeepError as error:
        if error.code is None:
            raise
        case.read_error = error
        return
    if case.reference is not None:
        case.reference_identity = namings.identify(case.reference)
        config = case.reference_config if case.reference_config is not None else case.config
        case.reference_tensors = to_hf_tensors(
            case.reference, 1, case.reference_identity, config, case.reference_left_out
        )
    _under_file_names(case, from_memory)
    _match_prefix(case)
    _under_file_names(case, as_loaded)
    case.packed = frozenset(packed(case.tensors) | packed(case.reference_tensors) | _quantized_names(case))
    _fill_in_tied_head(case)
    if case.two_models:
        names = [n for n in case.reference_tensors if n in case.tensors and n not in case.packed]
        case.comparisons, case.broken = survey(names, case.tensors, case.reference_tensors, case.views, case.progress)


def _set_adapter_aside(case: Case) -> None:
    """Keep low-rank pairs out of the comparison: they are no part of the model, and A01 to A04 look at them."""
    assert case.identity is not None and case.view is not None
    case.adapter = halves(case.identity)
    gone = set(case.identity.names) if case.view.format == "peft" else set(case.adapter)
    if gone:
        rest = {stored: clean for stored, clean in case.identity.names.items() if stored not in gone}
        case.identity = replace(
            case.identity, names=rest, other={**case.identity.other, **dict.fromkeys(gone, "adapter")}
        )


def _under_file_names(case: Case, translated: Callable[..., dict[str, HfTensor]]) -> None:
    """Give both sides the names that files have, where they do not meet under their own."""
    if case.identity is None or namings.renames(case.identity.naming) or not case.tensors:
        return
    wanted = set(case.reference_tensors) or set(architecture.expected(case.config) or ())
    if wanted and not (set(case.tensors) ^ wanted) - {hf.HEAD}:
        return
    config = case.model_config
    case.tensors = translated(config, case.tensors, case.views)
    if case.reference_tensors:
        case.reference_tensors = translated(case.reference_config or config, case.reference_tensors, case.views)


def _fill_in_tied_head(case: Case) -> None:
    """Let the embedding stand for a tied head on the side that leaves it out: files store it once or twice."""
    if not case.two_models or set(case.tensors) == set(case.reference_tensors):
        return
    ties = tied_names(case.model_config, {*case.tensors, *case.reference_tensors})
    for mine, other in ((case.tensors, case.reference_tensors), (case.reference_tensors, case.tensors)):
        case.tied |= set(with_tied(mine, other, ties))


def _quantized_names(case: Case) -> set[str]:
    """Return the Hugging Face names of all tensors that make up quantized weights, on either side."""
    out: set[str] = set()
    for view, hubs in ((case.view, case.tensors), (case.reference, case.reference_tensors)):
        if view is not None and hubs:
            weights = quantized.find_quantized(view)
            stored = {*weights, *quantized.members(weights)}
            out |= {n for n, hub in hubs.items() if hub.parts[0].name in stored}
    return out


def packed(hubs: Mapping[str, HfTensor]) -> set[str]:
    """Find, by their names, the weights that have quantization parts beside them, and those parts.

    >>> sorted(packed({"a.weight": None, "a.weight.absmax": None, "b.weight": None}))
    ['a.weight', 'a.weight.absmax']
    """
    parts: set[str] = set()
    for name in hubs:
        if _PACKED_MARK in name or name.endswith(_PACKED_PARTS):
            parts.add(name)
    weights: set[str] = set()
    for name in parts:
        stem = name.partition(_PACKED_MARK)[0] if _PACKED_MARK in name else name
        for end in _PACKED_PARTS:
            stem = stem.removesuffix(end)
        weights |= {w for w in (stem, f"{stem}.weight") if w in hubs}
    return parts | weights


# -- a prefix that all names share ------------------------------------------------------------------------------------


def _match_prefix(case: Case) -> None:
    """Rename the checkpoint's tensors where all names have a prefix too much or lack one; kept as `case.prefix`."""
    wanted = set(case.reference_tensors) or set(architecture.expected(case.config) or ())
    found = _prefix(list(case.tensors), wanted)
    if found is None:
        return
    kind, prefix = found
    renamed: dict[str, HfTensor] = {}
    for name, hub in case.tensors.items():
        made = name.removeprefix(prefix) if kind == "extra" else prefix + name
        renamed[made if name not in wanted and made in wanted else name] = hub
    case.tensors, case.prefix = renamed, found


def _prefix(names: Iterable[str], wanted: set[str]) -> tuple[str, str] | None:
    """Find the prefix without ("extra") or with ("lost") which most names are wanted ones."""
    names = list(names)
    met = sum(n in wanted for n in names)
    if not names or not wanted or met > _MEETING * min(len(names), len(wanted)):
        return None
    best: tuple[int, tuple[str, str]] | None = None
    for kind, one, other in (("extra", names, wanted), ("lost", list(wanted), set(names))):
        for prefix in _leading(one):
            count = sum(n.startswith(prefix) and n[len(prefix) :] in other for n in one)
            if count > max(met, _MEETING * min(len(names), len(wanted))) and (best is None or count > best[0]):
                best = count, (kind, prefix)
    return best[1] if best else None


def _leading(names: Iterable[str]) -> list[str]:
    """Return the prefixes of one to three segments that occur, most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        segments = name.split(".")
        for depth in range(1, min(4, len(segments))):
            prefix = ".".join(segments[:depth]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return sorted(counts, key=lambda p: -counts[p])[:12]


def parameters(case: Case, side: int) -> int | None:
    """Count the parameters of one side (0: checkpoint, 1: reference), tied heads once; None where it was not read."""
    hubs = case.reference_tensors if side else case.tensors
    if (case.reference if side else case.view) is None or (not hubs and case.read_error is not None and not side):
        return None
    own = {n: h for n, h in hubs.items() if h.tied_to is None and not (n in case.tied and h.name != n)}
    view = case.reference if side else case.view
    assert view is not None
    weights = quantized.find_quantized(view)
    scales, known = quantized.members(weights), {n: w.elements for n, w in weights.items() if w.shape is not None}
    stored = {n: h.parts[0].name for n, h in own.items()}
    return sum(known.get(stored[n], elements(h)) for n, h in own.items() if stored[n] not in scales)
