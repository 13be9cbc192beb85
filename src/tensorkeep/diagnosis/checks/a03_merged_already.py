"""A03 merged already (or twice): the weights hold the adapter's update, and loading it would add it again.

What it means
    An adapter was merged into the model, and the model is kept or loaded together with that adapter; or the model got
    the update two times.

How it happens
    A merge left the adapter in place, a merged checkpoint lies under the base's name, or a merge script ran again on
    its own output.

How it shows
    Nothing complains. The update counts double: in one measured case outputs were off by 0.28, where the whole effect
    of the adapter was 0.37.

How it is found
    With adapter and model at hand (either one as checkpoint and the other as `--reference`, or both in one file), the
    coefficient of the update in the weights is measured in every module, with its noise: 0 before a merge, 1 after
    it, 2 after a second one. Once is an error where the adapter is the checkpoint and an info where the model is, since
    a merge makes it so; twice is an error always. An adapter that carries its base's digest finds another digest in
    the merged weights, which is A04 beside it. DoRA rescales the weights, so it is left out; so are adapters that
    start as a part of the base (PiSSA, OLoRA, CorDA, LoftQ), which every base holds once. With a base as reference and
    no adapter, all that can be said is that the difference has low rank: an adapter was merged in (an info).

What to do
    Use the merged model without the adapter, or the adapter on the base that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.shares import Share, times_merged
from tensorkeep.diagnosis.evidence.adapters import Base, adapter_and_base, share
from tensorkeep.diagnosis.evidence.bytewise import elements
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "A03"
_PROBES = 160  # random directions that a low-rank difference is caught with
_LOOKED_AT = 4  # matrices of which the rank is measured


def check(case: Case) -> Iterator[Finding]:
    """Report how often the weights hold an adapter's update; without the adapter, whether a difference has low rank."""
    found = adapter_and_base(case)
    if found is None:
        yield from _low_rank(case)
        return
    adapter, base, model_is_reference = found
    if adapter.residual_start is not None:
        return
    times, figures = times_merged(list(_shares(adapter, base)))
    names = [f"{m}.weight" for m in adapter.pairs]
    # a merged model beside its adapter is what a merge makes; an adapter that is to be loaded onto one is the fault
    alone = adapter.view is not case.view
    if times == 2:
        message = f"the weights hold this adapter's update twice (coefficient {figures['coefficient']})"
        yield Finding(CODE, "error", message, names, figures)
    elif times == 1 and not alone:
        where = "the reference" if model_is_reference else "the model in the same file"
        message = (
            f"{where} holds this adapter's update already (coefficient {figures['coefficient']}): loading it would "
            "add it again"
        )
        yield Finding(CODE, "error", message, names, figures)
    elif times == 1:
        message = (
            "the adapter that stands as reference is merged into these weights, once (coefficient "
            f"{figures['coefficient']})"
        )
        yield Finding(CODE, "info", message, names, figures)


def _shares(adapter: Adapter, base: Base) -> Iterator[Share]:
    """Measure how much of its update each module's weight holds."""
    for module in adapter.pairs:
        name = f"{module}.weight"
        weight = base.quantized.get(name)
        if base.shape(name) and not (weight is not None and weight.problems):
            found = share(adapter, module, base.values(name))
            if found is not None:
                yield found


def _low_rank(case: Case) -> Iterator[Finding]:
    """Report several matrices that differ from the base, all of them by updates of low rank."""
    moved = [
        n for n, seen in case.comparisons.items() if seen.status == "values" and case.claims.get(n) in (None, "V06")
    ]
    matrices = [
        n
        for n in moved
        if len(case.tensors[n].shape) == 2
        and DTYPES[case.tensors[n].dtype].floating
        and DTYPES[case.reference_tensors[n].dtype].floating
    ]
    vectors = [n for n, h in case.tensors.items() if len(h.shape) == 1]
    if len(matrices) < 2 or 2 * sum(n in moved for n in vectors) > len(vectors) > 0:
        return  # an adapter leaves norms alone: what moved everything is training, however low its rank
    by_size = sorted(matrices, key=lambda n: elements(case.tensors[n]))
    chosen = by_size[:: max(len(matrices) // _LOOKED_AT, 1)][:_LOOKED_AT]
    ranks = {n: _update_rank(case.values(n), case.reference_values(n)) for n in chosen}
    if all(r is not None for r in ranks.values()):
        most = max(r for r in ranks.values() if r is not None)
        message = (
            f"{len(matrices)} matrices differ from the reference by updates of rank {most} or less: an adapter was "
            "merged into them (once or more, which only the adapter can tell)"
        )
        yield Finding(CODE, "info", message, matrices, {"ranks": ranks}, explains=("V06",))


def _update_rank(now: Array, before: Array) -> int | None:
    """Measure the rank of a difference of low rank; None where its rank is not low, or rounding hides it.

    Rounding is noise of standard deviation about 0.3 of the last place; the largest singular value of such a matrix
    [N, K] is near deviation · (sqrt(N) + sqrt(K)), and only what stands above it counts.
    """
    change = now.astype(np.float32) - before.astype(np.float32)
    if np.count_nonzero(change) < change.size / 2 or not np.isfinite(change).all():
        return None
    step = max(_step(now), _step(before))
    deviation = 0.3 * step * float(np.sqrt(np.mean(np.square(before.astype(np.float32)))))
    floor = 2 * deviation * (np.sqrt(change.shape[0]) + np.sqrt(change.shape[1]))
    probes = min(*change.shape, _PROBES)
    basis = np.linalg.qr(
        change @ np.random.default_rng(0).standard_normal((change.shape[1], probes), dtype=np.float32)
    )[0]
    values = np.linalg.svd(basis.T @ change, compute_uv=False)
    rest = float(np.sum(np.square(change, dtype=np.float64))) - float(np.sum(np.square(values, dtype=np.float64)))
    rank = int(np.count_nonzero(values > max(floor, 1e-5 * values[0])))
    hidden = rest > 4 * change.size * deviation**2 + 1e-6 * float(np.sum(np.square(values, dtype=np.float64)))
    return None if hidden or not 0 < rank <= min(change.shape) // 4 else rank


def _step(values: Array) -> float:
    """Return the spacing of a dtype's numbers just above 1."""
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(
        values.dtype.name, 2.0**-23 if values.dtype.itemsize >= 4 else 0.125
    )
