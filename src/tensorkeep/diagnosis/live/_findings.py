"""Report the tensors of a loaded model that are missing, dropped or different, and why, where nearly all are.

`_tensors` compares one tensor with the file; this gathers the results by code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.live import _quantized
from tensorkeep.diagnosis.live._tensors import Mismatch, mismatch, packed, same, twin
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped
from tensorkeep.models import adapter_names
from tensorkeep.models.counterpart import CounterpartFinder, StoredModel
from tensorkeep.models.names import names_for
from tensorkeep.models.tensors import Held, local
from tensorkeep.models.unsaved import computed_values
from tensorkeep.quantization.stored import find_quantized, members

_TITLES = {
    "K01": "have nothing in the file",
    "V03": "hold what an initialiser gave",
    "V04": "are at their default",
    "V05": "are all zeros",
    "V01": "hold values that are not finite",
    "V02": "lost precision on the way",
    "V06": "differ from the file",
    "V07": "differ in few elements",
    "O01": "have their rows in the other RoPE layout",
    "O02": "hold another layer's tensor",
    "O03": "hold another tensor of the file",
    "S01": "have another shape than in the file",
    "S02": "have other rows than the file's vocabulary",
    "S03": "are transposed",
    "T02": "hold the embedding, and the file has a head of its own",
}
ORDER = ("K01", "S02", "S03", "S01", "T02", "O01", "O02", "O03", "V03", "V04", "V05", "V01", "V07", "V02", "V06")


def tensor_findings(model: nn.Module, tensors: list[Held], source: StoredModel) -> Iterator[Finding]:
    """Compare a model's parameters and persistent buffers with a checkpoint.

    Args:
        model: The model in memory.
        tensors: Its tensors.
        source: The checkpoint.

    Raises:
        TensorkeepError: Where most names cannot be translated, with what is missing for it.
    """
    if source.view.format == "peft":
        tensors = adapter_names.in_files(model, tensors, source.stored)
    flat = [t.name for t in tensors if t.name.endswith("_flat_param")]
    for name in flat:
        message = "FSDP1 keeps its parameters in flat tensors, which cannot be compared"
        fix = "use FSDP2 (fully_shard), or call this within FullyShardedDataParallel.summon_full_params"
        yield Finding("K08", "warning", message, [name], fix=fix)
    seen = _compare_all(model, [t for t in tensors if t.name not in flat], source)
    if source.problem is not None and len(seen.missing) > seen.compared:
        raise source.problem
    if not seen.compared and not seen.skipped and (tensors or source.view.format == "peft"):
        theirs, mine = next(iter(source.stored), "nothing"), tensors[0].name if tensors else "no adapter"
        message = f"no tensor of the model has a counterpart in the file: {mine} against {theirs}; nothing was loaded"
        yield Finding("K05", "error", message, [], {"model": len(tensors), "file": len(source.view)})
        return
    if seen.skipped:
        message = f"{len(seen.skipped)} quantized tensors were not compared: the model holds codes, the file may not"
        yield Finding("Q02", "info", message, seen.skipped)
    if seen.within:
        message = f"{len(seen.within)} quantized tensors are the file's within their quantization; less is not seen"
        yield Finding("Q02", "info", message, seen.within)
    made = _computed(model, seen.missing) if seen.missing else {}
    right, wrong = ([n for n, equal in made.items() if equal is what] for what in (True, False))
    if right:
        message = f"{len(right)} tensors are in no file and hold what the model computes for them"
        yield Finding("K01", "info", message, right)
    if wrong:
        message = f"{len(wrong)} tensors are in no file and do not hold what the model computes for them: {_few(wrong)}"
        yield Finding("B01", "error", message, wrong)
    seen.missing = [m for m in seen.missing if m.name not in made]
    yield from _missing(seen.missing, tensors, source, adapter_names.parts_of(model))
    yield from _dropped(model, tensors, source, bool(seen.missing))
    yield from _gathered(seen.found)
    yield from _cause(model, seen.found, seen.compared, source)


def _computed(model: nn.Module, missing: Iterable[Held]) -> dict[str, bool]:
    """Say of tensors that transformers leaves out of files (Marian's positions) whether they are what it computes."""
    values = {id(model.get_parameter(name)): made for name, made in computed_values(model).items()}
    out = {}
    for item in missing:
        if id(item.tensor) in values and not item.tensor.is_meta:
            mine, at = local(item.tensor.detach())
            whole = values[id(item.tensor)].to(mine.dtype)
            out[item.name] = same(mine.cpu(), whole[tuple(slice(o, o + s) for o, s in zip(at, mine.shape))])
    return out


@dataclass
class _Seen:
    """What a comparison of all tensors gave.

    `within`: quantized ones that agree with the file's floats as far as quantization allows; `skipped`: quantized ones
    that could not be compared.
    """

    compared: int = 0
    found: list[Mismatch] = field(default_factory=list)
    missing: list[Held] = field(default_factory=list)
    within: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def _compare_all(model: nn.Module, tensors: list[Held], source: StoredModel) -> _Seen:
    """Compare every tensor of the model with its counterpart in the file."""
    finder = CounterpartFinder(model, tensors, source, names_for)
    described = find_quantized(source.view) if any(packed(t.tensor) for t in tensors) else {}
    source.used.update(members(described))  # scales are no parameters of the model
    seen = _Seen()
    for item in tensors:
        pairs = [(name, p) for name in (item.name, *item.aliases) if (p := finder.parts(item, name))]
        if not pairs:
            seen.missing.append(item)
        elif packed(item.tensor):
            odd = _quantized.compare(item, pairs[0][1], source, described)
            seen.compared += odd is not False
            if isinstance(odd, Mismatch):
                seen.found.append(odd)
            elif odd is False:
                seen.skipped.append(item.name)
            elif pairs[0][1][0].name not in described:
                seen.within.append(item.name)
        else:
            for name, parts in pairs:
                seen.compared += 1
                differs = mismatch(_as_stored(item) if name in finder.turned else item, parts, source)
                if differs is not None:
                    differs.name = name
                    again = differs.code in ("V03", "V06")
                    seen.found.append(_renamed(differs, item, parts[0].name, source) if again else differs)
    return seen


def _as_stored(item: Held) -> Held:
    """Return a tensor whose matrices files hold turned, as they hold it."""
    return item._replace(tensor=item.tensor.detach().transpose(-1, -2).contiguous())


def _renamed(odd: Mismatch, item: Held, stored: str, source: StoredModel) -> Mismatch:
    """Give a mismatch the code that fits when the values are those of another stored tensor."""
    other = twin(item, source)
    if other is None or other == stored:
        return odd
    ours, theirs = (re.sub(r"\.\d+\.", ".N.", n) for n in (stored, other))
    head = any(odd.name.endswith(n) for n in ("lm_head.weight", "output.weight"))
    code = "T02" if head and "embed" in other else "O02" if ours == theirs else "O03"
    return Mismatch(odd.name, code, f"holds {other} of the file", {**odd.evidence, "holds": other})


def _missing(
    missing: list[Held], tensors: list[Held], source: StoredModel, parts: Collection[str]
) -> Iterator[Finding]:
    """Report tensors of the model that are not in the file. `parts`: what adapters are called in this model."""
    own = source.view.format == "peft"
    adapters = [m for m in missing if not own and adapter_names.is_adapter(m.name, parts)]
    rest = [m for m in missing if own or not adapter_names.is_adapter(m.name, parts)]
    if adapters:
        message = f"{len(adapters)} adapter tensors are not in the file, as it should be for its base"
        yield Finding("K01", "info", message, [m.name for m in adapters])
    head = [m for m in rest if m.name == hf.HEAD and hf.tied(dict(source.config) if source.config else None)]
    for item in head:
        # meta construction breaks ties: the head is then a tensor of its own that no file fills
        embedding = next((t.tensor for t in tensors if t.name == hf.EMBEDDING), None)
        equal = embedding is not None and same(*(local(t.detach())[0].cpu() for t in (item.tensor, embedding)))
        said = (
            "a copy of the embedding, equal now: training will part them"
            if equal
            else "another tensor that nothing filled"
        )
        message = (
            f"the config ties lm_head to the embedding, the file holds one tensor for both, and in "
            f"the model the head is {said}"
        )
        yield Finding("T01", "warning" if equal else "error", message, [item.name], fix="model.tie_weights()")
    rest = [m for m in rest if m not in head]
    if rest:
        names = [m.name for m in rest]
        message = f"{len(names)} tensors of the model are not in the file and hold what they held before: {_few(names)}"
        yield Finding("K01", "error", message, names, {"model": len(names), "file": len(source.view)})


def _dropped(model: nn.Module, tensors: list[Held], source: StoredModel, some_missing: bool) -> Iterator[Finding]:
    """Report tensors of the file that nothing in the model asked for."""
    left = [s for s in source.stored.values() if s not in source.used and s not in source.computed]
    buffers = {n for n, _ in model.named_buffers()}
    left = [s for s in left if not any(b.endswith(s) or s.endswith(b) for b in buffers)]
    spare = [s for s in left if s.endswith(("lm_head.weight", "output.weight")) and _stands_for_embedding(s, source)]
    left = [s for s in left if s not in spare]
    if not left:
        return
    heads = not some_missing and all(
        re.search(r"(^|\.)(lm_head|score|classifier|output)\.(weight|bias)$", s) for s in left
    )
    headless = heads and not any(re.search(r"(^|\.)(lm_head|score|classifier|output)\.", t.name) for t in tensors)
    message = f"{len(left)} tensors of the file have no place in the model and were dropped: {_few(left)}"
    yield Finding("K07", "warning" if headless else "error", message, left, {"file": len(source.view)})


def _stands_for_embedding(head: str, source: StoredModel) -> bool:
    """Say whether the file's head equals its embedding, so that a model which ties them loses nothing."""
    names = [s for c, s in source.stored.items() if c.endswith(("embed_tokens.weight", "tok_embeddings.weight"))]
    record = source.view[head]
    return any(
        source.view[n].shape == record.shape and source.view.digest(n) == source.view.digest(head) for n in names
    )


def _gathered(found: Iterable[Mismatch]) -> Iterator[Finding]:
    """Make one finding for each code, with the figures of each tensor."""
    for code in ORDER:
        mine = [m for m in found if m.code == code]
        quiet = [m for m in mine if m.evidence.get("compared") is False]
        loud = [m for m in mine if m not in quiet]
        if loud:
            names = list(dict.fromkeys(m.name for m in loud))
            detail = {m.name: {"says": m.words, **m.evidence} for m in loud[:50]}
            first = f"{loud[0].name} {loud[0].words}"
            said = first if len(loud) == 1 else f"{len(names)} tensors {_TITLES[code]}: {_few(names)}; {first}"
            yield Finding(code, "error", said, names, {"tensors": detail})
        if quiet:
            yield Finding(
                code, "info", f"{len(quiet)} tensors were not compared: {quiet[0].words}", [m.name for m in quiet]
            )


def _cause(model: nn.Module, found: list[Mismatch], compared: int, source: StoredModel) -> Iterator[Finding]:
    """Name the cause where nearly nothing was loaded and the file's names are not the model's."""
    if not compared or len(found) < 0.9 * compared:
        return
    raw = {*dict(model.named_parameters(remove_duplicate=False)), *model.state_dict()}
    if len(raw & set(source.view)) > 0.5 * compared:
        return
    identity = source.identity
    codes = sorted({m.code for m in found})
    if identity.wrappers:
        code, words = "K03", f"the file's names carry the wrappers {', '.join(identity.wrappers)}"
    elif identity.root:
        code, words = "K04", f"the file nests the model under {identity.root!r}"
    else:
        code, words = "K06", f"the file's names follow {identity.naming or 'a scheme of their own'}, the model's do not"
    example = f"{next(iter(raw))} against {next(iter(source.view))}"
    message = f"{words}: the loader found none of these names and loaded nothing ({example})"
    yield Finding(code, "error", message, [], {"differ": len(found), "compared": compared}, explains=codes)


def _few(names: list[str]) -> str:
    """List the first names, those of equal layers together."""
    shown = grouped(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
