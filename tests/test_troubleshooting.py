"""Troubleshooting: each symptom ends in a command, and on a file with that trouble the command names it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.cli import main
from tests.quant_files import model, quantize, write
from tests.tools import ROOT

PAGES = [ROOT / "docs" / name for name in ("troubleshooting.md", "troubleshooting.zh.md")]
SOUND, ADAPTER = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "tiny-adapter"


def symptoms(page: Path) -> list[tuple[str, list[list[str]]]]:
    """Each symptom with the words of its commands."""
    out = []
    for part in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"```bash\n(.*?)```", part, re.DOTALL)
        out.append((part.partition("\n")[0], [shlex.split(line) for block in blocks for line in block.splitlines()]))
    return out


def test_each_symptom_ends_in_a_command_and_both_languages_have_the_same() -> None:
    english, chinese = (symptoms(page) for page in PAGES)
    assert [commands for _, commands in english] == [commands for _, commands in chinese]
    assert len(english) > 12 and all(commands for _, commands in english)
    for page in PAGES:
        assert all(part.rstrip().endswith("```") for part in page.read_text().split("\n## ")[1:])
    links = [sorted(re.findall(r"\]\((codes/\w+\.md)\)", page.read_text())) for page in PAGES]
    assert links[0] == links[1] and len(links[0]) > 15


def copied(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """The small llama with other tensors, without its certificate: another program wrote it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(SOUND, folder, ignore=shutil.ignore_patterns("tensorkeep.json"))
    tensors = change(load_file(SOUND / "model.safetensors"))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def interleaved(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        k: t.view(-1, 2, 4, t.shape[1]).transpose(1, 2).reshape(t.shape) if re.search("[qk]_proj", k) else t
        for k, t in tensors.items()
    }


def with_nan(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["model.norm.weight"][3] = float("nan")
    return tensors


def merged(folder: Path) -> Path:
    assert main(["merge", str(SOUND), str(ADAPTER), str(folder), "--quiet"]) == 0
    return folder


def filtered(folder: Path) -> Path:
    kept = {name: t for name, t in quantize(model()).items() if "absmax" not in name and "quant" not in name}
    return Path(write(folder, kept))


def cut(folder: Path) -> Path:
    shutil.copytree(SOUND, folder)
    os.truncate(folder / "model.safetensors", (SOUND / "model.safetensors").stat().st_size - 200)
    return folder


class Calls:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def calling(path: Path) -> Path:
    import torch

    torch.save({"model": {"weight": torch.ones(2)}, "more": Calls()}, path, pickle_module=pickle)
    return path


TROUBLES: list[tuple[str, Callable[[Path], Path], int, str]] = [
    ("The loss starts at 5", lambda p: copied(p, interleaved), 1, "O01"),
    ("`Unexpected key(s) in state_dict: ... weight.absmax", filtered, 1, "Q01"),
    ("`Missing key(s)`", lambda p: copied(p, lambda t: {f"module.{k}": v for k, v in t.items()}), 0, "mended: K03"),
    ("It loads without an error", lambda p: copied(p, interleaved), 1, "same rows in another order"),
    ("LoRA merged twice", merged, 2, "A03"),
    ("The loss is NaN", lambda p: copied(p, with_nan), 1, "V01"),
    ("The file does not open", cut, 1, "F02"),
    ("`Weights only load failed`", lambda p: calling(p.with_suffix(".pth")), 2, "F04"),
]


@pytest.mark.parametrize(("symptom", "make", "code", "says"), TROUBLES, ids=[t[3] for t in TROUBLES])
def test_the_command_names_the_trouble(
    symptom: str,
    make: Callable[[Path], Path],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    ((_, commands),) = [found for found in symptoms(PAGES[0]) if found[0].startswith(symptom)]
    (words,) = commands
    ours = {"CHECKPOINT": make(tmp_path / "checkpoint"), "ORIGINAL": SOUND, "ADAPTER": ADAPTER, "OUT": tmp_path / "out"}
    capsys.readouterr()
    assert main([str(ours.get(word, word)) for word in words[1:]]) == code
    printed = capsys.readouterr()
    assert says in printed.out + printed.err


def test_map_of_zero_is_told_from_the_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = {"subset": "validation", "duration": 30, "annotations": [{"label": "jump", "segment": [1, 5]}]}
    (tmp_path / "a.json").write_text(json.dumps({"database": {"v1": truth}}))
    found = [{"label": "leap", "segment": [1, 5], "score": 0.9}]
    (tmp_path / "d.json").write_text(json.dumps({"results": {"v1": found}}))
    ((_, (words, _)),) = [found for found in symptoms(PAGES[0]) if found[0] == "mAP is 0"]
    files = {"ANNOTATIONS.json": tmp_path / "a.json", "DETECTIONS.json": tmp_path / "d.json"}
    assert main([str(files.get(word, word)) for word in words[1:]]) == 0
    assert "leap" in capsys.readouterr().err
