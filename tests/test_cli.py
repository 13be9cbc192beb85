"""The command line's contract: exit codes, JSON fields, errors with hints, what is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tensorkeep.cli import COMMANDS, first_line, main
from tests.tools import TINY, flip_a_byte, tiny_copy

FIELDS = {"schema", "path", "format", "naming", "tensors", "parameters", "bytes", "quantized", "adapter", "run"}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_inspect_json_has_the_contracted_fields(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", TINY, "--json")
    document = json.loads(out)
    assert code == 0 and set(document) >= FIELDS and document["schema"] == 1
    assert (document["format"], document["naming"], document["parameters"]) == ("hf", "hf", 22688)
    assert set(document["tensors"][0]) == {"name", "dtype", "shape", "bytes", "file", "tied_to"}


def test_inspect_digests_are_those_of_the_raw_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    import xxhash
    from safetensors import safe_open

    _, out, _ = run(capsys, "inspect", TINY, "--json", "--digests")
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        for tensor in json.loads(out)["tensors"]:
            raw = file.get_tensor(tensor["name"]).view(__import__("torch").uint8).numpy().tobytes()
            assert tensor["xxh3_128"] == xxhash.xxh3_128(raw).hexdigest()


def test_a_conversion_there_and_back_is_equal_and_diff_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "convert", TINY, tmp_path / "dcp", "--to", "dcp", "--naming", "torchtitan")[0] == 0
    assert run(capsys, "convert", tmp_path / "dcp", tmp_path / "hf", "--to", "hf")[0] == 0
    code, out, _ = run(capsys, "diff", TINY, tmp_path / "hf", "--json")
    assert code == 0 and json.loads(out)["equal"] is True
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "config.json").read_bytes() == (TINY / "config.json").read_bytes()


def test_differences_exit_with_1_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tiny_copy(tmp_path / "copy")
    flip_a_byte(copy / "model.safetensors", -3)
    code, out, _ = run(capsys, "diff", TINY, copy, "--json")
    rows = [t for t in json.loads(out)["tensors"] if t["status"] != "equal"]
    assert code == 1 and len(rows) == 1 and rows[0]["different_elements"] == 1
    code, out, _ = run(capsys, "diff", TINY, copy)
    assert code == 1 and "1 of 20 tensors differ" in out


def test_diff_points_at_rows_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", TINY, tmp_path / "meta.pth", "--to", "pth", "--naming", "torchtitan-0.2")[0] == 0
    import torch

    state = torch.load(tmp_path / "meta.pth", weights_only=True)
    for n in range(2):  # undo nothing but the names: q/k stay in the other layout
        for own, hf in (("wq", "q_proj"), ("wk", "k_proj")):
            state[f"model.layers.{n}.self_attn.{hf}.weight"] = state.pop(f"layers.{n}.attention.{own}.weight")
    torch.save({k: v for k, v in state.items() if "self_attn" in k}, tmp_path / "broken.pth")
    code, out, _ = run(capsys, "diff", TINY, tmp_path / "broken.pth", "--json")
    moved = {t["name"] for t in json.loads(out)["tensors"] if t["same_rows_in_another_order"]}
    assert code == 1 and moved == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qk"}


def test_verify_names_the_damaged_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tiny_copy(tmp_path / "copy")
    assert run(capsys, "verify", copy)[0] == 0
    flip_a_byte(copy / "model.safetensors", -3)
    code, out, _ = run(capsys, "verify", copy, "--json")
    document = json.loads(out)
    assert code == 1 and document["verdict"] == "findings"
    assert [(f["code"], f["count"]) for f in document["findings"]] == [("F03", 1)]


def test_verify_finds_a_flipped_bit_in_a_dcp_without_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "convert", TINY, tmp_path / "dcp", "--to", "dcp")
    (tmp_path / "dcp" / "tensorkeep.json").unlink()
    assert run(capsys, "verify", tmp_path / "dcp")[0] == 0
    data = tmp_path / "dcp" / "__0_0.distcp"
    flip_a_byte(data, data.read_bytes().find(b"archive/data/0") + 200)
    code, out, _ = run(capsys, "verify", tmp_path / "dcp", "--json")
    assert code == 1 and json.loads(out)["findings"][0]["code"] == "F03"


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert", TINY, tmp_path / "out", "--to", "dcp", "--naming", "torchtitan", "--dry-run")
    assert code == 0 and "rename permute" in out and "nothing written" in out and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["inspct"], "inspct", "tensorkeep --help"),
        (["inspect"], "CHECKPOINT is missing", "tensorkeep inspect --help"),
        (["inspect", "/nosuch"], "no such file or folder", "check the path"),
        (["inspect", str(TINY), "--tensors", "*q_prj*"], "no tensor fits", "did you mean q_proj"),
        (["convert", str(TINY), "out", "--to", "run"], "cannot write the format 'run'", "hf, dcp, peft, gguf, pth"),
        (["convert", str(TINY), "out", "--to", "dcp", "--naming", "torchtian"], "no naming", "did you mean torchtitan"),
        (["convert", str(TINY), "out", "--to", "hf", "--dtype", "bf61"], "no dtype", "did you mean bf16"),
        (["convert", str(TINY), "out", "--to", "hf", "--shard-size", "many"], "not a size", "5GB"),
        (["convert", str(TINY), "out", "--to", "hf", "--drop", "*.nothing"], "fits no tensor", "inspect"),
        (["convert", str(TINY), str(TINY), "out", "--to", "hf"], "in two sources", "--prefer"),
        (["convert", str(TINY), str(TINY), "--to", "hf", "--overwrite"], "sink is the source", "another path"),
    ],
)
def test_bad_usage_exits_with_2_and_one_hint(
    words: list[str],
    said: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == ""
    assert said in err and "\nhint: " in err and hint in err
    assert err.count("error:") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["verify", ""], ["convert", "", "out", "--to", "hf"], ["train", "language", ""]])
def test_an_empty_word_is_not_this_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "a word is empty" in err and "variable" in err


def test_errors_are_a_document_under_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", "/nosuch", "--json")
    assert code == 2 and json.loads(out)["error"]["message"] == "no such file or folder"


def test_every_command_has_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = run(capsys, "--help")
    assert all(first_line(c.replace(" ", "_")) for c in COMMANDS)
    assert " ".join(first_line("verify").split()[:4]) in shown
    for command in COMMANDS:
        assert run(capsys, *command.split(), "--help")[0] == 0


def test_inspect_of_safetensors_imports_neither_torch_nor_numpy() -> None:
    libraries = ("torch", "numpy", "gguf", "transformers")
    code = "import sys; from tensorkeep.cli import main; main(sys.argv[1:]); "
    code += f"print([m for m in {libraries} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(TINY), "--json"], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_convert_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys; from tensorkeep.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    words = ["convert", str(TINY), str(tmp_path / "out"), "--to", "dcp", "--naming", "torchtitan", "--quiet"]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("certificate", [True, False])
def test_convert_refuses_a_source_that_rotted(
    certificate: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "convert", TINY, tmp_path / "dcp", "--to", "dcp", "--naming", "torchtitan")
    data = tmp_path / "dcp" / "__0_0.distcp"
    flip_a_byte(data, data.read_bytes().find(b"archive/data/0") + 200)
    if not certificate:  # then torch's own CRC-32 tells
        (tmp_path / "dcp" / "tensorkeep.json").unlink()
    code, _, err = run(capsys, "convert", tmp_path / "dcp", tmp_path / "hf", "--to", "hf")
    assert code == 2 and "F03" in err and "layers.0" in err and not (tmp_path / "hf").exists()
