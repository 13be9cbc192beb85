"""What `merge --to-bits` records of how its codes were made, and codes of quantize-aware runs made again for it."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorkeep.commands.sign import Recorded, Recorder, Source
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, read
from tensorkeep.output import Output

# whose source decides which codes are chosen
_ALGORITHM = ("language/_round*.py", "language/rounded_merge.py", "language/_matrices.py", "quantization/**/*.py")
_PIECE = 1 << 20


def rounded(
    recorded: Recorded, sources: Callable[[], Sequence[Source]], computed: Any, onto: str, untie: bool
) -> Recorder:
    """Return what records a merge whose codes are rounded by texts.

    Args:
        recorded: what is asked for.
        sources: gives base and adapters.
        computed: format, texts and device.
        onto: the weights that were added to.
        untie: whether head and embedding were written as two.
    """
    if not recorded.wanted:
        return recorded.of("merge", ())
    from tensorkeep.language.data.sources import expanded

    texts = [{"name": path.name, "sha256": _sha256(path)} for path in expanded(computed.calibrate)]
    made = {"by": "texts", "texts": texts, "device": computed.device, **_program()}
    return recorded.of("merge", sources(), onto=onto, untie=untie, to_bits=computed.to_bits, rounding=made)


def trained(recorded: Recorded, out: Output, run: str, kind: str, ema: bool, scratch: Path) -> Recorder:
    """Return what records a merge into the codes that a quantize-aware run was trained for.

    Args:
        recorded: what is asked for.
        out: is told of damaged checkpoints.
        run: the run, or a step folder in it.
        kind: of the codes.
        ema: whether the averaged weights were taken.
        scratch: where the adapter is written meanwhile; it must not be there.
    """
    if not recorded.wanted:
        return recorded.of("merge", ())
    from tensorkeep.commands.export import base_of_run, read_run, run_at

    found = run_at(run)
    assert found is not None
    base = read(base_of_run(found))
    sources = [(base, "base", 1.0), (read_run(out, found, scratch, ema), "adapter", 1.0)]
    made = {"by": "training", "averaged": ema, **_program()}
    return recorded.of("merge", sources, to_bits=kind, rounding=made)


def trained_again(sources: Sequence[Any], recipe: Any, progress: Any) -> Any:
    """Make the codes of a quantize-aware run again, in a temporary folder, and identify them.

    Args:
        sources: base and adapter, as of `check_derivation`; the adapter must have been given as the run.
        recipe: of the merge.
        progress: as of `identify`.

    Returns:
        The identity; None where no run of that format was given.

    Raises:
        TensorkeepError: F07 where it names other sources than one base and one adapter, F03 where these are not what
            the run was trained on and what it trained.
    """
    from tensorkeep.commands.export import run_at
    from tensorkeep.conversion.execution import convert
    from tensorkeep.diagnosis.identity.identify import identify

    if [s.role for s in sources] != ["base", "adapter"] or sources[1].weight != 1.0:
        what = "says that codes of a run were made from other sources than one base and one adapter, taken once"
        raise TensorkeepError(what, where=sources[0].path, code="F07")
    run = run_at(sources[-1].path) if sources[-1].path != sources[0].path else None
    if run is None or not run.adapter or run.detection:
        return None
    from tensorkeep.language.aware_merge import aware_kind, aware_merge

    if aware_kind(run.path) != recipe.get("to_bits"):
        return None
    averaged = recipe["rounding"].get("averaged") is True
    with tempfile.TemporaryDirectory(prefix="tensorkeep-") as folder:
        _refuse_others(sources, run, averaged, Path(folder) / "adapter")
        made = aware_merge(run.path, Path(folder) / "merged", averaged)
        sink = str(Path(folder) / ("out" if made.to == "hf" else "out.gguf"))
        convert(made.plan, sink, made.to, None, False, progress)
        return identify(sink, progress)


def _refuse_others(sources: Sequence[Any], run: Any, averaged: bool, scratch: Path) -> None:
    """Refuse sources that are not the run's own base and adapter: the codes are made from these, whatever is named."""
    from tensorkeep.commands.export import base_of_run
    from tensorkeep.diagnosis.identity.identify import identify
    from tensorkeep.language.export import exported

    exported(run.path, scratch, ema=averaged, check=False)
    held = {"base": base_of_run(run), "adapter": str(scratch)}
    for source in sources:
        found, named = identify(read(held[source.role])).identity, source.model.identity
        if found != named:
            what = f"was trained with the {source.role} {found}, and its codes are said to be made with {named}"
            raise TensorkeepError(what, where=run.path, code="F03")


def opened_average(out: Output, path: str, scratch: Path) -> StateView | None:
    """Open the averaged adapter of a run; None of anything else.

    Args:
        out: is told of damaged checkpoints.
        path: as the user gave it.
        scratch: where it is written; it must not be there.
    """
    from tensorkeep.commands.export import adapter_run, read_run

    run = adapter_run(path)
    return read_run(out, run, scratch, ema=True) if run is not None and run.averaged else None


def _program() -> dict[str, Any]:
    """Say which program chose the codes: two of one hash choose alike on one machine."""
    top, state = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted({path for pattern in _ALGORITHM for path in top.glob(pattern)}):
        state.update(f"{path.relative_to(top).as_posix()}\0".encode() + path.read_bytes())
    version = sys.modules["tensorkeep"].__version__
    return {"tensorkeep": version, "algorithm_sha256": state.hexdigest()}


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                state.update(piece)
    except OSError as error:
        raise TensorkeepError(f"cannot be read: {error.strerror}", where=path) from None
    return state.hexdigest()
