"""Exports of language runs, judged by the programs that they are for: PEFT and transformers, which say nothing."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tensorkeep import cli
from tensorkeep.formats.view import read
from tensorkeep.language.checkpoints import checkpoint_of, put_state
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import start_of
from tensorkeep.training.distributed import World
from tests.language_files import save_tokenizer, texts

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 19)[None]
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "deepseek_v3": {  # shared experts are linears, the others one parameter
        **SMALL,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {**SMALL, **EXPERTS, "num_experts": 4, "head_dim": 8},
    "qwen3_5": {
        "text_config": {
            **SMALL,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
    },
    "gemma3": {  # its files call the decoder language_model.model, the live model calls it model.language_model
        "text_config": {
            **SMALL,
            "head_dim": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "boi_token_index": 301,
        "eoi_token_index": 302,
    },
}


def base_of(kind: str, folder: Path) -> Path:
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    auto = transformers.AutoModelForImageTextToText if "vision_config" in KINDS[kind] else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = (auto or transformers.AutoModelForCausalLM).from_config(config).float()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Trains a run of two updates once; gives the run and its base."""

    @cache
    def trained(kind: str, adapter: bool, codes: str | None = None, dropout: float = 0.0) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        base = base_of(kind, folder / "base")
        document = {
            "model": str(base),
            "objective": "pretrain",
            "optimizer": {"lr": 0.02},
            "data": {"files": [str(texts(folder / "t.jsonl"))], "length": 32},
            "training": {"updates": 2, "batch_size": 2, "ema": 0.5, "quantize_backbone": codes},
            "adapter": {"lora_r": 2, "lora_alpha": 4, "lora_dropout": dropout} if adapter else None,
        }
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(document))
        assert cli.main(["train", "language", str(recipe), "--out", str(folder / "run"), "--quiet"]) == 0
        return folder / "run", base

    return trained


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main([str(w) for w in words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.float()
    return out


def trained_logits(run: Path, ema: bool = False) -> torch.Tensor:
    recipe, state = read_language(run / "recipe.yaml"), checkpoint_of(run, run, False)
    start = start_of(recipe, run, World())
    with put_state(start, recipe, state, ema):
        return logits_of(start.model)


def loaded(folder: Path) -> Any:
    """The class that config.json names, once transformers has nothing to say."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, named).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ema", "dropout"),
    [("llama", False, 0.0), ("llama", True, 0.0), ("deepseek_v3", False, 0.1), ("gemma3", False, 0.0)],
)
def test_peft_loads_an_exported_adapter_without_a_word_and_gives_the_trained_logits(
    run_of: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    kind: str,
    ema: bool,
    dropout: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, base = run_of(kind, True, dropout=dropout)
    code, text = told(capsys, "convert", run, tmp_path / "adapter", "--to", "peft", *(["--ema"] if ema else []))
    assert code == 0 and f"PEFT {peft.__version__} loads it" in text, text
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "tensorkeep.json"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(loaded(base), str(tmp_path / "adapter"))
    assert not [w for w in said if re.search("missing|unexpected|ignored|did not match", str(w.message), re.I)]
    wanted, before = trained_logits(run, ema), logits_of(loaded(base))
    assert close(logits_of(theirs), wanted) and not close(before, wanted)
    assert told(capsys, "merge", base, tmp_path / "adapter", tmp_path / "merged")[0] == 0
    assert close(logits_of(loaded(tmp_path / "merged")), logits_of(theirs.merge_and_unload()))


def test_an_adapter_over_codes_keeps_what_it_was_trained_on(
    run_of: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = run_of("llama", True, "nf4")
    assert told(capsys, "convert", run, tmp_path / "adapter", "--to", "peft")[0] == 0
    said = read(tmp_path / "adapter").metadata["adapter"]
    assert said["quantization"]["kind"] == "nf4" and said["base_digest"]
    assert not {"quantization", "base_digest", "kind"} & set(
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    )
    assert told(capsys, "merge", base, tmp_path / "adapter", tmp_path / "merged")[0] == 0
    assert close(logits_of(loaded(tmp_path / "merged")), trained_logits(run))
    assert told(capsys, "convert", tmp_path / "adapter", tmp_path / "again", "--to", "peft")[0] == 0
    assert read(tmp_path / "again").metadata["adapter"] == said


def test_a_run_merges_into_its_base_as_its_adapter_does(
    run_of: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = run_of("llama", True)
    step = sorted((run / "checkpoints").glob("step-*"))[-1]
    for out, words in (("a", [base, run]), ("b", [run]), ("c", [base, step])):
        assert told(capsys, "merge", *words, tmp_path / out)[0] == 0
    first, *others = (load_file(tmp_path / out / "model.safetensors") for out in "abc")
    assert all(torch.equal(t, other[n]) for other in others for n, t in first.items())
    assert close(logits_of(loaded(tmp_path / "a")), trained_logits(run))


def test_what_peft_would_load_differently_is_refused_with_a_way_out(
    run_of: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = run_of("llama", True)
    real = peft.PeftModel.from_pretrained

    def without_the_last(model: Any, folder: str, **options: Any) -> Any:
        made = real(model, folder, **options)
        with torch.no_grad():
            next(p for n, p in made.named_parameters() if "lora_B" in n).zero_()
        return made

    def refuses(*_: Any, **__: Any) -> Any:
        raise ValueError("no such architecture")

    for wrong, said in ((without_the_last, "has other values"), (refuses, "no such architecture")):
        monkeypatch.setattr(peft.PeftModel, "from_pretrained", wrong)
        code, text = told(capsys, "convert", run, tmp_path / "no", "--to", "peft")
        assert code == 2 and said in text and "A01" in text and not list(tmp_path.iterdir())
    (hint,) = re.findall(r"tensorkeep (merge .*)", text)
    assert told(capsys, *shlex.split(hint.replace("OUT", str(tmp_path / "merged"))))[0] == 0


# -- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "ema"), [("qwen3_moe", False), ("qwen3_5", True), ("gemma3", False)])
def test_a_whole_model_gets_its_bases_names_and_what_else_the_base_holds(
    run_of: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str, ema: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = run_of(kind, False)
    code, text = told(capsys, "convert", run, tmp_path / "out", "--to", "hf", *(["--ema"] if ema else []))
    assert code == 0, text
    mine, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", base))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    same = {n for n, t in mine.items() if torch.equal(t, theirs[n])}
    assert same == {n for n in mine if re.search(r"visual|vision|multi_modal", n)}
    assert close(logits_of(loaded(tmp_path / "out")), trained_logits(run, ema))


# -- hints ------------------------------------------------------------------------------------------------------------


def test_every_command_that_an_export_proposes_works(
    run_of: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter, base = run_of("llama", True)
    whole, _ = run_of("llama", False)
    monkeypatch.chdir(tmp_path)
    tried = 0
    for words, code in (
        (["convert", adapter, "no", "--to", "hf"], 2),
        (["convert", adapter, "no", "--to", "hf", "--ema"], 2),
        (["convert", adapter, "no.pth", "--to", "pth"], 2),
        (["convert", whole, "no", "--to", "peft"], 2),
        (["convert", whole, "no", "--to", "peft", "--ema"], 2),
        (["convert", adapter, "adapter", "--to", "peft"], 0),
        (["merge", adapter, "adapter", "no"], 2),
        (["merge", "adapter", base, "no"], 2),
    ):
        found, text = told(capsys, *words)
        assert found == code and not Path("no").exists(), text
        hints = re.findall(r"tensorkeep ((?:convert|merge) [^\n;(]*)", text)
        for hint in hints:
            tried += 1
            proposed = [w.replace("OUT", f"made{tried}") for w in shlex.split(hint)]
            if not {"BASE", "ADAPTER"} & set(proposed):
                done, why = told(capsys, *proposed)
                assert done == 0, f"{hint}: {why}"
        assert hints
    assert tried >= 8
