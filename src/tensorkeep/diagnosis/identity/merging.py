"""Call an adapter's modules what the base's files call them, so that a merge is planned alike by all who plan it."""

from __future__ import annotations

from collections.abc import Sequence

from tensorkeep.adapters.reading import Adapter
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.fit import Offer
from tensorkeep.conversion.row_maps import Run
from tensorkeep.formats.view import StateView
from tensorkeep.models.names import names_for


def name_as_files(base: StateView, adapters: Sequence[Adapter]) -> None:
    """Call modules what the base's files call them, where transformers' live model has another name for them.

    So it is in models that see too: `model.language_model.layers` is `language_model.model.layers` in Gemma 3's files.

    Args:
        base: the checkpoint to merge into.
        adapters: read from their files; changed in place.
    """
    stored = namings.identify(base).names
    held = set(stored.values())
    wanted = {f"{m}.weight" for a in adapters for m in (*a.pairs, *a.embeddings)}
    wanted |= {n for a in adapters for n in a.saved}
    config = {k: v for k, v in (base.config or {}).items() if k != "quantization_config"}
    if not wanted - held or not config:
        return
    names = names_for(config, {n: Offer(base[s].dtype, base[s].shape) for s, n in stored.items()})
    if names is None:
        return  # the merge says which modules have no place
    runs = {n: names.runs(n) for n in wanted - held}
    found = {n: r[0].name for n, r in runs.items() if r == (Run(r[0].name),) and r[0].name in held}
    for adapter in adapters:
        adapter.rename(found)
