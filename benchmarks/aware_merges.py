"""What training through a 4-bit format gives: `python -m benchmarks.aware_merges BASE TEXTS --out FILE`.

The adapters of `rounded_merges` (strengths and seeds) are trained as there, over nf4 and merged in floats, and through
nf4 (`quantize_aware`), over the float base and over its nf4 codes, and merged into these codes. What is measured is the
loss on the rows on which `merge --to-bits` measures. `--cost` measures what a step costs instead, on a model of Llama's
form with 60M parameters that is drawn at random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rounded_merges import call, write_tokenizer

# how the base is held, and the format that is trained through
WAYS = {"merged in floats": ("nf4", None), "aware over floats": (None, "nf4"), "aware over nf4": ("nf4", "nf4")}
SHAPE = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16384, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    rows = costs(args) if args.cost else losses(args)
    for row in rows:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def losses(args: Any) -> Any:
    """Yield the losses of each strength and seed."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shutil.copytree(args.base, place / "base")
        if not (place / "base" / "tokenizer.json").exists():
            write_tokenizer(args.base.parent / "tok512.json", place / "base")
        text = args.texts.read_text()
        (place / "trained.txt").write_text(text[: len(text) // 2])
        (place / "rest.txt").write_text(text[len(text) // 2 :])
        for updates in args.updates:
            for seed in range(args.seeds):
                found: dict[str, Any] = {"updates": updates, "seed": seed}
                for way in WAYS:
                    found[way] = merged(args, place, way, updates, seed)
                yield found


def merged(args: Any, place: Path, way: str, updates: int, seed: int) -> dict[str, Any]:
    """Train and merge one adapter in one way; the loss of what comes of it."""
    backbone, kind = WAYS[way]
    training = {"updates": updates, "epochs": None, "batch_size": 8, "seed": seed, "quantize_backbone": backbone}
    cache = {"length": 256, "packing": "concatenate", "cache": str(place / "cache")}
    recipe = {
        "version": 2,
        "model": str(place / "base"),
        "objective": "pretrain",
        "data": {"files": [str(place / "trained.txt")], **cache},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
        "adapter": {"lora_r": 8, "targets": ["*_proj"], "quantize_aware": kind},
        "training": training,
    }
    name = f"{way.replace(' ', '-')}-{updates}-{seed}"
    run, out = place / f"run-{name}", place / f"out-{name}"
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    begun = time.perf_counter()
    call("train", "language", str(place / "recipe.yaml"), "--out", str(run), "--device", args.device, "--quiet")
    took = round(time.perf_counter() - begun, 1)
    words = ["--to-bits", kind] if kind else ["--dtype", "fp32"]
    said = json.loads(call("merge", str(run), str(out), *words, "--json"))
    loss = held_out_loss(out, place / "rest.txt")
    return {"loss": loss, "train s": took} | ({"equal": said["equal"]} if kind else {})


def held_out_loss(model: Path, rest: Path) -> float:
    """Loss on the rows that `merge --to-bits` measures on."""
    import torch
    import torch.nn.functional as F

    from tensorkeep.formats.view import read
    from tensorkeep.language._as_trained import rows_of
    from tensorkeep.language.rounded_merge import _HELD, _ROWS
    from tensorkeep.language.start import loaded

    rows = rows_of(str(model), [str(rest)], _ROWS + _HELD, 2 * _HELD, lambda _: None)[-_HELD:]
    live: Any = loaded(read(str(model))).eval()
    with torch.no_grad():
        return statistics.mean(float(F.cross_entropy(live(input_ids=r[None]).logits[0, :-1], r[1:])) for r in rows)


def costs(args: Any) -> Any:
    """Yield medians of a step: plain LoRA over floats and over nf4, and through both formats over both."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tensorkeep.adapters.aware import make_aware
    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.quantization.modules import quantize_

    config = AutoConfig.for_model(**SHAPE)
    for tokens in args.tokens:
        ids = torch.randint(0, SHAPE["vocab_size"], (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
        ways = [(backbone, kind) for backbone in (None, "nf4") for kind in (None, "nf4", "q4_0")]
        steps = {}
        for backbone, kind in ways:
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False)
            if backbone:
                quantize_(model, backbone)
            add_lora(model, "all-linear", r=16)
            if kind:
                make_aware(model, kind)
            trained = [p for p in model.parameters() if p.requires_grad]
            steps[backbone, kind] = (model, torch.optim.AdamW(trained, 1e-4, foreach=True))
        took: dict[Any, list[float]] = {way: [] for way in ways}
        for number in range(args.steps + 1):
            for way, (model, optimizer) in steps.items():  # in turn, so that other work on the machine meets all
                begun = time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if number:
                    took[way].append(time.perf_counter() - begun)
        for (backbone, kind), seconds in took.items():
            plain = took[backbone, None]
            ratios = statistics.median(one / other for one, other in zip(seconds, plain))
            row = {"tokens": tokens, "base": backbone or "floats", "aware": kind, "threads": torch.get_num_threads()}
            yield {**row, "step s": round(statistics.median(seconds), 3), "ratio": round(ratios, 3)}


if __name__ == "__main__":
    main()
