"""Chapter `qlora`: train a low-rank adapter on SmolLM2 in 4 bits, evaluate its average, merge it, and compare.

The merge adds the adapter to the weights it was trained on (nf4, dequantized): transformers loads the result with
nothing missing, and its logits are the adapted model's. What a merge back into nf4 would have kept is shown beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from tensorkeep.adapters import merging
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.commands.demo.resume import empty, hf_folder, write_topics
from tensorkeep.commands.demo.story import Show, load_hf
from tensorkeep.formats.view import read
from tensorkeep.language import job as language
from tensorkeep.language.evaluation import evaluate_checkpoint
from tensorkeep.language.export import exported
from tensorkeep.language.generation import generate
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import load_tokenizer
from tensorkeep.output import Output
from tensorkeep.training.loop import fit

if TYPE_CHECKING:
    from tensorkeep.training.job import Job

TOPICS, HELD_OUT = ("customization", "attribute-access"), ("calls",)  # of pydoc: texts that every Python carries
UPDATES, BATCH, LENGTH = 12, 4, 128
HELD_OUT_CHARACTERS = 4000  # of the held-out topics: 8 rows or so
PROMPT, WORDS = "When a method is called, the instance", 24
CLOSE = 2e-6  # logits of the merged against the adapted model in float32: |difference| / |logits|


@dataclass(frozen=True)
class Trained:
    """The live job after its run, and perplexities on held-out text: before, of the average, of the last weights."""

    job: Job
    before: float
    averaged: float
    last: float
    spoken: str  # by the quantized base, before


def chapter_qlora(out: Path, show: Show) -> int:
    """Train, evaluate, export, merge, compare; return 0 if perplexity fell and the merged model is the adapted one."""
    started = time.perf_counter()
    base = hf_folder(out, show, "1/6")
    folder = empty(out / "qlora")
    text, held_out = write_topics(folder / "text.txt", TOPICS), write_topics(folder / "held-out.txt", HELD_OUT)
    held_out.write_text(held_out.read_text("utf-8")[:HELD_OUT_CHARACTERS], "utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(qlora_recipe(base, text, held_out), sort_keys=False))
    held = trained_and_merged(recipe, base, folder, held_out, show)
    show(f"{'All of it held' if held else 'NOT ALL OF IT HELD'}; {time.perf_counter() - started:.0f} s.")
    show(_next_commands(base, folder, held_out))
    return 0 if held else 1


def qlora_recipe(base: Path, text: Path, held_out: Path) -> dict[str, Any]:
    """Return a small `smollm2_qlora`: nf4 under an adapter of rank 16 on every linear, and an average."""
    return {
        "version": 2,
        "model": str(base),
        "objective": "pretrain",
        "data": {"files": [str(text)], "length": LENGTH, "packing": "concatenate"},
        "evaluation": {"files": [str(held_out)]},
        "adapter": {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "targets": ["all-linear"]},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.1},
        "training": {
            "updates": UPDATES,
            "batch_size": BATCH,
            "micro_batch": BATCH,
            "ema": 0.8,
            "quantize_backbone": "nf4",
            "log_every": 1,
        },
    }


def trained_and_merged(recipe: Path, base: Path, folder: Path, held_out: Path, show: Show) -> bool:
    """Play the story between recipe and last line; return whether every promise held."""
    show(f"2/6  {UPDATES} updates of rank 16 on all linears, the base in nf4, on pydoc's {', '.join(TOPICS)}:")
    done = train(recipe, folder / "run", show)
    show(f"3/6  Perplexity on text it has not seen (pydoc's {', '.join(HELD_OUT)}):")
    show(
        f"     {done.before:8.4f}  before\n     {done.averaged:8.4f}  after, under the average of the weights\n"
        f"     {done.last:8.4f}  after, the last weights"
    )
    again = perplexity(folder / "run", held_out)
    show(f"     {again:8.4f}  the average as its checkpoint gives it to a new model")

    adapter = exported(folder / "run", folder / "adapter")
    show(
        f"4/6  The average as an adapter: {adapter}, {megabytes(adapter):.1f} MB for a base of {megabytes(base):.0f} MB"
    )

    merged = folder / "merged"
    close = merge_and_show(base, adapter, merged, show)
    show("6/6  Is it the model that was trained? Loaded by from_pretrained, nothing missing, nothing left over:")
    model = load_hf(merged).float().eval()
    far, most = distances(done.job, model)
    whole = perplexity(merged, held_out)
    show(
        f"     {far:8.1e}  logits of the merged against the adapted model, |difference| / |logits| in float32; "
        f"at most {most:.1e} of the largest logit"
    )
    show(f"     {whole:8.4f}  perplexity of the merged model, {done.averaged:.4f} of the adapted one")
    show(f"     {PROMPT!r} goes on\n       before: {done.spoken!r}\n       after:  {speak(model, base)!r}")
    same = all(abs(found / done.averaged - 1) < 1e-5 for found in (again, whole))
    return close and same and far <= CLOSE and done.averaged < done.before


def train(recipe: Path, run: Path, show: Show) -> Trained:
    """Train as the recipe says and show every update's loss."""
    made = read_language(recipe)
    job = language.build(made, run)
    assert job.evaluate is not None

    def tell(row: dict[str, Any]) -> None:
        if "loss" in row:
            show(f"       update {row['step']:2}: loss {row['loss']:.4f}")

    job.trackers = [tell]
    job.model.eval()
    with torch.no_grad():
        before = job.evaluate(job.model)["perplexity"]
    spoken = speak(job.model, Path(str(made.model)))
    outcome = fit(job, run, language.loop_of(made, len(job.data)), say=Output(quiet=True))
    job.model.eval()
    with torch.no_grad():
        last = job.evaluate(job.model)["perplexity"]
    return Trained(job, before, outcome.evaluation["perplexity"], last, spoken)


def perplexity(path: Path, held_out: Path) -> float:
    """Measure a run's average or a model on the held-out text, as `tensorkeep eval language` does."""
    return float(evaluate_checkpoint(str(path), [str(held_out)], length=LENGTH, batch=BATCH)["perplexity"])


def merge_and_show(base: Path, adapter: Path, out: Path, show: Show) -> bool:
    """Merge as `tensorkeep merge BASE ADAPTER OUT --dtype fp32` does, and show what nf4 would have left of it."""
    view, sources = read(base), open_adapters([(read(adapter), 1.0)])
    merging.refuse_other_base(view, sources)
    job = plan_merge(view, sources, "hf", dtype="F32")
    done = merging.merge(job, str(out), "hf")
    figures = merging.overall(done.moved)
    change, kept = figures["change"] or 0.0, figures["kept"]
    show(
        f"5/6  Merged onto the dequantized {job.kind} it was trained on: {out}, {len(job.terms)} tensors changed by "
        f"{100 * change:.2g} % of their size, computed twice and read back equal ({sum(done.seconds.values()):.1f} s)"
    )
    if kept is not None:
        show(
            f"     Rounded to {job.kind} again, as PEFT's merge_and_unload does, "
            f"it would keep {100 * kept:.2g} % of the update"
        )
    return str(job.kind).startswith("nf4") and kept is not None and change > 0


def distances(job: Job, merged: torch.nn.Module) -> tuple[float, float]:
    """Measure how far the merged model's logits are from the adapted one's: relative L2, and relative largest."""
    assert job.ema is not None
    data: Any = job.data
    ids = job.collate([data.sample(0, torch.Generator())])["input_ids"]  # int64 [1, LENGTH]
    with job.ema.applied(job.model), torch.inference_mode():
        adapted = job.model.eval()(input_ids=ids).logits  # [1, LENGTH, V]
        apart = merged(input_ids=ids).logits - adapted
    return float(apart.norm() / adapted.norm()), float(apart.abs().max() / adapted.abs().max())


def speak(model: torch.nn.Module, base: Path) -> str:
    """Return how a model goes on from PROMPT, with the likeliest token each time."""
    return generate(model, load_tokenizer(str(base)), PROMPT, WORDS, raw=True).text


def megabytes(folder: Path) -> float:
    """Return the size of the weights in a folder, in MB."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6


def _next_commands(base: Path, folder: Path, held_out: Path) -> str:
    """Return what to try next, one command a line."""
    return "\n".join(
        (
            "Try next:",
            f"  tensorkeep eval language {folder / 'run'} --data {held_out} --no-ema",
            f"  tensorkeep merge {base} {folder / 'adapter'} {folder / 'merged-original'} --onto original",
            f"  tensorkeep diff {base} {folder / 'merged'}",
            f"  tensorkeep generate {folder / 'merged'} --prompt 'What is a descriptor?'",
        )
    )
