"""What a mean but fair tester tried: pointers to saves that are gone, fp8 without scales, odd numbers, secrets."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.conversion.naming import NAMINGS, module
from tensorkeep.conversion.naming.table import Row, matcher
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.verification import verify
from tensorkeep.errors import TensorkeepError, masked, untold
from tensorkeep.formats.view import read
from tests.checkpoints import hf_tensors, write_model
from tests.helpers import refused


def zero(top: Path, tags: list[str], latest: str) -> Path:
    """A folder of DeepSpeed's saves: the value of the weight is the place of its tag."""
    for at, tag in enumerate(tags):
        (top / tag).mkdir(parents=True)
        torch.save({"module": {"w": torch.full((2,), float(at))}}, top / tag / "mp_rank_00_model_states.pt")
    (top / "latest").write_text(latest)
    return top


def value(path: Path) -> float:
    view = read(path)
    return float(view.array(next(iter(view)))[0])


def test_of_several_saves_the_one_that_latest_names_is_read_and_no_other(tmp_path: Path) -> None:
    tags = ["global_step9", "global_step10"]
    assert value(zero(tmp_path / "a", tags, "global_step9\n")) == 0.0
    assert value(zero(tmp_path / "b", [*tags, "best"], "best")) == 2.0
    for gone in ("global_step11", "../../etc"):
        with refused("F05", "none of the 2 saves"):
            read(zero(tmp_path / gone.replace("/", "-"), tags, gone))


def test_a_lone_save_is_read_and_said_where_latest_names_another(tmp_path: Path) -> None:
    view = read(zero(tmp_path / "a", ["global_step9"], "global_step11"))
    assert [n.message for n in view.notes if n.code == "F08"] == [
        "global_step9 is read; latest names 'global_step11', not there"
    ]
    assert not [n for n in read(zero(tmp_path / "b", ["global_step9"], "global_step9")).notes if n.code == "F08"]


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_fp8_codes_without_scales_are_not_written_as_weights_and_plain_casts_are(
    tmp_path: Path, dtype: str | None
) -> None:
    write_model(tmp_path / "base", "Llama", torch.bfloat16)
    for name, largest in (("codes", 448.0), ("cast", 1.0)):
        write_model(tmp_path / name, "Llama", torch.bfloat16)
        tensors = hf_tensors(tmp_path / "base")
        for key in [k for k in tensors if "proj" in k]:
            made = tensors[key].float() * largest / tensors[key].float().abs().max()
            tensors[key] = made.to(torch.float8_e4m3fn)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    more = ["--dtype", dtype] if dtype else []
    assert main(["convert", str(tmp_path / "codes"), str(tmp_path / "o1"), "--to", "hf", *more]) == 2
    assert not (tmp_path / "o1").exists()
    assert main(["convert", str(tmp_path / "cast"), str(tmp_path / "o2"), "--to", "hf", *more]) == 0
    assert main(["convert", str(tmp_path / "codes"), str(tmp_path / "o3.pth"), "--to", "pth"]) == 0
    assert load_file(tmp_path / "o2" / "model.safetensors")


@pytest.mark.parametrize("field", [{"max_position_embeddings": 10**12}, {"intermediate_size": -5}])
def test_a_number_that_no_model_has_is_a_finding_and_not_undecided(tmp_path: Path, field: dict[str, int]) -> None:
    write_model(tmp_path / "m", "Llama", torch.bfloat16)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | field))
    found = diagnose(str(tmp_path / "m"))
    assert "C01" in {f.code for f in found.findings if f.severity == "error"}
    assert main(["diagnose", str(tmp_path / "m")]) == 1


def test_a_secret_of_a_url_is_told_nowhere_in_what_a_library_says() -> None:
    url = "s3://AKIA:p%40ss@bucket/m"
    said = untold("Invalid bucket name AKIA:p%40ss@bucket, user AKIA, p@ss", url)
    assert "AKIA" not in said and "ss" not in said.replace("bucket", "")
    assert masked("http://h/m#token=abc") == "http://h/m#***"
    assert masked("http://h/m#a?token=abc") == "http://h/m#a?***"
    assert masked("s3://b/a#1.pth is missing") == "s3://b/a#1.pth is missing"


@pytest.mark.parametrize("url", ["s3://AKIA:hunter2@bucket/m", "hf://u:hunter2@x/y", "http://127.0.0.1:1/m#t=hunter2"])
def test_no_command_prints_a_secret_of_its_url(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", url]) == 2
    assert "hunter2" not in "".join(capfd.readouterr())


def test_a_training_folder_named_like_a_file_in_it_is_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "optimizer.bin"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    torch.save({"state": {0: torch.ones(100)}}, folder / "optimizer.bin")
    assert not [f for f in verify(folder)[0] if f.severity == "error"]
    whole = (folder / "optimizer.bin").read_bytes()
    (folder / "optimizer.bin").write_bytes(whole[: len(whole) // 2])
    assert [f.code for f in verify(folder)[0] if f.severity == "error"] == ["F02"]


def test_many_names_of_no_scheme_are_looked_at_once_and_a_table_for_people_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"a{i}" for i in range(30_000)]
    header = json.dumps({n: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in names}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    start = time.process_time()
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert time.process_time() - start < 10
    odd = {".".join("abcdefgh"[(i >> (3 * j)) & 7] for j in range(5)): torch.zeros(0) for i in range(3000)}
    save_file(odd, tmp_path / "y.safetensors")
    capfd.readouterr()
    assert main(["inspect", str(tmp_path / "y.safetensors")]) == 0
    out = capfd.readouterr().out
    assert "and 1,000 more rows" in out and len(out.splitlines()) < 2100


def test_one_expression_for_a_table_fits_what_its_rows_fit() -> None:
    rows = [Row("a.{n}.b", "x.{n}"), Row("c", "y", exact=True), Row("e.{n}.w{e}", "z.{n}.{e}")]
    fits = matcher(rows)
    right = ["a.3.b.weight", "c", "e.1.w2.bias"]
    wrong = ["a.3.b", "a.x.b.weight", "c.weight", "ca.3.b.weight", "a.3.b.weight\n", "e.1.w.bias"]
    assert [fits(n) for n in right] == [True] * 3 and [fits(n) for n in wrong] == [False] * 6
    assert all(not module(n).recognise("zz.zz") for n in NAMINGS)


def test_a_range_beside_the_weights_is_harmless(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "layers": range(5)}, tmp_path / "m.pt")
    assert list(read(tmp_path / "m.pt")) and not isinstance(read(tmp_path / "m.pt"), TensorkeepError)


@pytest.mark.parametrize("shapes", [((0, 8), (8, 0)), ((0, 8), (8, 2)), ((), ()), ((2, 8), (8, 0)), ((2, 8), (8, 3))])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_empty_tensors_is_a_finding_and_no_traceback(
    tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]], rslora: bool
) -> None:
    (tmp_path / "a").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {name.format(half): torch.zeros(shape) for half, shape in zip("AB", shapes)}
    save_file(pair, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": rslora}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    write_model(tmp_path / "base", "Llama", torch.bfloat16)
    assert main(["diagnose", str(tmp_path / "a")]) == 1
    assert main(["diagnose", str(tmp_path / "a"), "--reference", str(tmp_path / "base")]) == 1
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "a"), str(tmp_path / "out")]) == 2
