"""Compare what llama.cpp computes from the GGUF files that `convert` writes with transformers.

    python -m benchmarks.gguf_llama_cpp --llama-python ENV/bin/python [--model FOLDER]     # about two minutes

ENV has benchmarks/envs/llama-cpp.txt. For each family a small model with loud weights is written as f32, q8_0 and q4_0;
llama.cpp loads it, and its logits of 32 ids are compared with those of the folder in transformers. k-quants are made by
llama.cpp itself of what was written: its logits are compared with those of the file read back here, and of the file
written on without `--dtype`. Every tensor of a quantized file is compared with llama-quantize's of the same model. With
`--model` a real model's folder too: its tokenizer's ids of a text, and the mean loss over it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from tests.test_gguf_writing import IDS, MODELS, model

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read

TEXT = "The Eiffel Tower, built in 1889, is 330 m tall.\n\nIt doesn't sway much: 6–7 cm. 你好, wörld!\n" * 3
# runs in the other environment, which has neither torch nor this project
ASK = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, ids, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = Llama(path, n_ctx=512, logits_all=True, verbose=False)
out = {}
if text:
    out["ids"] = ids = model.tokenize(text.encode(), add_bos=True, special=False)
model.eval(ids)
np.save(sys.argv[4], np.array(model.scores[: len(ids)]))
print(json.dumps(out))
"""

QUANTIZE = """
import sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
params.pure = len(sys.argv) > 4  # one type for every matrix, the head too
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""
KINDS = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # llama.cpp's LLAMA_FTYPE_MOSTLY_*
BLOCKS = {"Q8_0": 7, "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2}


def asked(python: str, path: Path, ids: list[int], text: str = "") -> tuple[np.ndarray, list[int]]:
    """Return llama.cpp's logits, and its ids of a text."""
    out = path.with_suffix(".npy")
    done = subprocess.run(
        [python, "-c", ASK, str(path), json.dumps(ids), text, str(out)], capture_output=True, text=True
    )
    if done.returncode < 0:
        died = signal.Signals(-done.returncode).name
        raise SystemExit(f"llama.cpp: {died} at {path.name}; on a processor with AMX see benchmarks/envs/llama-cpp.txt")
    if done.returncode:
        raise SystemExit(f"llama.cpp: {done.stderr[-2000:]}")
    return np.load(out), json.loads(done.stdout.splitlines()[-1]).get("ids", ids)


def written(folder: Path, out: Path, dtype: str | None) -> Path:
    convert(make_plan([read(folder)], "gguf", dtype=dtype), str(out), "gguf", overwrite=True)
    return out


def as_quantized(python: str, folder: Path, scratch: Path) -> tuple[int, int]:
    """Return how many tensors of the quantized files are llama-quantize's, type and bytes, and how many there are."""
    wide, theirs = written(folder, scratch / "wide.gguf", "F32"), scratch / "theirs.gguf"
    same = total = 0
    for kind, number in BLOCKS.items():
        command = [python, "-c", QUANTIZE, str(wide), str(theirs), str(number), "pure"]
        subprocess.run(command, check=True, capture_output=True)
        ours, made = (
            {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(p).tensors}
            for p in (written(folder, scratch / "ours.gguf", kind), theirs)
        )
        same += sum(made.get(name) == tensor for name, tensor in ours.items())
        total += len(ours.keys() | made.keys())
    return same, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    print("| model | type | relative L2 of the logits | same best id |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            folder = Path(scratch) / name.replace(" ", "-")
            wanted = model(folder, name)[0].numpy()
            for dtype in (None, "Q8_0", "Q4_0"):
                found, _ = asked(args.llama_python, written(folder, Path(scratch) / "m.gguf", dtype), IDS[0].tolist())
                apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
                same = (found.argmax(-1) == wanted.argmax(-1)).mean()
                print(f"| {name} | {dtype or 'F32'} | {apart:.1e} | {same:.0%} |", flush=True)
            same, total = as_quantized(args.llama_python, folder, Path(scratch))
            print(f"| {name} | blocks | {same} of {total} tensors are llama-quantize's | |", flush=True)
        for kind, number in KINDS.items():
            k_quant(Path(scratch), args.llama_python, kind, number)
        if args.model is not None:
            real(args.model, Path(scratch), args.llama_python)


def k_quant(scratch: Path, python: str, kind: str, number: int) -> None:
    """Compare a file that llama.cpp quantized with what is read of it here, and with what is written on."""
    folder, source = scratch / kind, scratch / f"{kind}.gguf"
    model(folder, "qwen3", hidden_size=256, intermediate_size=512, head_dim=64)
    wide = written(folder, scratch / "wide.gguf", "F16")
    subprocess.run([python, "-c", QUANTIZE, str(wide), str(source), str(number)], check=True, capture_output=True)
    told, _ = asked(python, source, IDS[0].tolist())
    convert(make_plan([read(source)], "hf", dtype="F32"), str(scratch / f"{kind}-hf"), "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(scratch / f"{kind}-hf", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = loaded(IDS).logits[0].numpy()
    apart = np.linalg.norm(told - wanted) / np.linalg.norm(wanted)
    passed, _ = asked(python, written(source, scratch / "on.gguf", None), IDS[0].tolist())
    same = "equal" if np.array_equal(passed, told) else "DIFFER"
    print(
        f"| qwen3, read back | {kind} | {apart:.1e} | {(told.argmax(-1) == wanted.argmax(-1)).mean():.0%} | on: {same}"
    )


def real(folder: Path, scratch: Path, python: str) -> None:
    """Compare a real model: its tokenizer's ids, and the loss over a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT)["input_ids"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = loaded(torch.tensor([ids])).logits[0].numpy()
    for dtype in (None, "F16", "Q8_0", "Q4_0"):
        found, told = asked(python, written(folder, scratch / "real.gguf", dtype), ids, TEXT)
        apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        print(
            f"| {folder.name} | {dtype or 'as stored'} | {apart:.1e} | "
            f"{(found.argmax(-1) == wanted.argmax(-1)).mean():.0%} |"
            f" ids {'equal' if told == ids else 'DIFFER'}, loss {loss(found, ids):.4f} against {loss(wanted, ids):.4f}"
        )


def loss(logits: np.ndarray, ids: list[int]) -> float:
    """Return the mean cross entropy of the next id."""
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), torch.tensor(ids[1:])))


if __name__ == "__main__":
    main()
