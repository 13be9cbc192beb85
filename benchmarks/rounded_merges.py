"""How much of an adapter survives a merge in 4 bits: `python -m benchmarks.rounded_merges BASE TEXTS --out FILE`.

Adapters of three strengths (updates of training) and three seeds are trained over an nf4 base through the ordinary
recipe, merged with `--to-bits` into each form of --bits, and measured as the command does: KL to the merged model in
floats on held-out rows, of the base, of plain rounding and of the merge; losses and perplexities of the same.
`--aware` adds what a run trained through nf4 over the float base gives on these rows. BASE is an hf folder with a
tokenizer, or one of karpathy's tinyllamas with `tok512.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bits", nargs="+", default=["nf4"], help="forms to merge to: nf4 fp4 int8 mxfp4 q4_k")
    parser.add_argument("--batch", type=int, default=8, help="rows of an update")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the texts, to train on; the rest rounds and measures"
    )
    parser.add_argument("--aware", action="store_true", help="train through nf4 too")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shutil.copytree(args.base, place / "base")
        pieces = args.base.parent / "tok512.json"
        if not (place / "base" / "tokenizer.json").exists():
            write_tokenizer(pieces, place / "base")
        trained, rest = place / "trained.txt", place / "rest.txt"
        text = args.texts.read_text()
        trained.write_text(text[: int(len(text) * args.share)])
        rest.write_text(text[int(len(text) * args.share) :])
        for updates in args.updates:
            for seed in range(args.seeds):
                for row in measured(args, place, trained, rest, updates, seed):
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


def write_tokenizer(pieces: Path, folder: Path) -> None:
    """A tokenizer of the same pieces; it cuts words as a unigram model does, not as theirs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = json.loads(pieces.read_text())
    vocabulary = [(piece.replace(" ", "▁"), float(score)) for piece, score in zip(found["tokens"], found["scores"])]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    names = {"unk_token": vocabulary[0][0], "bos_token": vocabulary[1][0], "eos_token": vocabulary[2][0]}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def measured(args: Any, place: Path, trained: Path, rest: Path, updates: int, seed: int) -> Iterator[dict[str, Any]]:
    """Train one adapter, merge it into each form, and yield the figures."""
    run, trained_s = train(args, place, trained, updates, seed, None)
    for bits in args.bits:
        mid = time.perf_counter()
        out = place / (f"out-{run.name}-{bits}" + (".gguf" if bits == "q4_k" else ""))
        words = ["--to-bits", bits, "--calibrate", str(rest), "--device", args.device, "--json"]
        said = json.loads(call("merge", str(run), str(out), *words))["rounded"]
        figures = {k: said[k] for k in ("kl", "loss", "kept", "kept_plain", "bits", "forms")}
        figures["perplexity"] = {name: math.exp(loss) for name, loss in said["loss"].items()}
        took = {"train s": trained_s, "merge s": round(time.perf_counter() - mid, 1)}
        yield {"updates": updates, "seed": seed, "to": bits, **figures, **took}
    if args.aware:
        from benchmarks.aware_merges import held_out_loss

        run, trained_s = train(args, place, trained, updates, seed, "nf4")
        out = place / f"out-{run.name}"
        said = json.loads(call("merge", str(run), str(out), "--to-bits", "nf4", "--json"))
        loss = held_out_loss(out, rest)
        figures = {"equal": said["equal"], "loss": loss, "perplexity": math.exp(loss), "train s": trained_s}
        yield {"updates": updates, "seed": seed, "to": "nf4, aware", **figures}


def train(args: Any, place: Path, texts: Path, updates: int, seed: int, aware: str | None) -> tuple[Path, float]:
    """Train one adapter, over nf4 or through the format `aware` over floats; the run and its seconds."""
    backbone = None if aware else "nf4"
    recipe = {
        "version": 2,
        "model": str(place / "base"),
        "objective": "pretrain",
        "data": {
            "files": [str(texts)],
            "length": args.length,
            "packing": "concatenate",
            "cache": str(place / "cache"),
        },
        "optimizer": {"lr": args.lr},
        "schedule": {"kind": "constant"},
        "adapter": {"lora_r": 8, "targets": ["*_proj"], "quantize_aware": aware},
        "training": {
            "updates": updates,
            "epochs": None,
            "batch_size": args.batch,
            "seed": seed,
            "quantize_backbone": backbone,
        },
    }
    run = place / f"run-{updates}-{seed}-{aware or 'plain'}"
    written = run.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(recipe))
    begun = time.perf_counter()
    call("train", "language", str(written), "--out", str(run), "--device", args.device, "--quiet")
    return run, round(time.perf_counter() - begun, 1)


def call(*words: str) -> str:
    """Run the command line; what it prints."""
    done = subprocess.run([sys.executable, "-m", "tensorkeep", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout


if __name__ == "__main__":
    main()
