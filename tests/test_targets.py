"""What `convert --for` and `merge` claim of a planned sink, what they refuse, and what they leave unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tensorkeep.cli import main
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.targets import TARGETS, arranged, check
from tensorkeep.formats.view import read
from tests.helpers import LLAMA, held, model_tensors, refused, write_hf

CONFIG = LLAMA | {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "vocab_size": 10,
}


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The exit code, the last line on stdout and what stderr holds, of one command."""
    capsys.readouterr()
    code = main([str(w) for w in words])
    found = capsys.readouterr()
    return code, found.out.strip().rpartition("\n")[2], found.err


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", model_tensors(), CONFIG)


def test_a_folder_is_proven_for_transformers_and_a_lone_file_is_not(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    words = f"proven: loads in transformers {transformers.__version__}"
    assert words in said(capsys, "convert", source, tmp_path / "out", "--to", "hf")[1]
    line = said(capsys, "convert", source, tmp_path / "lone.safetensors", "--to", "hf")[1]
    assert "bytes equal to the plan; loading not checked: transformers loads folders" in line
    (source / "config.json").unlink()
    line = said(capsys, "convert", source, tmp_path / "bare", "--to", "hf")[1]
    assert "loading not checked: no config.json" in line


def test_without_transformers_nothing_is_claimed_of_it(source: Path) -> None:
    proof = check(make_plan([read(source)], "hf"), "hf", "out")
    assert (proof.target, proof.why) == (None, "transformers is not installed")
    assert proof.line == "bytes equal to the plan; loading not checked: transformers is not installed"


def test_header_entries_that_nobody_reads_are_not_claimed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, source / "model.safetensors", {"format": "pt", "q_proj": "{}"})
    line = said(capsys, "convert", source, tmp_path / "out", "--to", "hf")[1]
    assert "loading not checked: 1 entries of the safetensors header" in line


def test_integers_under_a_weights_name_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, source / "model.safetensors", {"format": "pt"})
    code, _, err = said(capsys, "convert", source, tmp_path / "out", "--to", "hf")
    assert code == 2 and "Q01" in err and name in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("--to pth --for torchtitan", None, "--to dcp or hf"),
        ("--to dcp --for transfomers", None, "did you mean transformers?"),
        ("--to hf --for hf", None, "--for transformers"),
        ("--to dcp --for torchtitan --naming hf", "K06", "torchtitan-0.2"),
        ("--to dcp --for torchtitan --root model", "K04", "flat names"),
        ("--to dcp --for flame --drop **.up_proj.weight", "K01", "flame would miss"),
        ("--to pth --for opentad", "K07", ""),
    ],
)
def test_what_a_program_does_not_load_is_refused_before_it_is_written(
    words: str, code: str | None, told: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, _, err = said(capsys, "convert", source, tmp_path / "out", *words.split())
    assert left == 2 and told in err and (code is None or code in err) and not (tmp_path / "out").exists()


def test_a_minimind_file_has_the_name_that_it_looks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = write_hf(tmp_path / "tied", model_tensors(head=False), CONFIG | {"tie_word_embeddings": True})
    code, _, err = said(capsys, "convert", tied, tmp_path / "mine.pth", "--to", "pth", "--for", "minimind")
    assert code == 2 and "full_sft_8.pth" in err and not (tmp_path / "mine.pth").exists()
    code, line, _ = said(capsys, "convert", tied, tmp_path / "full_sft_8.pth", "--to", "pth", "--for", "minimind")
    assert code == 0 and "proven: loads in minimind (mm2)" in line


def test_every_program_says_which_names_it_loads_from_each_format() -> None:
    assert list(TARGETS) == ["transformers", "peft", "torchtitan", "olmo-core", "flame", "opentad", "minimind"]
    assert all(t.rules.keys() == t.namings.keys() for t in TARGETS.values())
    assert [arranged(word, to, None)[0] for word, to in (("opentad", "pth"), ("flame", "dcp"))] == ["opentad", "hf"]
    with refused(None, "no program"):
        arranged("olmo", "hf", None)


# -- 4 bits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A llama whose linears bitsandbytes quantized, saved by torch, with the float model's folder; and its logits."""
    bitsandbytes, tf = pytest.importorskip("bitsandbytes"), pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96)).to(torch.bfloat16)
    model.save_pretrained(place / "plain")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            made = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            made.weight = bitsandbytes.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.to("cpu"))
    torch.save({n: t.contiguous() for n, t in model.state_dict().items()}, place / "model.pth")
    with torch.no_grad():
        return place, model.float().train()(input_ids=torch.arange(12)[None]).logits


def settings(place: Path, folder: Path, **more: Any) -> Path:
    """The float model's config with the settings of its codes."""
    folder.mkdir()
    found = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **more}
    config = json.loads((place / "plain" / "config.json").read_text()) | {"quantization_config": found}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_saved_4_bit_state_dict_loads_in_transformers_with_a_config_that_says_so_and_is_refused_without(
    codes: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    place, wanted = codes
    convert = ("convert", place / "model.pth", tmp_path / "out", "--to", "hf", "--config")
    code, _, err = said(capsys, *convert, place / "plain")
    assert code == 2 and "Q01" in err and "load_in_4bit" in err and not (tmp_path / "out").exists()
    code, line, _ = said(capsys, *convert, settings(place, tmp_path / "said"))
    assert code == 0 and "proven: loads in transformers" in line
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, device_map={"": "cpu"}, dtype=torch.float32
    )
    assert not any(report.values())
    with torch.no_grad():
        made = model.train()(input_ids=torch.arange(12)[None]).logits
    assert float((made - wanted).norm() / wanted.norm()) < 0.03


def test_codes_where_plain_layers_are_built_and_floats_where_codes_are_read_are_refused(
    codes: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = codes
    skips = settings(place, tmp_path / "skips", llm_int8_skip_modules=["lm_head", "q_proj"])
    convert = ("convert", place / "model.pth", tmp_path / "out", "--to", "hf", "--config", skips)
    code, _, err = said(capsys, *convert)
    assert code == 2 and "q_proj (of 1) holds codes" in err
    said(capsys, *convert[:-1], settings(place, tmp_path / "right"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {n: t for n, t in held(tmp_path / "out").items() if not n.startswith(name)}
    tensors[name] = load_file(place / "plain" / "model.safetensors")[name]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "tensorkeep.json").unlink()
    code, _, err = said(capsys, "convert", tmp_path / "out", tmp_path / "again", "--to", "hf")
    assert code == 2 and "q_proj (of 1) holds floats" in err and not (tmp_path / "again").exists()
