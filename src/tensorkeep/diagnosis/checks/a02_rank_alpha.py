"""A02 rank/alpha differ from the weights: adapter_config.json does not describe the tensors beside it.

What it is
    `r` and `rank_pattern` against the rows of A and the columns of B; halves without the other; `use_dora` against the
    magnitude vectors; targets and saved modules without tensors; an alpha that is no number.

How it happens
    A config edited or copied from another run; a file saved in part; MiniMind files, which hold no rank and no alpha,
    loaded with another generation's default (rank 8 against 16).

How it shows
    A wrong rank raises in PEFT. A wrong alpha is silent: the update is scaled by another factor. rsLoRA scales by
    alpha / sqrt(r) instead of alpha / r, so a lost `use_rslora` is off by sqrt(r). A DoRA adapter read without
    `use_dora` drops its magnitudes.

What to do
    Take the config that was saved with the weights. Rank is what the tensors say; alpha is in no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.adapters import Adapter, checkpoint_adapter, pattern
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import shown
from tensorkeep.findings import Finding

CODE = "A02"


def check(case: Case) -> Iterator[Finding]:
    """Errors for ranks and halves, warnings for what the config promises and no tensor holds."""
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
        yield Finding(
            CODE,
            "error",
            f"{len(uneven)} pairs have no rank in common: {module} A {list(first)}, B {list(second)}",
            list(uneven),
        )
    if str(adapter.document.get("peft_type", "")).upper() == "LORA":
        yield from _against_config(adapter, set(uneven))


def _even(adapter: Adapter, a: str, b: str) -> bool:
    first, second = adapter.view[a].shape, adapter.view[b].shape
    return len(first) >= 2 and len(second) >= 2 and first[0] == second[1]


def _against_config(adapter: Adapter, uneven: set[str]) -> Iterator[Finding]:
    document, odd, scales = adapter.document, {}, []
    for module in adapter.pairs:
        if module in uneven:
            continue
        said = pattern(document.get("rank_pattern"), module) or document.get("r")
        if said != adapter.rank(module):
            odd[module] = (said, adapter.rank(module))
        if not adapter.scale(module):
            scales.append(module)
    if odd:
        module, (said, there) = next(iter(odd.items()))
        yield Finding(
            CODE,
            "error",
            f"{len(odd)} modules have another rank than the config says: {module} {there}, config {shown(said)}",
            list(odd),
            {"config": shown(said), "weights": there},
        )
    if scales:
        yield Finding(
            CODE,
            "error",
            f"lora_alpha {shown(document.get('lora_alpha'))} scales {len(scales)} modules by nothing or by no number",
            scales,
        )
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
    """Targets and saved modules that the config lists and no tensor belongs to."""
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
            yield Finding(
                CODE,
                "warning",
                f"{key} lists {', '.join(shown(u) for u in unused[:6])}, and no tensor belongs to it",
                (),
                {key: unused[:32]},
            )
