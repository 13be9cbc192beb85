"""Carry out a plan: stream every tensor into its file, read the result back, leave a certificate.

All files are laid out before the first byte is written, so several threads fill them at once, each holding one chunk of
a tensor (`writing`). The output appears under its name only after it has been read back and the digest of every tensor
equals that of the bytes that were written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.proof import certify, check_sources, prove
from tensorkeep.conversion.sink import Checks, Progress, Result, placing, quiet, refuse_overlap, result_of, sink_files
from tensorkeep.conversion.writing import Place, write_files
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import local_path
from tensorkeep.storage.overwriting import refuse_existing
from tensorkeep.storage.placement import write_bytes


def convert(
    plan: Plan, out: str, to: str, shard_size: int | None = None, overwrite: bool = False, progress: Progress = quiet
) -> Result:
    """Write a plan's tensors to a file, a folder or an object store, and prove that they are there.

    Args:
        plan: from `make_plan`.
        out: a local path or a URL (`s3://bucket/name`). A name that ends in .safetensors, .pth, .pt, .bin or .ckpt is
            one file, any other a folder.
        to: the format, "hf", "dcp", "pth" or "peft".
        shard_size: largest size of one weight file in bytes; None for the format's usual one.
        overwrite: replace what is there, if it is a checkpoint and nothing else.
        progress: called as `progress(what, done, total)` with bytes while it runs.

    Returns:
        Where the output is, the digest of each of its tensors, and how long it took.

    Raises:
        TensorkeepError: the output exists, overlaps a source or cannot be written; a source changed while it was read,
            or is not what its certificate says; the output read back differs (F03). Then nothing is left under `out`;
            where a store failed, what it has stays as unfinished uploads, and the same call goes on from them.

    Example:
        >>> convert(make_plan([read("model.gguf")], "hf"), "model", "hf").nbytes  # doctest: +SKIP
        269060552
    """
    checks = Checks(lambda sums: check_sources(plan, sums), lambda _: None, lambda sums: certify(plan, sums, to))
    return carry_out(plan, plan.sources, checks, out, to, shard_size, overwrite, progress)


def carry_out(
    plan: Plan,
    sources: Sequence[StateView],
    checks: Checks,
    out: str,
    to: str,
    shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Write a plan's tensors, prove them, and put them under their name with their certificate.

    Args:
        plan: what is written.
        sources: every checkpoint that is read, which the output may not overlap.
        checks: what is asked of the output beside that it reads back as it was made.
        out: as in `convert`, like all that follow.
        to: the format.
        shard_size: largest size of one weight file.
        overwrite: replace what is there.
        progress: called as it runs.

    Returns:
        As `convert`.

    Raises:
        TensorkeepError: as `convert`, and what the checks raise.
    """
    for view in sources:
        view.checked = True  # every byte passes through here anyway: notice what rotted
    out = out.removeprefix("file://")
    if "://" in out:
        from tensorkeep.conversion._remote import carry_out_remote

        return carry_out_remote(plan, sources, checks, out, to, shard_size, overwrite, progress)
    final = local_path(out)
    refuse_overlap(final, sources)
    refuse_existing(final, overwrite, CHECKPOINT)
    layouts, single = sink_files(plan, final.name, to, shard_size)
    with placing(final, layouts, single, overwrite) as place:
        started = time.perf_counter()
        read_back: dict[Place, str] = {}
        sums = write_files(place.layouts, place.folder, plan, progress, read_back)
        checks.sources(sums)
        written = time.perf_counter()
        prove(place.temporary, plan, sums, progress, read_back)
        checks.values(sums)
        proven = time.perf_counter()
        write_bytes(place.certificate, checks.certificate(sums))
    seconds = {"write": written - started, "prove": proven - written, "sync": time.perf_counter() - proven}
    return result_of(str(final), layouts, sums, seconds)
