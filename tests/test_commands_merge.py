"""`tensorkeep merge` as a person and a program meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tensorkeep.cli import main
from tensorkeep.commands.merge import _rows
from tests.helpers import LLAMA, held, model_tensors, write_hf
from tests.test_merging import Q, pair, write_adapter


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_hf(tmp_path / "base", model_tensors(), LLAMA)
    write_adapter(tmp_path / "style", pair(Q))
    write_adapter(tmp_path / "tone", pair(Q, seed=5))
    write_adapter(tmp_path / "taken", pair(Q))
    return tmp_path


def test_it_says_what_was_added_where_and_that_it_was_proven(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(place / "base"), str(place / "style"), f"{place / 'tone'}=0.5", str(place / "out")]) == 0
    said = capsys.readouterr().out
    for words in (
        "LoRA r 2 on 1 tensors, times 0.5",
        f"{Q}.weight",
        "tensors changed",
        "computed twice, bytes equal to the plan; transformers would miss",
    ):
        assert words in said


def test_the_document_names_adapters_figures_and_proof(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(place / "base"), str(place / "style"), str(place / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["proven"] is True and document["onto"] == "trained" and document["overall"]["kept"] is None
    assert [a["modules"] for a in document["adapters"]] == [1] and document["merged"][0]["name"] == f"{Q}.weight"


def test_a_dry_run_prints_merge_steps_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(place / "base"), str(place / "style"), str(place / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "merge " in said and "r 2, scale 1.5" in said and not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["base", "out"], "no adapter"),
        (["style", "base", "out"], "an adapter, not a base"),
        (["base", "style=x", "out"], "no weight"),
        (["base", "style", "style", "out"], "given twice"),
        (["base", "style", "base"], "the sink is the source"),
        (["base", "style", "taken"], "exists already"),
        (["base"], "a base, an adapter and a sink"),
        (["base", "style", "out", "--dtype", "bf17"], "did you mean"),
        (["base", "style", "out", "--untie"], "not tied"),
    ],
)
def test_a_mistake_gets_one_line_and_a_way_on(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: str
) -> None:
    assert main(["merge", *(w if w.startswith("-") or w == "bf17" else str(place / w) for w in words)]) == 2
    said = capsys.readouterr().err
    assert code in said and said.count("error:") == 1 and "hint:" in said and not (place / "out").exists()


def test_an_adapter_in_the_base_s_own_file_is_merged(place: Path) -> None:
    tensors = model_tensors(norms=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    halves = {f"module.{Q}.lora.{h}.weight": pair(Q)[f"{Q}.lora_{h}.weight"] for h in "AB"}
    torch.save({**{f"module.{n}": t for n, t in tensors.items()}, **halves}, place / "lora_x_8.pth")
    torch.save(halves, place / "lora_y_8.pth")
    torch.save(tensors, place / "pretrain_8.pth")
    (place / "config.json").write_text(
        json.dumps({"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1})
    )
    assert main(["merge", str(place / "lora_x_8.pth"), str(place / "a"), "--quiet"]) == 0
    assert (
        main(
            [
                "merge",
                str(place / "pretrain_8.pth"),
                str(place / "lora_y_8.pth"),
                str(place / "b.pth"),
                "--to",
                "pth",
                "--naming",
                "minimind",
            ]
        )
        == 0
    )
    exact = (
        tensors[f"{Q}.weight"].double()
        + pair(Q)[f"{Q}.lora_B.weight"].double() @ pair(Q)[f"{Q}.lora_A.weight"].double()
    ).float()
    assert torch.equal(held(place / "a")[f"{Q}.weight"], exact)
    assert torch.equal(torch.load(place / "b.pth", weights_only=True)[f"{Q}.weight"], exact)


def test_layers_of_one_and_of_two_digits_share_a_row() -> None:
    rows = [{"name": f"layers.{n}.q.weight", "kind": "LoRA", "change": 0.1, "kept": None} for n in range(30)]
    assert [row[0] for row in _rows(rows, quantized=False)] == ["layers.{0..29}.q.weight"]


def test_inspect_shows_layers_of_one_and_of_two_digits_in_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "m", {f"model.layers.{n}.input_layernorm.weight": torch.ones(4) for n in range(12)}, LLAMA)
    assert main(["inspect", str(tmp_path / "m")]) == 0
    assert "model.layers.{0..11}.input_layernorm.weight" in capsys.readouterr().out
