"""`tensorkeep merge --prove-forward TEXT`: the merged model computes what PEFT computes with the adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.formats.view import StateView
from tensorkeep.output import Output
from tensorkeep.storage.placement import replacing


def merge_proven_forward(
    out: Output,
    job: Any,
    base: StateView,
    sink: str,
    texts: Sequence[str],
    device: str | None,
    limit: int | None,
    overwrite: bool,
    progress: Callable[[str, int, int], None],
) -> Any:
    """Carry out a merge plan; the result gets its name once every layer computes what it does with the adapter in PEFT.

    Args:
        out: where to remark.
        job: the plan, of an hf folder.
        base: what the adapter is merged into.
        sink: the folder to write.
        texts: files to run the models on.
        device: to compute on; None: a GPU where there is one.
        limit: bytes of a weight file.
        overwrite: replace what is there.
        progress: called as `progress(what, done, total)`.

    Returns:
        What the merge did.

    Raises:
        TensorkeepError: V06 names the first layer that differs by more than rounding; without a code where PEFT cannot
            run the adapter, or there is more than one.
    """
    from tensorkeep.adapters import merging
    from tensorkeep.language.forward_proof import prove_forward

    if len(job.sources) != 1 or job.sources[0].weight != 1 or "://" in sink:
        what = "one adapter, added whole, into a local folder is compared with PEFT"
        raise TensorkeepError(what, where="--prove-forward", hint="leave --prove-forward out")
    with replacing(Path(sink).absolute(), overwrite, CHECKPOINT) as temporary:
        done = merging.merge(job, str(temporary), "hf", limit, False, progress)
        kind = None if job.onto == "original" else job.kind
        adapter = job.sources[0].adapter.view.folder  # of a run: what PEFT is given of it
        checks = prove_forward(str(temporary), base, kind, str(adapter.url), texts, device, out.remark)
        _refuse(checks, sink)
    quiet = [check.name for check in checks[:-1] if not check.told]
    worst = max(checks[:-1], key=lambda check: check.difference / check.allowed)
    out.line(f"forward: {len(checks) - 1} layers compute what PEFT computes with the adapter")
    most = f"{100 * worst.difference:.2g} % ({worst.name})"
    out.line(f"they differ by {most} at most, where rounding may make {100 * worst.allowed:.2g} %")
    whole = checks[-1]
    out.line(f"logits differ by {100 * whole.difference:.2g} %, without the adapter by {100 * whole.effect:.2g} %")
    if quiet:
        what = f"in {len(quiet)} layers the adapter does less than rounding may, so nothing is proven of them"
        out.remark(f"note: {what}, first {quiet[0]}")
    done.path = sink
    return done


def _refuse(checks: Sequence[Any], sink: str) -> None:
    """Raise V06 with the first layer that differs by more than rounding."""
    odd = next((check for check in checks if not check.equal), None)
    if odd is None:
        return
    what = f"{odd.name} differs from PEFT's with the adapter active by {100 * odd.difference:.2g} %"
    what += f", where rounding makes {100 * odd.allowed:.2g} % at most and the adapter {100 * odd.effect:.2g} %"
    hint = "nothing is written; the base or the adapter packs or orders its rows otherwise than PEFT takes them"
    raise TensorkeepError(what, where=sink, hint=hint, code="V06")
