"""QLoRA on a CPU: SmolLM2-135M's whole training step over nf4 and over full-precision weights, ours and PEFT's.

Every linear but the head gets r 16; real text, one thread, AdamW on the low-rank weights, no recomputation. The ways
take turns in one process, so that a busy machine slows all of them alike; memory is measured in a process of its own
for each, as what it holds above one that has only imported everything.

    python -m benchmarks.qlora_cpu [--rounds 5] [--rows 4] [--length 256]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import run, versions
from tensorkeep.adapters.lora import add_lora
from tensorkeep.commands.demo.resume import write_topics
from tensorkeep.commands.demo.story import smollm2
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read
from tensorkeep.language.losses import TokenLoss, plain_head
from tensorkeep.quantization.loading import load_quantizing

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def loaded(folder: Path, **how: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    return model


def ours(folder: Path) -> nn.Module:
    model = loaded(folder)
    add_lora(model, ["*_proj"], r=16, alpha=32)
    return model


def ours_nf4(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tensorkeep.models.repair import repair_buffers

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    load_quantizing(model, folder, "nf4", repair=repair_buffers, dtype=torch.float32)
    add_lora(model, ["*_proj"], r=16, alpha=32)
    return model


def peft(folder: Path, **how: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = loaded(folder, **how)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    tuned: nn.Module = get_peft_model(model, config)
    return tuned


def peft_nf4(folder: Path) -> nn.Module:
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return peft(folder, quantization_config=how, device_map={"": "cpu"})


class Way(NamedTuple):
    build: Callable[[Path], nn.Module]
    peers: bool  # whether PEFT's own loss is taken


WAYS = {
    "LoRA over float32": Way(ours, False),
    "QLoRA over nf4": Way(ours_nf4, False),
    "PEFT over float32": Way(peft, True),
    "PEFT + bitsandbytes nf4": Way(peft_nf4, True),
}


class Step:
    """A model under training; a call makes one update and gives the loss and the seconds of processor it took."""

    def __init__(self, way: Way, folder: Path) -> None:
        torch.manual_seed(0)
        self.model, self.peers = way.build(folder).train(), way.peers
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        self.loss = None if way.peers else TokenLoss(plain_head(self.model))

    def __call__(self, ids: Tensor) -> tuple[float, float]:
        before = time.process_time()
        if self.loss is None:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = self.loss(self.model, {"input_ids": ids, "labels": ids}, float(ids.numel() - len(ids)))["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss), time.process_time() - before


def text_ids(folder: Path, rows: int, length: int, steps: int) -> list[Tensor]:
    """Batches `[rows, length]` of Python's own reference text."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = write_topics(folder.parent / "text.txt", sorted(topics)[:40]).read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    need = rows * length
    return [ids[i * need : (i + 1) * need].view(rows, length) for i in range(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", choices=[*WAYS, "idle"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only:  # a process of its own, for its memory
        batches = text_ids(given.folder, given.rows, given.length, 2)
        if given.only != "idle":
            step = Step(WAYS[given.only], given.folder)
            gc.collect()
            for ids in batches:
                step(ids)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "smollm2"
        convert(make_plan([read(smollm2())], "hf"), str(folder), "hf")
        measure(folder, given)


def measure(folder: Path, given: argparse.Namespace) -> None:
    batches = text_ids(folder, given.rows, given.length, given.rounds + 1)
    steps = {name: Step(way, folder) for name, way in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, list[float]] = {name: [] for name in WAYS}
    for number, ids in enumerate(batches):
        for name, step in steps.items():
            loss, took = step(ids)
            losses[name].append(loss)
            if number:  # the first warms up
                seconds[name].append(took)
    steps.clear()
    gc.collect()
    command = [
        sys.executable,
        "-m",
        "benchmarks.qlora_cpu",
        "--rows",
        str(given.rows),
        "--length",
        str(given.length),
        "--folder",
        str(folder),
        "--only",
    ]
    idle = run([*command, "idle"]).anonymous
    libraries = versions("torch", "transformers", "peft", "bitsandbytes")
    print(f"{given.rows} x {given.length} tokens, {libraries}, load {os.getloadavg()[0]:.1f}")
    print("| way | s a step | rate, of LoRA over float32 | peak memory MB | losses |\n|---|---|---|---|---|")
    for name in WAYS:
        # round by round beside the first way: both met the same load
        rate = statistics.median(a / b for a, b in zip(seconds["LoRA over float32"], seconds[name]))
        memory = (run([*command, name]).anonymous - idle) / 1e6
        shown = ", ".join(f"{loss:.3f}" for loss in losses[name])
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {rate:.2f} | {memory:.0f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
