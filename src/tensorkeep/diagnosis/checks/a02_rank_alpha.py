"""A02 rank/alpha differ from the weights: adapter_config.json does not describe the tensors beside it.

What it means
    Something in the config contradicts the tensors: `r` or `rank_pattern` is not the number of rows of A and columns
    of B; one half of a pair is missing; `use_dora` does not fit the magnitude vectors; targets or saved modules have
    no tensors; or alpha is no number; or PEFT's tensors lie there without the config, and nothing says alpha.

How it happens
    The config was edited or copied from another run, or the file was saved in part. Files of MiniMind hold no rank
    and no alpha, and were loaded with another version's default (rank 8 instead of 16).

How it shows
    PEFT raises for a wrong rank. A wrong alpha is silent: the update is scaled by another factor. rsLoRA scales by
    alpha / sqrt(r) instead of alpha / r, so a lost `use_rslora` is off by sqrt(r). A DoRA adapter read without
    `use_dora` loses its magnitudes.

What to do
    Take the config that was saved with the weights. The rank is what the tensors say; alpha is in no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.adapters.reading import Adapter, pattern
from tensorkeep.diagnosis.evidence.adapters import checkpoint_adapter
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import shown
from tensorkeep.findings import Finding

CODE = "A02"


def check(case: Case) -> Iterator[Finding]:
    """Report wrong ranks and missing halves (errors) and what the config lists and no tensor holds (warnings)."""
    adapter = checkpoint_adapter(case)
    if adapter is None:
        return
    if adapter.lone:
        yield Finding(
            CODE, "error", f"{len(adapter.lone)} halves of low-rank pairs without the other half", adapter.lone
        )
    uneven = {
        m: (adapter.view[a].shape, adapter.view[b].shape)
        for m, (a, b) in adapter.pairs.items()
        if not _even(adapter, a, b)
    }
    if uneven:
        module, (first, second) = next(iter(uneven.items()))
        message = f"{len(uneven)} pairs have no rank in common: {module} A {list(first)}, B {list(second)}"
        yield Finding(CODE, "error", message, list(uneven))
    if adapter.unscaled and len(adapter.view) == 2 * len(adapter.pairs):
        message = "no adapter_config.json beside PEFT's tensors: what they are scaled by is not known"
        yield Finding(CODE, "error", message, fix="copy the adapter_config.json that was saved with them")
    if str(adapter.document.get("peft_type", "")).upper() == "LORA":
        yield from _against_config(adapter, set(uneven))


def _even(adapter: Adapter, a: str, b: str) -> bool:
    """Say whether the rows of A are as many as the columns of B."""
    first, second = adapter.view[a].shape, adapter.view[b].shape
    return len(first) >= 2 and len(second) >= 2 and first[0] == second[1]


def _several(adapter: Adapter, said: object, module: str) -> bool:
    """Whether a pair may be those of several experts side by side (target_parameters), each of the config's rank."""
    patterns = adapter.document.get("rank_pattern")
    ranks = [said, adapter.document.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    numbers = [r for r in ranks if isinstance(r, int) and r > 0]
    return bool(adapter.document.get("target_parameters")) and any(adapter.rank(module) % r == 0 for r in numbers)


def _against_config(adapter: Adapter, uneven: set[str]) -> Iterator[Finding]:
    """Report ranks, scales and DoRA's magnitudes that are not what the config says."""
    document, odd, scales = adapter.document, {}, []
    for module in adapter.pairs:
        if module in uneven:
            continue
        said = pattern(document.get("rank_pattern"), module) or document.get("r")
        if said != adapter.rank(module) and not _several(adapter, said, module):
            odd[module] = (said, adapter.rank(module))
        if not adapter.scale(module):
            scales.append(module)
    if odd:
        module, (said, there) = next(iter(odd.items()))
        message = f"{len(odd)} modules have another rank than the config says: {module} {there}, config {shown(said)}"
        yield Finding(CODE, "error", message, list(odd), {"config": shown(said), "weights": there})
    if scales:
        message = (
            f"lora_alpha {shown(document.get('lora_alpha'))} scales {len(scales)} modules by nothing or by no number"
        )
        yield Finding(CODE, "error", message, scales)
    dora = bool(document.get("use_dora"))
    if dora != bool(adapter.magnitudes) and (dora or adapter.magnitudes):
        what = (
            "no magnitude vectors" if dora else f"{len(adapter.magnitudes)} magnitude vectors, which would be dropped"
        )
        yield Finding(
            CODE, "error", f"use_dora is {str(dora).lower()} and there are {what}", list(adapter.magnitudes.values())
        )
    yield from _promised(adapter)


def _promised(adapter: Adapter) -> Iterator[Finding]:
    """Report targets and saved modules that the config lists and no tensor belongs to."""
    present = [*adapter.pairs, *adapter.embeddings]
    for key, modules in (
        ("target_modules", present),
        ("modules_to_save", [n.rpartition(".")[0] for n in adapter.saved]),
    ):
        listed = adapter.document.get(key)
        if not isinstance(listed, list):
            continue
        unused = [t for t in listed if isinstance(t, str) and not any(m == t or m.endswith(f".{t}") for m in modules)]
        if unused:
            message = f"{key} lists {', '.join(shown(u) for u in unused[:6])}, and no tensor belongs to it"
            yield Finding(CODE, "warning", message, (), {key: unused[:32]})
