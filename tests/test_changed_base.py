"""A base that was changed after something was made from it: the file, the field and the tensor are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tests.language_files import save_model, texts
from tests.test_signing import run
from tests.tools import ROOT, TINY

ADAPTER = ROOT / "examples" / "tiny-adapter"
NAME = "model.layers.1.mlp.up_proj.weight"


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def another_bit(folder: Path, name: str = NAME) -> None:
    held = load_file(folder / "model.safetensors")
    held[name].view(torch.uint8)[0, 0] ^= 1
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[object]:
    """The words that check a merge of a base without a statement of its own."""
    shutil.copytree(TINY, tmp_path / "base")
    (tmp_path / "base" / "modeling_x.py").write_text("class E: pass\n")
    assert run(capsys, "merge", tmp_path / "base", ADAPTER, tmp_path / "merged", "--identify")[0] == 0
    words = ["verify", tmp_path / "merged", "--derivation", "--from", tmp_path / "base", "--from", ADAPTER]
    assert run(capsys, *words)[0] == 0
    return words


@pytest.mark.parametrize("file", ["config.json", "modeling_x.py"])
def test_a_changed_file_of_a_base_is_named_though_its_tensors_are_the_same(
    file: str, merged: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file == "config.json":
        edit(tmp_path / "base" / file, rms_norm_eps=0.5)
    else:
        (tmp_path / "base" / file).write_text("class E: 1\n")
    code, out, err = run(capsys, *merged)
    assert code == 2 and out == "" and err.count("error: F03") == 1
    assert f"than that of {tmp_path / 'base'}: {file} changed" in err
    assert json.loads((tmp_path / "merged" / "identity.json").read_text())["predicate"]["derivation"]["from"][0][
        "files"
    ]


def test_a_base_in_another_format_or_spelled_otherwise_is_the_same_base(
    merged: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tmp_path / "base" / "config.json", transformers_version="9.9.9")
    assert run(capsys, *merged)[0] == 0
    assert run(capsys, "convert", tmp_path / "base", tmp_path / "base.gguf", "--to", "gguf")[0] == 0
    merged[4] = tmp_path / "base.gguf"
    assert run(capsys, *merged)[0] == 0


def test_tensors_and_files_of_a_base_with_a_statement_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, merge = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(TINY, base)
    assert run(capsys, "convert", TINY, base, "--to", "hf", "--identify", "--overwrite")[0] == 0
    assert run(capsys, "merge", base, ADAPTER, merge, "--identify")[0] == 0
    words = ["verify", merge, "--derivation", "--from", base, "--from", ADAPTER]
    edit(base / "config.json", rms_norm_eps=0.5)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and "rms_norm_eps is 0.5, was" in err and "config.json: not the config" in err
    another_bit(base)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and f"1 tensor changed since the statement: {NAME}" in err and "config.json" in err
    (base / "identity.json").unlink()
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and "a link is missing" in err and f"; {base} is " in err


@pytest.fixture
def trained(tmp_path: Path) -> list[object]:
    """The words that go on with a run of two steps that trains an adapter."""
    document = {
        "version": 2,
        "model": str(save_model(tmp_path / "base", "llama")),
        "data": {"files": [str(texts(tmp_path / "a.jsonl"))], "length": 32, "packing": "concatenate"},
        "training": {"updates": 2, "batch_size": 4, "save_every": 1},
        "optimizer": {"lr": 1e-3},
        "adapter": {"lora_r": 4, "targets": ["q_proj"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    words = ["train", "language", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--quiet"]
    assert main([str(w) for w in words]) == 0
    return [*words, "--training.updates", 3, "--allow", "training.updates"]


def test_a_run_names_the_changed_file_and_config_of_its_base(
    trained: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (tmp_path / "base" / "config.json").read_text()
    edit(tmp_path / "base" / "config.json", rms_norm_eps=0.5)
    code, _, err = run(capsys, *trained)
    assert code == 2 and "R04" in err and "base.config was" in err and "base.digest" not in err
    (tmp_path / "base" / "config.json").write_text(config)
    another_bit(tmp_path / "base")
    code, _, err = run(capsys, *trained)
    assert code == 2 and "R04" in err and "base: model.safetensors has other content; base.digest was" in err
    another_bit(tmp_path / "base")
    edit(tmp_path / "base" / "config.json", transformers_version="9.9.9")
    assert run(capsys, *trained)[0] == 0
