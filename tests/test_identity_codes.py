"""The identity of coded bases: codes, scales and maps count as they are stored, in every form, bit by bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.diagnosis.identity.statement import compare_with, read_statement, state
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.quantization.stored import find_quantized
from tests import identity_reference as reference
from tests.helpers import refused, to, write_hf
from tests.identity_forms import DENSE, FORMS, state_of
from tests.language_files import save_model
from tests.quant_files import QLORA, needs_qlora
from tests.quant_kinds import fp8, mxfp4, nvfp4
from tests.test_quantized_bases import KINDS, _bitsandbytes, _other

NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
KINDS_HERE = {**KINDS, "nvfp4": (nvfp4, NVFP4)}
CODED = ["nf4", "8bit", "mxfp4", "fp8 experts", *KINDS_HERE]
SAME = ["shards", "bin shards", "dcp of threads", "wrapped", "dcp", "dcp under a root", "pth"]
WORDS = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of a kind, made once: bitsandbytes' by itself, the others from their formats' descriptions."""
    patched = pytest.MonkeyPatch()
    patched.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
    root, made = tmp_path_factory.mktemp("coded"), dict[str, Path]()
    plain = save_model(root / "plain", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    patched.setattr("tests.test_quantized_bases.KINDS", KINDS_HERE)

    def of(kind: str) -> Path:
        if kind not in made and kind in ("nf4", "8bit"):
            made[kind] = _bitsandbytes(root, plain, kind)[0]
        elif kind not in made and kind in ("mxfp4", "fp8 experts"):
            made[kind] = experts(root, kind)
        elif kind not in made:
            made[kind] = _other(root, plain, kind)[0]
        return made[kind]

    yield of
    patched.undo()


def experts(root: Path, kind: str) -> Path:
    """gpt-oss with its stacks in MXFP4, or Qwen3-MoE with every expert in fp8 with scales of blocks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    if kind == "mxfp4":
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
        counts = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_local_experts": 2}
        config = GptOssConfig(**sizes, **counts, num_hidden_layers=1, num_experts_per_tok=1, pad_token_id=0)
        GptOssForCausalLM(config).float().save_pretrained(root / "experts")
    else:
        more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        save_model(root / "experts", "qwen3_moe", hidden_size=64, head_dim=16, tie_word_embeddings=False, **more)
    tensors = state_of(root / "experts")
    for name in [n for n in tensors if ".experts." in n and n.endswith(("_proj", "_proj.weight"))]:
        weight = tensors.pop(name)
        turned = weight.transpose(1, 2).contiguous() if kind == "mxfp4" else weight
        tensors |= (mxfp4(turned, name) if kind == "mxfp4" else fp8(turned, name.removesuffix(".weight")))[0]
    said = {"quant_method": "mxfp4"} if kind == "mxfp4" else KINDS["fp8"][1]
    config_ = json.loads((root / "experts" / "config.json").read_text()) | {"quantization_config": said}
    shutil.rmtree(root / "experts")
    return write_hf(root / kind, tensors, config_)


@pytest.mark.parametrize("kind", CODED)
def test_codes_scales_and_maps_count_as_they_are_stored_and_alike_in_every_form(
    kind: str, coded: Callable[[str], Path], tmp_path: Path
) -> None:
    model, held = identify(coded(kind)), state_of(coded(kind))
    assert find_quantized(read(coded(kind))) and model.of == "model" and not model.narrowed
    raw = {
        n: (WORDS[t.dtype], tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, t in held.items()
    }
    assert model.identity == reference.identity(raw).hex()
    for form in SAME:
        assert identify(DENSE[form](coded(kind), tmp_path / form, held)).identity == model.identity, form
    rows = [n for n, t in held.items() if t.ndim]
    ranked = FORMS["three ranks of FSDP"](coded(kind), tmp_path / "ranks", {n: held[n] for n in rows})
    found = identify(ranked)
    assert found.leaves == {n: model.leaves[n] for n in model.leaves if n in rows}


@pytest.mark.parametrize("kind", CODED)
def test_any_bit_of_codes_scales_maps_and_states_is_found_and_its_tensor_named(
    kind: str, coded: Callable[[str], Path], tmp_path: Path
) -> None:
    statement = read_statement(state(identify(coded(kind)), kind), "here")
    shutil.copytree(coded(kind), tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    data, draw = file.read_bytes(), random.Random(11)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    ends = {n.rpartition(".")[2] if "experts" not in n else n.rpartition("_")[2]: n for n in header if n[0] != "_"}
    for name in ends.values():
        first, last = (8 + int.from_bytes(data[:8], "little") + at for at in header[name]["data_offsets"])
        changed = bytearray(data)
        changed[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        (found,) = compare_with(statement, identify(tmp_path / "m"), None).findings
        assert (found.code, found.severity, list(found.tensors)) == ("F03", "error", [name])


def test_codes_are_another_model_than_the_floats_that_they_stand_for(
    coded: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to(coded("nf4"), tmp_path / "floats", "hf", dtype="F32")
    assert identify(tmp_path / "floats").identity != identify(coded("nf4")).identity
    assert main(["identify", str(coded("nf4")), "--json"]) == 0
    config = json.loads((coded("nf4") / "config.json").read_text())
    hashed = identify(coded("nf4")).parts["config"]
    config["quantization_config"]["bnb_4bit_use_double_quant"] = False
    shutil.copytree(coded("nf4"), tmp_path / "said")
    (tmp_path / "said" / "config.json").write_text(json.dumps(config))
    changed = identify(tmp_path / "said")
    assert changed.identity == identify(coded("nf4")).identity and changed.parts["config"] != hashed


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8", "nvfp4", "packed"])
def test_a_naming_that_moves_rows_is_refused_where_codes_and_scales_would_not_move_together(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here words of codes and blocks of scales are as many as whole heads: by their shapes they could be permuted."""
    monkeypatch.setattr("tests.test_quantized_bases.KINDS", KINDS_HERE)
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64}
    plain = save_model(tmp_path / "plain", "llama", hidden_size=512, intermediate_size=64, head_dim=8, **heads)
    folder = _other(tmp_path, plain, kind)[0]
    with pytest.raises(TensorkeepError) as caught:
        to(folder, tmp_path / "titan", "dcp", naming="torchtitan")
    assert caught.value.code in ("Q01", "C01") and not (tmp_path / "titan").exists()
    if kind in ("gptq", "awq", "fp8"):
        assert caught.value.code == "Q01" and "rows are not those of its codes" in str(caught.value)
        moved = {n: t for n, t in state_of(folder).items() if "_proj." not in n or "self_attn" in n}
        names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
        titan = {}
        for name, tensor in moved.items():
            for theirs, ours in names.items():
                name = name.replace(f"self_attn.{theirs}", f"attention.qkv_linear.{ours}")
            titan[name.replace("qkv_linear.wo", "wo").replace("model.layers", "layers")] = tensor
        titan = {n: t for n, t in titan.items() if n.startswith("layers.") and "attention." in n}
        torch.save(titan, tmp_path / "titan.pth")
        shutil.copy(folder / "config.json", tmp_path / "config.json")
        with pytest.raises(TensorkeepError, match="no identity") as caught:
            identify(tmp_path / "titan.pth")
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", ["int8", "torchao"])
def test_rows_with_codes_and_scales_of_their_own_go_under_another_naming_and_keep_the_identity(
    kind: str, coded: Callable[[str], Path], tmp_path: Path
) -> None:
    titan = DENSE["torchtitan"](coded(kind), tmp_path / "titan", state_of(coded(kind)))
    assert identify(titan).identity == identify(coded(kind)).identity


@needs_qlora
@pytest.mark.parametrize("kind", ["fp4", "fp4_dq", "int8", "nf4", "nf4_dq", "nf4_dq_bf16store"])
def test_files_that_bitsandbytes_wrote_have_one_identity_in_every_form(kind: str, tmp_path: Path) -> None:
    folder = QLORA / f"quant_{kind}"
    wanted, held = identify(folder).identity, load_file(folder / "model.safetensors")
    for form in SAME:
        assert identify(DENSE[form](folder, tmp_path / form, held)).identity == wanted
    name = next(n for n in held if n.endswith((".absmax", ".SCB")))
    held[name].view(torch.uint8)[0] ^= 1
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").chmod(0o644)
    save_file(held, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert identify(tmp_path / "other").identity != wanted
    with refused("F03", "is not the model"):
        from tensorkeep.diagnosis.identity.demand import demand

        demand(tmp_path / "other", wanted)
