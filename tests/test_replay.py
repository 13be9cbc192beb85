"""Steps of a run made again and compared; an identity that is demanded before the first step; a run's statement."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tensorkeep.cli import main
from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.diagnosis.live.loaded import check_loaded
from tests.helpers import refused
from tests.language_files import model as live_model
from tests.language_files import save_model, texts
from tests.test_signing import Keys, run

ADAPTER: dict[str, Any] = {"lora_r": 4, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "base", "llama")


def recipe(folder: Path, base: Path, demand: str = "", **changes: Any) -> Path:
    document = {
        "version": 2,
        "model": f"{base}{demand}",
        "data": {"files": [str(texts(folder / "a.jsonl"))], "length": 32, "packing": "concatenate"},
        "training": {"updates": 6, "batch_size": 4, "log_every": 1, "save_every": 2, "keep_last": 9, "ema": 0.9},
        "optimizer": {"lr": 1e-3},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with an adapter, whose base is demanded by identity."""
    place = tmp_path_factory.mktemp("run")
    words = ["train", "language", recipe(place, base, f"@{identify(base).identity}", adapter=ADAPTER)]
    assert main([str(w) for w in (*words, "--out", place / "run", "--quiet")]) == 0
    return place / "run"


def test_a_run_has_the_identity_of_what_is_made_of_it(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "convert", trained, tmp_path / "peft", "--to", "peft")[0] == 0
    code, out, _ = run(capsys, "identify", trained, "--json")
    document = json.loads(out)
    assert (code, document["of"], document["tensors"]) == (0, "adapter", 8)
    assert document["identity"] == identify(tmp_path / "peft").identity
    whole = recipe(tmp_path, base, training={"updates": 1, "batch_size": 4})
    assert run(capsys, "train", "language", whole, "--out", tmp_path / "run")[0] == 0
    assert run(capsys, "convert", tmp_path / "run", tmp_path / "hf", "--to", "hf", "--dtype", "fp32")[0] == 0
    assert identify(tmp_path / "run").identity == identify(tmp_path / "hf").identity != identify(base).identity


def test_steps_made_again_are_equal_and_the_run_stays_as_it_is(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    code, out, _ = run(capsys, "replay", trained, "--steps", "3..6", "--json")
    document = json.loads(out)
    assert (code, document["verdict"], document["from_step"], document["differing"]) == (0, "equal", 2, [])
    assert document["compared"] == 4 + 4 + 2  # rows of metrics, losses of proof.jsonl (3 to 6), two checkpoints
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_a_loss_that_was_changed_and_a_changed_checkpoint_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    proof = copy / "checkpoints" / "proof.jsonl"
    rows = [json.loads(line) for line in proof.read_text().splitlines()]
    rows[-1]["loss"] = (float.fromhex(rows[-1]["loss"]) * (1 + 1e-7)).hex()
    proof.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(capsys, "replay", copy, "--steps", f"{rows[-1]['step']}")
    assert code == 1 and f"step {rows[-1]['step']}, loss of proof.jsonl: was" in out and "differs: 1 of" in out
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    from tensorkeep.training import saver

    state = saver.load(trained / "checkpoints" / "step-000006")
    name = next(iter(state.model))
    state.model[name].view(torch.uint8).reshape(-1)[0] ^= 1
    saver.save(copy, state)
    code, out, _ = run(capsys, "replay", copy, "--steps", "5..6")
    assert code == 1 and re.search(rf"step 6, checkpoint: 1 of \d+ tensors differ, first model {name}\n", out)


def test_what_cannot_be_made_again_is_said(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "replay", base, "--steps", "1..2")[0] == 2
    for steps in ("0..2", "3..2", "x", "1..99"):
        assert run(capsys, "replay", trained, "--steps", steps)[0] == 2
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "metrics.jsonl").write_text("")
    (copy / "checkpoints" / "proof.jsonl").write_text("")
    code, out, _ = run(capsys, "replay", copy, "--steps", "1")
    assert code == 3 and "nothing was noted" in out


def test_another_base_is_an_error_before_the_first_step(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = identify(base).identity
    other = save_model(tmp_path / "other", "llama", rms_norm_eps=1e-5)
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    for demand, code in ((f"@{wanted}", "F03"), (f"@{wanted[:40]}", "F07"), (f"@{wanted.upper()}", "F07")):
        words = ("train", "language", recipe(tmp_path, other, demand), "--out", tmp_path / "run")
        exit_code, out, err = run(capsys, *words)
        assert exit_code == 2 and out == "" and f"error: {code} " in err
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_check_loaded_demands_an_identity(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base)
    wanted = identify(base).identity
    assert check_loaded(loaded, base, identity=wanted) == []
    with refused("F03", "is not the model that is demanded"):
        check_loaded(loaded, base, identity="ab" * 32)
    with refused("F07", "64 hex digits"):
        check_loaded(live_model("llama"), base, identity="ab" * 20)


def test_a_runs_statement_says_what_it_was_trained_from(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = Keys(tmp_path)
    assert run(capsys, "sign", trained, "--key", keys / "own.pem", "--overwrite")[0] == 0
    words = ("verify", trained, "--key", keys / "own.pub", "--derivation")
    code, out, err = run(capsys, *words, "--from", base)
    assert code == 3 and "train of base" in out and "tensorkeep replay RUN" in out, err
    code, _, err = run(capsys, *words)
    assert code == 2 and "a link is missing" in err
    said = json.loads((trained / "identity.json").read_text())["predicate"]
    assert said["of"] == "adapter" and said["derivation"]["recipe"]["training"]["updates"] == 6
    merged = tmp_path / "merged"
    assert run(capsys, "merge", trained, merged, "--identify")[0] == 0
    words = ("verify", merged, "--derivation", "--from", base, "--from", trained)
    code, out, err = run(capsys, *words)
    assert code == 3 and "merge of base" in out and "made again, equal" in out, err
    assert "inconclusive: not every link was made again" in out
