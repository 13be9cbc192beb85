"""CONTRIBUTING's recipe: one file and one table line add a format, a naming, a check, a kind of adapter, a backbone.

The files are those in tests/extending; each test adds one line to a table, and every command that should knows it.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tensorkeep.adapters import kinds
from tensorkeep.adapters.kinds import ADAPTER_KINDS
from tensorkeep.cli import main
from tensorkeep.conversion.naming import NAMINGS
from tensorkeep.diagnosis.checks import CODES
from tensorkeep.formats.table import FORMATS
from tensorkeep.formats.view import read
from tests.tools import ROOT, TINY, flip_a_byte

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command as users call it: exit code, stdout without frames and line breaks, stderr."""

    def called(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(w) for w in words])
        shown = capsys.readouterr()
        return code, re.sub(r"[\s│]+", " ", shown.out), shown.err

    return called


def writer() -> dict[str, Any]:
    """What writes the pages that follow from the tables."""
    return runpy.run_path(str(ROOT / "docs" / "write_codes.py"))


def known_to(run: Run, word: str, commands: dict[str, str]) -> None:
    """The help of these commands shows the word in the line of the option, and does so from the table."""
    for command, option in commands.items():
        code, shown, _ = run(*command.split(), "--help")
        entry = shown.partition(" Parameters ")[2].partition(f"{option} ")[2].partition(" --")[0]
        assert code == 0 and word in entry, (command, option, entry)


def test_a_format_is_one_file_and_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, back = tmp_path / "made", tmp_path / "back"
    code, _, error = run("convert", TINY, made, "--to", "dummy")
    assert code == 2 and "cannot write the format 'dummy'" in error

    monkeypatch.setitem(FORMATS, "dummy", "tests.extending.dummy_format")

    known_to(run, "dummy", {"convert": "--to", "merge": "--to"})
    assert run("convert", TINY, made, "--to", "dummy")[0] == 0
    assert {"weights.dummy", "weights.json", "config.json", "tensorkeep.json"} <= {p.name for p in made.iterdir()}
    assert "format dummy, naming hf" in run("inspect", made)[1]
    assert "equal: all 20 tensors" in run("diff", TINY, made)[1]
    assert "every digest matches the certificate" in run("verify", made)[1]
    assert run("diagnose", made, "--reference", TINY)[0] == 0
    assert run("convert", made, back, "--to", "hf")[0] == 0
    assert (back / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert "did you mean dummy?" in run("convert", TINY, tmp_path / "x", "--to", "dumy")[2]
    assert "dummy is a folder" in run("convert", TINY, tmp_path / "x.safetensors", "--to", "dummy")[2]
    (tmp_path / "nothing").mkdir()
    assert "a folder with weights.dummy" in run("inspect", tmp_path / "nothing")[2]
    page = writer()["with_tables"]("<!-- formats -->\n<!-- end -->")
    assert "| `dummy` | `dummy`: a folder of `weights.dummy`, the bytes of all tensors" in page
    (made / "tensorkeep.json").unlink()
    assert "no certificate" in run("verify", made)[1]  # it says nothing of checksums, so it has none


def test_a_broken_checkpoint_of_a_new_format_is_named_and_mended_in_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "dummy", "tests.extending.dummy_format")
    assert run("convert", TINY, tmp_path / "made", "--to", "dummy")[0] == 0
    flip_a_byte(tmp_path / "made" / "weights.dummy", 4097)
    (tmp_path / "made" / "tensorkeep.json").unlink()
    code, shown, _ = run("diagnose", tmp_path / "made", "--reference", TINY)
    assert code == 1 and "V07" in shown
    words = ["repair", tmp_path / "made", tmp_path / "mended", "--reference", TINY]
    assert run(*words)[0] == 2  # what was flipped is only in the reference any more
    assert run(*words, "--take-from-reference", "*")[0] == 0
    assert read(str(tmp_path / "mended")).format == "dummy"


def test_a_naming_is_one_file_and_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, back = tmp_path / "made", tmp_path / "back"
    assert "no naming 'dummy'" in run("convert", TINY, made, "--to", "hf", "--naming", "dummy")[2]
    assert "no loader 'dummyloader'" in run("diagnose", TINY, "--for", "dummyloader")[2]

    monkeypatch.setitem(NAMINGS, "dummy", "tests.extending.dummy_naming")

    known_to(run, "dummy", {"convert": "--naming", "merge": "--naming"})
    known_to(run, "dummy", {"convert": "--from-naming"})
    known_to(run, "dummyloader", {"diagnose": "--for", "repair": "--for"})
    assert run("convert", TINY, made, "--to", "hf", "--naming", "dummy")[0] == 0
    names = set(load_bytes(made))
    assert {"words.weight", "floor.1.query.weight", "roof.weight"} <= names
    assert "format hf, naming dummy" in run("inspect", made)[1]
    assert "equal: all" in run("diff", TINY, made)[1]
    assert run("convert", made, back, "--to", "hf", "--from-naming", "dummy")[0] == 0
    assert load_bytes(back) == load_bytes(TINY)
    assert run("diagnose", made, "--for", "dummyloader")[0] in (0, 3)
    code, shown, _ = run("diagnose", TINY, "--for", "dummyloader", "--reference", TINY)
    assert code == 1 and "K06" in shown and "--naming dummy" in shown
    assert "did you mean dummy?" in run("convert", TINY, tmp_path / "x", "--to", "hf", "--naming", "dumy")[2]
    assert "| `dummy` | `dummy`: names of a program" in writer()["with_tables"]("<!-- namings -->\n<!-- end -->")


def load_bytes(folder: Path) -> dict[str, bytes]:
    view = read(str(folder))
    return {name: bytes(view.bytes(name)) for name in view}


def test_a_check_is_one_file_and_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sick = tmp_path / "sick"
    sick.mkdir()
    save_file({"model.norm.weight": np.ones(13, np.float32)}, sick / "model.safetensors")
    assert "no code 'X99'" in run("explain", "X99")[2] and "X99" not in run("diagnose", sick)[1]

    monkeypatch.setitem(CODES, "X99", "tests.extending.x99_dummy")

    assert run("explain", "x99")[1].startswith("X99 unlucky tensor: a tensor has thirteen rows.")
    code, shown, _ = run("diagnose", sick)
    assert code == 1 and "X99 unlucky tensor: 1 tensors have thirteen rows" in shown and "take one row less" in shown
    document = json.loads(run("diagnose", sick, "--json")[1])
    assert [f["code"] for f in document["findings"] if f["severity"] == "error"][-1] == "X99"
    code, _, error = run("repair", sick, tmp_path / "out", "--reference", sick)
    assert code == 2 and "it needs a model without thirteen rows" in error
    pages = writer()["pages"]()
    assert "# X99 unlucky tensor" in pages["X99.md"] and "| [X99](X99.md) | unlucky tensor |" in pages["README.md"]


def test_a_kind_of_adapter_is_one_file_and_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, vector = "model.layers.1.self_attn.q_proj.weight", np.linspace(-1, 1, 32).astype(np.float32)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    stored = f"base_model.model.{name.removesuffix('weight')}stretch_vector"
    save_file({stored: vector}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "STRETCH", "target_modules": ["q_proj"]}))
    error = run("merge", TINY, adapter, out)[2]
    assert "is a STRETCH adapter: merge adds LoRA, rsLoRA, DoRA, LoHa" in error

    monkeypatch.setitem(ADAPTER_KINDS, "STRETCH", "tests.extending.dummy_kind")

    assert "stretched" in run("merge", TINY, adapter, out, "--dry-run", "--dtype", "fp32")[1]
    code, shown, _ = run("merge", TINY, adapter, out, "--dtype", "fp32")
    assert code == 0 and "Stretch of 1 on 1 tensors" in shown and f"{name} Stretch" in shown
    base, merged = read(str(TINY)), read(str(out))
    before = base.array(name).astype(np.float64)
    assert np.array_equal(merged.array(name), (before + vector[:, None].astype(np.float64) * before).astype(np.float32))
    others = [n for n in merged if n != name]
    assert len(others) == 19 and all(np.array_equal(merged.array(n), base.array(n).astype(np.float32)) for n in others)
    assert run("inspect", adapter)[0] == 0 and run("verify", adapter)[0] == 0 and run("verify", out)[0] == 0
    assert run("diagnose", adapter, "--reference", TINY)[0] == 0
    assert "trainable tokens and Stretch" in kinds.known()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "STRETCH", "twisted": True}))
    assert "uses twisted" in run("merge", TINY, adapter, tmp_path / "other")[2]


def test_the_recipe_names_the_tables_and_their_files() -> None:
    recipe = (ROOT / "CONTRIBUTING.md").read_text()
    for place in re.findall(r"`(src/tensorkeep/[\w/.]+)`", recipe):
        assert (ROOT / place).exists(), place
    for word in ("FORMATS", "NAMINGS", "CODES", "ADAPTER_KINDS", "BACKBONES"):
        assert word in recipe


def test_a_backbone_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from tensorkeep.detection.backbones import BACKBONES
    from tensorkeep.detection.model.config import AdapterConfig
    from tensorkeep.detection.model.detector import video_features
    from tensorkeep.detection.model.quantization import quantize_backbone
    from tensorkeep.detection.start import load_pretrained
    from tensorkeep.errors import TensorkeepError
    from tests.detection import tiny

    frames, plain = tiny.batch()[0], tiny.detector()
    with pytest.raises(TensorkeepError, match="unknown backbone 'dummy'"):
        tiny.detector(kind="dummy")

    monkeypatch.setitem(BACKBONES, "dummy", "tests.extending.dummy_backbone")

    made = tiny.detector(kind="dummy", adapter=AdapterConfig())
    stored = {f"dummy.{n}": t for n, t in plain.backbone.state_dict().items() if "adapter" not in n}
    torch.save({**stored, "lid": torch.zeros(1)}, tmp_path / "weights.pth")
    assert load_pretrained(made, str(tmp_path / "weights.pth")) == ["lid"]
    made.backbone.load_state_dict(plain.backbone.state_dict())
    with torch.no_grad():
        wanted = video_features(plain.backbone.eval(), frames, 8)
        assert torch.allclose(video_features(made.backbone.eval(), frames, 8), 2 * wanted, rtol=1e-5)
        assert quantize_backbone(made.backbone) == 8
    with pytest.raises(TensorkeepError, match="did you mean dummy"):
        tiny.detector(kind="dumy")
