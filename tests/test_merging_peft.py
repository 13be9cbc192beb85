"""Merges of what PEFT writes, in many architectures, against PEFT's own `merge_and_unload`; transformers loads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tensorkeep.adapters.merging import merge
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.cli import main
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.live.loaded import check_loaded
from tensorkeep.formats.view import read
from tensorkeep.models.language_model import silent
from tensorkeep.models.names import names_for
from tests.helpers import refused

IDS = torch.arange(36).reshape(2, 18) * 7 % 90
SMALL: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(
    num_key_value_heads=2, num_experts=3, num_local_experts=3, num_experts_per_tok=2, moe_intermediate_size=16
)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
KINDS: dict[str, dict[str, Any]] = {
    "llama": dict(num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {},
    "bloom": dict(n_layer=2, n_head=4),
    "falcon": dict(num_kv_heads=4, new_decoder_architecture=False, multi_query=False),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "mamba": dict(state_size=4),
    "qwen3_moe": dict(head_dim=8, decoder_sparse_step=1, **EXPERTS),
    "mixtral": EXPERTS,
    "gpt_oss": dict(head_dim=8, **EXPERTS),
    "deepseek_v3": dict(
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        first_k_dense_replace=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the folder of a small random model of a kind, made once."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(kind: str) -> Path:
        if kind not in made:
            config = transformers.AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind]})
            torch.manual_seed(len(kind))
            with silent():
                model = transformers.AutoModelForCausalLM.from_config(config).float()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn(parameter.shape) * 0.02)
                model.save_pretrained(folder / kind)
            made[kind] = folder / kind
        return made[kind]

    return base


def loaded(folder: Path) -> Any:
    """The model as transformers loads it, in float32; it must have nothing to say."""
    with silent():
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    assert not any(said.values()), {k: v for k, v in said.items() if v}
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def disturbed(model: Any) -> Any:
    """A PEFT model whose trainable parameters are no longer where they started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def adapter_of(base: Path, out: Path, config: Any, resize: int = 0) -> torch.Tensor:
    """Write an adapter as PEFT does, and return the logits of PEFT's own merge."""
    torch.manual_seed(1)
    model = loaded(base)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    adapted = disturbed(peft.get_peft_model(model, config))
    for each in adapted.peft_config.values():
        each.base_model_name_or_path = str(base)
    adapted.save_pretrained(out)
    return logits(adapted.merge_and_unload())


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    job = plan_merge(read(str(base)), open_adapters([(read(str(adapter)), 1.0)]), ask=names_for, **options)
    return job, merge(job, str(out))


def equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() < 1e-5 * wanted.abs().max())


LLAMA = ["q_proj", "down_proj"]
CASES: dict[str, tuple[str, Any, int]] = {
    "resized": ("llama", peft.LoraConfig(target_modules=LLAMA), 105),
    "resized and tied": ("qwen2", peft.LoraConfig(target_modules=LLAMA), 105),
    "resized, head adapted": ("llama", peft.LoraConfig(target_modules=["q_proj", "lm_head", "embed_tokens"]), 104),
    "whole, resized": ("llama", peft.LoraConfig(target_modules=LLAMA, modules_to_save=["embed_tokens", "lm_head"]), 90),
    "tied, embedding whole": ("qwen2", peft.LoraConfig(target_modules=LLAMA, modules_to_save=["embed_tokens"]), 0),
    "gpt2 wte": ("gpt2", peft.LoraConfig(target_modules=["c_attn", "c_proj"], modules_to_save=["wte"]), 0),
    "gpt2 head": ("gpt2", peft.LoraConfig(target_modules=["c_fc"], modules_to_save=["lm_head"], use_dora=True), 0),
    "bigcode": ("gpt_bigcode", peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte", "wpe"]), 0),
    "neox": ("gpt_neox", peft.LoraConfig(target_modules=["dense"], modules_to_save=["lm_head"]), 0),
    "bloom": ("bloom", peft.LoraConfig(target_modules=["dense"], modules_to_save=["word_embeddings", "lm_head"]), 0),
    "falcon": ("falcon", peft.LoraConfig(target_modules="all-linear", modules_to_save=["word_embeddings"]), 0),
    "opt": ("opt", peft.LoraConfig(target_modules=["fc1"], modules_to_save=["embed_tokens"], use_rslora=True), 0),
    "mamba": ("mamba", peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["embeddings"]), 0),
    "tokens": ("llama", peft.LoraConfig(target_modules=LLAMA, trainable_token_indices=[5, 90, 11]), 0),
    "tokens, tied": ("gpt2", peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[5, 90]), 0),
    "tokens alone": ("qwen2", peft.TrainableTokensConfig(token_indices=[0, 3]), 0),
    "all biases": ("qwen2", peft.LoraConfig(target_modules=LLAMA, bias="all"), 0),
    "own biases": ("gpt2", peft.LoraConfig(target_modules=["c_attn"], bias="lora_only"), 0),
    "patterns": (
        "llama",
        peft.LoraConfig(target_modules=LLAMA, rank_pattern={".*0.*q_proj": 2}, alpha_pattern={"1.mlp.down_proj": 3}),
        0,
    ),
    "experts": ("qwen3_moe", peft.LoraConfig(target_modules="all-linear", use_rslora=True), 0),
    "experts, renamed": ("mixtral", peft.LoraConfig(target_modules="all-linear"), 0),
    "experts, [in, out]": (
        "gpt_oss",
        peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        0,
    ),
    "one parameter of experts": (
        "qwen3_moe",
        peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
        0,
    ),
    "experts whole": ("mixtral", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts", "gate"]), 0),
    "loha": ("llama", peft.LoHaConfig(target_modules=LLAMA, r=3, alpha=5, rank_pattern={"q_proj": 2}), 0),
    "lokr": ("llama", peft.LoKrConfig(target_modules=LLAMA, r=3, alpha=5), 0),
    "lokr in parts": ("llama", peft.LoKrConfig(target_modules=LLAMA, r=2, decompose_both=True, decompose_factor=4), 0),
    "ia3": ("qwen2", peft.IA3Config(target_modules=["k_proj", *LLAMA], feedforward_modules=["down_proj"]), 0),
    "oft": ("llama", peft.OFTConfig(target_modules=LLAMA, oft_block_size=8), 0),
    "oft exactly": (
        "llama",
        peft.OFTConfig(target_modules=LLAMA, oft_block_size=8, use_cayley_neumann=False, block_share=True),
        0,
    ),
    "vera": ("llama", peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=8), 0),
    "vera, [in, out]": ("gpt2", peft.VeraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_what_peft_makes(bases: Any, tmp_path: Path, case: str) -> None:
    kind, config, resize = CASES[case]
    wanted = adapter_of(bases(kind), tmp_path / "adapter", config, resize)
    merged(bases(kind), tmp_path / "adapter", tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert equal(logits(model), wanted), float((logits(model) - wanted).abs().max() / wanted.abs().max())
    assert not resize or model.config.get_text_config().vocab_size == resize


def test_stacks_that_files_hold_turned_are_checked_and_merged_as_they_lie(tmp_path: Path) -> None:
    base, text = tmp_path / "base", {**SMALL, **EXPERTS, "moe_intermediate_size": 24, "head_dim": 8}
    sight: dict[str, Any] = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4
    )
    sight |= dict(patch_size=4, deepstack_visual_indexes=[0], num_position_embeddings=16)
    config = transformers.AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=sight)
    with silent():
        made = transformers.AutoModelForImageTextToText.from_config(config).float()
        made.save_pretrained(base)
    file = base / "model.safetensors"
    stored = load_file(file)  # transformers writes [experts, out, in]; the hub's files have [experts, in, out]
    save_file({n: t.mT.contiguous() if ".experts." in n else t for n, t in stored.items()}, file, {"format": "pt"})

    def back(folder: Path) -> Any:
        with silent():
            return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    model = back(base)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in made.state_dict().items())
    assert check_loaded(model, base) == []
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[1, 2, 3] += 1
    assert [(f.code, f.tensors) for f in check_loaded(model, base)] == [("V07", [name])]
    targets = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
    )
    adapted = disturbed(peft.get_peft_model(back(base), targets))
    adapted.save_pretrained(tmp_path / "adapter")
    merged(base, tmp_path / "adapter", tmp_path / "out")
    assert read(str(tmp_path / "out"))[name].shape == (3, 24, 32)
    assert equal(logits(back(tmp_path / "out")), logits(adapted.merge_and_unload()))


def test_a_tie_that_peft_breaks_is_broken_and_said(bases: Any, tmp_path: Path) -> None:
    adapter_of(bases("gpt2"), tmp_path / "one", peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]))
    job, _ = merged(bases("gpt2"), tmp_path / "one", tmp_path / "out")
    (note,) = [n for n in job.plan.notes if n.code == "T01"]
    assert "transformer.wte.weight" in note.message and "lm_head.weight" in note.message
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    adapter_of(
        bases("gpt2"), tmp_path / "rows", peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[4])
    )
    job, _ = merged(bases("gpt2"), tmp_path / "rows", tmp_path / "kept")
    assert not [n for n in job.plan.notes if n.code == "T01"] and "lm_head.weight" not in read(str(tmp_path / "kept"))


def test_a_low_rank_change_of_one_of_two_tied_is_refused_or_parted_as_trained(bases: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = disturbed(peft.get_peft_model(loaded(bases("qwen2")), peft.LoraConfig(target_modules=["embed_tokens"])))
    model.save_pretrained(tmp_path / "adapter")
    trained, theirs = logits(model), None
    with refused("T01", "--untie"):
        merged(bases("qwen2"), tmp_path / "adapter", tmp_path / "out")
    merged(bases("qwen2"), tmp_path / "adapter", tmp_path / "out", untie=True)
    assert equal(logits(loaded(tmp_path / "out")), trained)
    theirs = logits(model.merge_and_unload())
    assert not equal(theirs, trained)  # PEFT's merge adds to both: why the change is not made without being asked


def test_each_of_several_adapters_lies_in_a_folder_of_its_own(bases: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(loaded(bases("llama")), peft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("style", peft.LoraConfig(target_modules=LLAMA, use_dora=True))
    model.set_adapter("style")
    disturbed(model).save_pretrained(tmp_path / "both")
    model.set_adapter("style")
    wanted = logits(model)
    merged(bases("llama"), tmp_path / "both" / "style", tmp_path / "out")
    assert equal(logits(loaded(tmp_path / "out")), wanted)


def test_what_is_missing_or_contradicts_the_config_is_refused(bases: Any, tmp_path: Path) -> None:
    base, here = bases("llama"), tmp_path / "a"
    adapter_of(base, here, peft.LoraConfig(target_modules=LLAMA, trainable_token_indices=[5, 6]))
    config = here / "adapter_config.json"
    for rows, word in (([5], "lists 1"), ([5, 999], "row 999"), ("all", "does not say which")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": rows}))
        with refused("A02", word):
            merged(base, here, tmp_path / "out")
    half = tmp_path / "half"
    adapter_of(base, half, peft.LoraConfig(target_modules=LLAMA, modules_to_save=["embed_tokens"]), 105)
    tensors = {n: torch.from_numpy(read(str(half)).array(n)) for n in read(str(half)) if "lm_head" not in n}
    save_file(tensors, half / "adapter_model.safetensors")
    with refused("S02", "lm_head.weight 96"):
        merged(base, half, tmp_path / "out")
    experts = tmp_path / "experts"
    adapter_of(bases("mixtral"), experts, peft.LoraConfig(target_modules="all-linear"))
    said = json.loads((experts / "adapter_config.json").read_text())
    (experts / "adapter_config.json").write_text(json.dumps({**said, "rank_pattern": {}}))
    with refused("A02", "3 experts"):
        merged(bases("mixtral"), experts, tmp_path / "out")
    for kind, word in (
        (peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=False), "VeRA adapter saved without its"),
        (peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, coft=True), "constrained OFT"),
        (peft.HRAConfig(target_modules=["q_proj"]), "is a HRA adapter"),
    ):
        adapter_of(base, tmp_path / type(kind).__name__, kind)
        with refused("A01", word):
            merged(base, tmp_path / type(kind).__name__, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_precision_and_idle_layers_are_said(bases: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    adapter_of(bases("llama"), folder, peft.LoraConfig(target_modules=LLAMA))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "maker/llama-3b-bnb-4bit"})
    )
    view = read(str(folder))
    tensors = {n: torch.from_numpy(view.array(n)) for n in view}
    save_file({n: t * ("layers.1" not in n) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    job, done = merged(bases("llama"), folder, tmp_path / "out")
    assert any(n.code == "A04" and "bnb-4bit" in n.message for n in job.plan.notes)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    unknown = plan_merge(read(str(bases("llama"))), open_adapters([(read(str(folder)), 1.0)]))
    assert [n.message for n in unknown.plan.notes if "cannot be known from the files" in n.message]
    (note,) = done.notes
    assert note.code == "A05" and len(note.names) == 2 and all("layers.1" in n for n in note.names)
    save_file({n: t * 1e-7 for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    _, done = merged(bases("llama"), folder, tmp_path / "half")
    assert "too small for the dtype" in " ".join(n.message for n in done.notes)


def test_what_peft_itself_would_leave_out_is_said(
    bases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorkeep.models.peft_loading import left_out_by_peft

    base, folder = read(str(bases("deepseek_v3"))), tmp_path / "adapter"
    modules = [n.removesuffix(".weight") for n in base if n.endswith("_proj.weight") and ".experts." not in n]
    tensors = {}
    for module in modules:
        out, into = base[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, into)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 2) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    found = left_out_by_peft(base, document, read(str(folder)), list(tensors))
    endless = {**document, "target_modules": "(a+)+" * 9, "megatron_core": "os", "megatron_config": {"a": 1}}
    assert left_out_by_peft(base, endless, read(str(folder)), list(tensors)) is None
    assert found is not None
    theirs = peft.PeftModel.from_pretrained(loaded(bases("deepseek_v3")), folder)
    taken = peft.get_peft_model_state_dict(theirs)
    lost = sorted(n for n in tensors if n not in taken or not torch.equal(taken[n], tensors[n]))
    assert found[1] == lost and lost and not any("self_attn" in n for n in lost)
    (said,) = [f for f in diagnose(str(folder), str(bases("deepseek_v3"))).findings if f.code == "K07"]
    assert said.severity == "warning" and sorted(said.tensors) == lost
    assert main(["merge", str(bases("deepseek_v3")), str(folder), str(tmp_path / "out")]) == 0
    assert f"leaves out {len(lost)} tensors" in capsys.readouterr().err


def test_what_libraries_log_while_they_are_imported_is_not_ours_to_print(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorkeep.models.peft_loading import left_out_by_peft

    loud = "import logging\nlogging.getLogger('bitsandbytes.backends').warning('no kernels')\nraise ImportError\n"
    (tmp_path / "peft.py").write_text(loud)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft")
    base = read(str(bases("mixtral")))
    assert left_out_by_peft(base, {"peft_type": "LORA"}, base, []) is None
    assert "peft" not in sys.modules and not caplog.records


FITTING = ["resized and tied", "gpt2 head", "neox", "experts, renamed", "ia3", "vera, [in, out]"]


@pytest.mark.parametrize("case", FITTING)
def test_diagnose_finds_no_fault_in_what_merges(bases: Any, tmp_path: Path, case: str) -> None:
    kind, config, resize = CASES[case]
    adapter_of(bases(kind), tmp_path / "adapter", config, resize)
    for reference in (None, str(bases(kind))):
        found = diagnose(str(tmp_path / "adapter"), reference).findings
        assert [f for f in found if f.severity != "info"] == []
    other = bases("gpt2" if kind != "gpt2" else "llama")
    codes = {f.code for f in diagnose(str(tmp_path / "adapter"), str(other)).findings if f.severity == "error"}
    assert "A01" in codes


def test_without_transformers_ties_come_from_names_and_the_rest_is_refused(bases: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"])
    wanted = adapter_of(bases("gpt2"), tmp_path / "adapter", config)
    job = plan_merge(read(str(bases("gpt2"))), open_adapters([(read(str(tmp_path / "adapter")), 1.0)]))
    merge(job, str(tmp_path / "out"))
    assert equal(logits(loaded(tmp_path / "out")), wanted)
    adapter_of(bases("mixtral"), tmp_path / "experts", peft.LoraConfig(target_modules="all-linear"))
    with refused("A01", "found with transformers"):
        plan_merge(read(str(bases("mixtral"))), open_adapters([(read(str(tmp_path / "experts")), 1.0)]))
