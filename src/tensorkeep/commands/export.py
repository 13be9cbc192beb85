"""What `convert` makes of a run besides its plain weights: an adapter, the average, a resume file of MiniMind."""

from __future__ import annotations

from pathlib import Path

from tensorkeep.errors import TensorkeepError, word
from tensorkeep.output import Output
from tensorkeep.storage import run_folder


def of_run(out: Output, source: str, sink: str, to: str, naming: str | None, ema: bool, overwrite: bool) -> int | None:
    """The exit code, or None where the source is no run or plain weights are wanted, which `convert` streams itself."""
    resume = to == "pth" and naming == "minimind" and sink.endswith("_resume.pth")
    folder = Path(source)
    run = "://" not in source and (folder / run_folder.CHECKPOINTS).is_dir() and (folder / "recipe.yaml").is_file()
    if resume:
        return _minimind_resume(out, source, sink, overwrite)
    if ema and not (run and to in ("hf", "peft")):
        raise TensorkeepError("--ema is about a run, --to hf or peft", hint="tensorkeep convert RUN OUT --to hf --ema")
    found = run_folder.find_checkpoint(folder.resolve()) if run else None
    adapter = found is not None and (found[0] / run_folder.ADAPTER).is_file()
    if not run or not (ema or (adapter and to in ("hf", "peft"))):
        return None
    if adapter != (to == "peft"):
        what = "holds an adapter" if adapter else "holds a whole model"
        hint = f"tensorkeep convert {word(source)} OUT --to {'peft' if adapter else 'hf'}" + (" --ema" if ema else "")
        raise TensorkeepError(what, where=source, code="K08", hint=hint)
    from tensorkeep.language.export import exported

    exported(source, sink, ema=ema, overwrite=overwrite)
    averaged = ema and (found is not None and (found[0] / run_folder.EMA).is_file())
    if out.json:
        out.document({"sink": sink, "format": to, "averaged": averaged})
    out.line(f"{sink}: {'the adapter' if adapter else 'the model'}, {'averaged' if averaged else 'last'} weights")
    if adapter:
        out.remark(f"merge it: tensorkeep merge BASE {word(sink)} OUT")
    return 0


def _minimind_resume(out: Output, run: str, sink: str, overwrite: bool) -> int:
    """A run as a resume file of MiniMind; only a run has what such a file holds."""
    from tensorkeep.language.minimind.export import export_resume

    made = export_resume(run, sink, overwrite=overwrite)
    for note in made.notes:
        out.remark(f"note: {note.code} {note.message}")
    if out.json:
        out.document(
            {
                "sink": made.path,
                "format": "pth",
                "naming": "minimind",
                "epoch": made.epoch,
                "step": made.step,
                "world_size": made.world_size,
                "notes": [{"code": n.code, "message": n.message} for n in made.notes],
            }
        )
    out.line(f"{made.path}: MiniMind's epoch {made.epoch}, step {made.step}, proven equal to the run but for fp16")
    return 0
