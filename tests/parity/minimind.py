"""Parity with MiniMind: `python -m tests.parity.minimind DIR`, one line a case.

DIR holds folders that MiniMind's own code wrote: `out/` and `checkpoints/` with weights of every generation, LoRA
files and resume files, `io.safetensors` with inputs and logits, `hf_tf*/` as its own converter exported, `peft/`;
and `bad/` with damaged and hostile files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tests.parity.minimind_merge import merge_cases
from tests.parity.minimind_resume import resume_cases
from tests.parity.outcome import (
    Outcome,
    be_quiet,
    bitwise,
    guarded,
    largest,
    load_model,
    natural_key,
    report,
    same,
    tensors,
)

LOGITS = 1e-5  # the worst of an independent forward pass was 2.5e-6
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OLD = {
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    be_quiet()
    with tempfile.TemporaryDirectory() as work:
        return report(itertools.chain(cases(folder, Path(work)), resume_cases(folder)))


def cases(folder: Path, work: Path) -> Iterator[Outcome]:
    """Every case of a folder of fixtures."""
    for place in sorted((p for p in folder.iterdir() if p.is_dir()), key=natural_key):
        if place.name == "bad":
            yield from bad_cases(place, work / "bad")
            continue
        expected = load_file(place / "io.safetensors") if (place / "io.safetensors").exists() else {}
        for file in sorted(place.rglob("*.pth"), key=natural_key):
            name = file.relative_to(folder).as_posix().removesuffix(".pth")
            yield from guarded(name, lambda f=file, n=name, e=expected: file_cases(f, n, e, work / n))
        for export in sorted(place.glob("hf_tf*/")):
            yield from guarded(
                f"{place.name}/{export.name}", lambda p=place, x=export: export_cases(p, x, work / p.name / x.name)
            )


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a file by torch's own reader, without root and wrappers."""
    state = torch.load(file, weights_only=True, mmap=True)
    state = state["model"] if file.stem.endswith("_resume") else state
    return {n.removeprefix("module.").removeprefix("_orig_mod."): t for n, t in state.items()}


def file_cases(file: Path, name: str, expected: dict[str, torch.Tensor], work: Path) -> Iterator[Outcome]:
    """One file of weights, of an adapter, or of both."""
    held = loaded(file)
    adapter = {n: t for n, t in held.items() if ".lora." in n}
    model = {n: t for n, t in held.items() if n not in adapter}
    if model:
        yield from model_cases(file, name, model, expected, work, mixed=len(adapter))
    if adapter:
        yield from adapter_cases(file, name, adapter, expected, work, model)


# -- models -----------------------------------------------------------------------------------------------------------


def model_cases(
    file: Path, name: str, held: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], work: Path, mixed: int
) -> Iterator[Outcome]:
    """A model to hf and back, bit by bit, and what transformers computes from it."""
    config = json.loads((file_root(file) / "config.json").read_text())
    old = any(n.startswith("tok_embeddings.") for n in held)
    plan = make_plan([read(file)], "hf")
    convert(plan, str(work / "hf"), "hf")
    wanted = under_hf_names(held, config) if old else dict(held)
    if same(wanted.get(HEAD), wanted[EMBEDDING]):
        del wanted[HEAD]
    yield bitwise(
        f"{name} to hf", tensors(read(work / "hf")), wanted, f"{mixed} adapter tensors left out" if mixed else ""
    )
    if mixed:
        said = [s for s in plan.dropped if "--to peft" in s.reason]
        yield Outcome(
            f"{name} to hf says what it leaves out", abs(len(said) - mixed), 0, f"of {mixed} adapter tensors unsaid"
        )

    # back into a folder, under the name that MiniMind will look for
    convert(make_plan([read(work / "hf")], "pth", naming="minimind"), str(work / "back"), "pth")
    width = held["tok_embeddings.weight" if old else EMBEDDING].shape[1]
    moe = "_moe" if any(".experts." in n for n in held) else ""
    back = torch.load(work / "back" / f"pretrain_{width}{moe}.pth", weights_only=True, mmap=True)
    yield bitwise(f"{name} to hf and back", back, held)
    head, embed = ("output.weight", "tok_embeddings.weight") if old else (HEAD, EMBEDDING)
    apart = back[head].untyped_storage().data_ptr() != back[embed].untyped_storage().data_ptr()
    yield Outcome(f"{name} back, head and embedding share a storage", float(apart), 0)

    if moe and not any(".q_norm." in n for n in held):
        noted = any(n.code == "K07" for n in plan.notes)
        yield Outcome(f"{name} to hf says K07", float(not noted), 0, "no transformers class computes shared experts")
    else:
        yield from logits_cases(file, name, held, expected, work)


def file_root(file: Path) -> Path:
    """The folder of the fixture a file is in: the nearest one above with a config."""
    return next(p for p in file.parents if (p / "config.json").exists())


def under_hf_names(held: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of early 2025 under Llama's names, q and k rows half-split: spelled out anew, not from our tables."""
    dim = config["dim"] // config["n_heads"]
    out = {}
    for name, tensor in held.items():
        parts = [OLD.get(p, p) for p in name.split(".")]
        if parts[-2] in ("q_proj", "k_proj"):
            tensor = tensor.view(-1, dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        swaps = {
            "attention": "self_attn",
            "feed_forward": "mlp",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "tok_embeddings": "embed_tokens",
        }
        parts = [swaps.get(p, p) for p in parts]
        out[HEAD if parts[0] == "output" else ".".join(["model", *parts])] = tensor.contiguous()
    return out


def logits_cases(
    file: Path, name: str, held: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], work: Path
) -> Iterator[Outcome]:
    """transformers' logits where the fixture holds MiniMind's for these very weights."""
    model = load_model(work / "hf")
    stem, place = file.stem, file_root(file)
    if "merge" in stem and "logits_merged_file" in expected:
        yield Outcome(f"{name} to hf, logits", compute(model, expected, "logits_merged_file"), LOGITS)
    final = [p for p in place.glob("out/pretrain_*.pth")]
    if not final or not all(same(t, held.get(n)) for n, t in loaded(final[0]).items()):
        return
    # not logits_pretrain_fp16cast: there the RoPE tables themselves went through fp16
    for key in ("logits_pretrain", "logits_pretrain_masked", "logits_pretrain_step"):
        if key in expected:
            yield Outcome(f"{name} to hf, {key}", compute(model, expected, key), LOGITS)
    if "logits_pretrain_yarn" in expected:
        yarn = work / "with_yarn" / "out" / file.name
        yarn.parent.mkdir(parents=True)
        shutil.copyfile(file, yarn)
        config = json.loads((place / "config.json").read_text()) | {"inference_rope_scaling": True}
        (yarn.parent / "config.json").write_text(json.dumps(config))
        convert(make_plan([read(yarn)], "hf"), str(work / "yarn"), "hf")
        yield Outcome(
            f"{name} to hf, logits_pretrain_yarn",
            compute(load_model(work / "yarn"), expected, "logits_pretrain_yarn"),
            LOGITS,
        )


def compute(model: Any, expected: dict[str, torch.Tensor], key: str) -> float:
    """Measure the largest difference of the logits from the fixture's, without padding; steps decode from the cache."""
    ids, mask = expected["input_ids"], expected.get("attention_mask")
    with torch.no_grad():
        if key.endswith("_masked"):
            made = model(input_ids=ids, attention_mask=mask).logits
            return largest(made[mask.bool()], expected[key][mask.bool()])
        if key.endswith("_step"):
            past = model(input_ids=ids, use_cache=True).past_key_values
            return largest(model(input_ids=ids[:, :1], past_key_values=past, use_cache=True).logits, expected[key])
        return largest(model(input_ids=ids).logits, expected[key])


def export_cases(place: Path, export: Path, work: Path) -> Iterator[Outcome]:
    """MiniMind's own export: the same tensors as ours, the same logits, and back the very file it came from."""
    final = next(place.glob("out/pretrain_*.pth"))
    theirs = load_file(export / "model.safetensors")
    convert(make_plan([read(final)], "hf"), str(work / "hf"), "hf")
    ours = tensors(read(work / "hf"))
    yield bitwise(
        f"{place.name}/{export.name}, our hf against it",
        ours,
        {n: t for n, t in theirs.items() if n in ours or n != HEAD},
    )
    model = load_model(work / "hf")
    golden = load_file(place / f"{export.name}_logits.safetensors")
    inputs = load_file(place / "io.safetensors")
    for key in sorted(golden):
        if key.startswith("logits"):
            masked = "mask" in key
            figure = compute(
                model, {**inputs, "key_masked" if masked else "key": golden[key]}, "key_masked" if masked else "key"
            )
            yield Outcome(f"{place.name}/{export.name}, {key}", figure, LOGITS)
    convert(make_plan([read(export)], "pth", naming="minimind"), str(work / "back"), "pth")
    back = next((work / "back").glob("*.pth"))
    yield bitwise(f"{place.name}/{export.name} to minimind", torch.load(back, weights_only=True), loaded(final))


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter_cases(
    file: Path,
    name: str,
    held: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    work: Path,
    model: dict[str, Any],
) -> Iterator[Outcome]:
    """A LoRA file to PEFT: the fixture's own PEFT folder, bit by bit, and its logits on the converted base."""
    place = file_root(file)
    plan = make_plan([read(file)], "peft")
    convert(plan, str(work / "peft"), "peft")
    made = tensors(read(work / "peft"))
    config = json.loads((place / "config.json").read_text())
    old = any(n.startswith("layers.") for n in held)
    wanted = {f"base_model.model.{n}": t for n, t in (old_adapter(held, config) if old else peft_names(held)).items()}
    yield bitwise(f"{name} to peft", made, wanted, f"{len(model)} model tensors left out" if model else "")
    written = json.loads((work / "peft" / "adapter_config.json").read_text())
    asked = {
        "peft_type": "LORA",
        "r": config["lora_rank"],
        "lora_alpha": config["lora_rank"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
    }
    golden = place / "peft"
    if golden.is_dir():
        theirs = json.loads((golden / "adapter_config.json").read_text())
        asked["target_modules"] = sorted(theirs["target_modules"])
        if not model:
            yield bitwise(
                f"{name} to peft, against the fixture's folder", made, load_file(golden / "adapter_model.safetensors")
            )
    wrong = {k: written.get(k) for k, v in asked.items() if written.get(k) != v}
    yield Outcome(f"{name} to peft, its config", len(wrong), 0, f"{wrong}" if wrong else f"r {written['r']}")
    if not old and not model:
        convert(make_plan([read(work / "peft")], "pth", naming="minimind"), str(work / "back"), "pth")
        back = torch.load(next((work / "back").glob("*.pth")), weights_only=True)
        yield bitwise(f"{name} to peft and back", back, held)
    base = sorted(place.glob("out/pretrain_*.pth"))
    shared = any("shared_experts" in n for n in loaded(base[0])) if base else True
    if not model and not shared and "logits_lora" in expected:
        yield Outcome(f"{name} to peft, logits_lora", with_adapter(base[0], work, expected), LOGITS)
    if base:
        yield from merge_cases(file, name, base[0], place, expected if not model else {}, work, shared)
    if not model:
        try:
            make_plan([read(file)], "hf")
            yield Outcome(f"{name} to hf is refused", 1, 0, "it was not")
        except TensorkeepError as error:
            yield Outcome(f"{name} to hf is refused", float("--to peft" not in (error.hint or "")), 0, error.line[-60:])


def peft_names(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        n.replace(".lora.A.weight", ".lora_A.weight").replace(".lora.B.weight", ".lora_B.weight"): t
        for n, t in held.items()
    }


def old_adapter(held: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The adapter of early 2025: Llama's names, rows of B on q and k half-split."""
    dim = config["dim"] // config["n_heads"]
    out = {}
    for name, tensor in peft_names(held).items():
        _, layer, part, proj, half, leaf = name.split(".")
        if proj in ("wq", "wk") and half == "lora_B":
            tensor = tensor.view(-1, dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        module = "self_attn" if part == "attention" else "mlp"
        out[f"model.layers.{layer}.{module}.{OLD[proj]}.{half}.{leaf}"] = tensor.contiguous()
    return out


def with_adapter(base: Path, work: Path, expected: dict[str, torch.Tensor]) -> float:
    """The converted adapter on the converted base, by PEFT."""
    from peft import PeftModel

    convert(make_plan([read(base)], "hf"), str(work / "base"), "hf", overwrite=True)
    model = PeftModel.from_pretrained(load_model(work / "base"), str(work / "peft")).float().eval()
    return compute(model, expected, "logits_lora")


# -- bad files --------------------------------------------------------------------------------------------------------


def bad_cases(place: Path, work: Path) -> Iterator[Outcome]:
    """Damaged and hostile files stop with their code; the others are read, every bit, and go to hf and back."""
    codes = {"truncated": "F02", "pickle_call": "F04"}
    for file in sorted(place.glob("*.pth")):
        name, code = f"bad/{file.stem}", codes.get(file.stem)
        if code is None:
            yield from guarded(name, lambda f=file, n=name: readable(f, n, work))
            continue
        try:
            read(file)
            yield Outcome(f"{name} is refused", 1, 0, "it was read")
        except TensorkeepError as error:
            named = code != "F04" or any(word in error.what for word in ("getcwd", "os.", "posix.", "builtins."))
            yield Outcome(f"{name} is refused", float(error.code != code or not named), 0, error.line[-100:])


def readable(file: Path, name: str, work: Path) -> Iterator[Outcome]:
    held = torch.load(file, weights_only=True)
    yield bitwise(f"{name} is read", tensors(read(file)), held)
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()  # the archive's own checksums say that it was changed since it was written
    try:
        convert(make_plan([read(file)], "hf"), str(work / file.stem / "hf"), "hf")
    except TensorkeepError as error:
        if error.code != "F03":
            raise
        yield Outcome(f"{name} to hf is refused", float(broken is None), 0, f"{error.what[:80]}; CRC of {broken}")
        return
    convert(make_plan([read(work / file.stem / "hf")], "pth"), str(work / file.stem / "back"), "pth")
    yield bitwise(f"{name} to hf and back", tensors(read(work / file.stem / "back")), held)


if __name__ == "__main__":
    sys.exit(main())
