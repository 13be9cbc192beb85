"""`tensorkeep train language` and `eval language`, as a person types them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tensorkeep.cli import main
from tensorkeep.commands.train_language import pairs_of
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tests import forked
from tests.language_files import config, save_tokenizer, texts


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    document = {
        "version": 2,
        "config": config(),
        "tokenizer": str(save_tokenizer(tmp_path / "tok")),
        "data": {"files": str(texts(tmp_path / "a.jsonl")), "length": 32, "packing": "concatenate"},
        "training": {"updates": 4, "batch_size": 4, "log_every": 1, "ema": 0.9, "save_every": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    return code, *capsys.readouterr()


def document(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_train_goes_on_by_the_same_command_and_by_the_run_alone(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    done = document(capsys, "train", "language", recipe, "--out", out, "--training.updates", 3, "--optimizer.lr=1e-3")
    assert (done["step"], done["samples"], done["reason"], done["resumed"]) == (3, 12, "done", None)
    written = (out / "recipe.yaml").read_text()
    assert yaml.safe_load(written)["training"]["updates"] == 3 and yaml.safe_load(written)["optimizer"]["lr"] == 1e-3
    checkpoint.run_folder.delete(out, [3])
    again = document(capsys, "train", "language", out / "recipe.yaml", "--out", out)
    assert (again["step"], again["resumed"]) == (3, "exact")
    assert [row["step"] for row in metrics.rows(out / "metrics.jsonl")] == [1, 2, 3]
    # another recipe is refused, and does not take the place of the run's own
    code, _, error = run(capsys, "train", "language", recipe, "--out", out)
    assert code == 2 and "R04" in error and "training.updates was 3, is 4" in error
    assert (out / "recipe.yaml").read_text() == written
    # other data is named by its file, what the recipe says of it and the tokenizer are not taken for it
    data, again = recipe.parent / "a.jsonl", (out / "recipe.yaml", "--out", out)
    whole = data.read_text()
    data.write_text(whole.replace(" ", "  ", 1))
    code, _, error = run(capsys, "train", "language", *again)
    assert code == 2 and f"data.files: {data} has other content" in error
    code, _, error = run(capsys, "train", "language", *again, "--allow", "data.fingerprint")
    assert code == 0 and "at step 3, exact (allowed to differ: data.fingerprint)" in error
    data.write_text(whole)
    code, _, error = run(capsys, "train", "language", *again, "--data.eos=false")
    assert code == 2 and "files were not told apart" in error and "has other content" not in error
    more = document(
        capsys, "train", "language", recipe, "--out", out, "--optimizer.lr=1e-3", "--allow", "training.updates"
    )
    assert more["step"] == 4 and yaml.safe_load((out / "recipe.yaml").read_text())["training"]["updates"] == 4
    code, _, error = run(capsys, "train", "language", recipe, "--out", out, "--resume", "never")
    assert code == 2 and "holds checkpoints already" in error


def test_unknown_fields_and_missing_words_are_told(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "train", "language", recipe, "--out", tmp_path / "x", "--trainig.updates", 3)
    assert code == 2 and "no field 'trainig.updates'" in error and "did you mean training.updates" in error
    code, _, error = run(capsys, "train", "language", recipe)
    assert code == 2 and "needs a folder" in error and not (tmp_path / "x").exists()
    assert pairs_of(["--a.b", "-1", "--c=d=e"]) == [("a.b", "-1"), ("c", "d=e")]
    for words in (["a"], ["--a"]):
        with pytest.raises(TensorkeepError):
            pairs_of(words)


def test_print_recipe_shows_every_field_and_writes_nothing(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, "train", "language", recipe, "--out", tmp_path / "x", "--print-recipe", "--training.seed", 7
    )
    shown = yaml.safe_load(out)
    assert (
        code == 0 and shown["training"]["seed"] == 7 and shown["data"]["eos"] is True and not (tmp_path / "x").exists()
    )
    assert document(capsys, "train", "language", recipe, "--print-recipe", "--training.seed", 7)["recipe"] == shown


def test_a_run_can_be_evaluated_and_converted(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    document(capsys, "train", "language", recipe, "--out", out)
    data = ["--data", tmp_path / "a.jsonl"]
    averaged = document(capsys, "eval", "language", out, *data)
    raw = document(capsys, "eval", "language", out, *data, "--no-ema")
    assert (
        averaged["ema"] and not raw["ema"] and averaged["loss"] != raw["loss"] and averaged["tokens"] == raw["tokens"]
    )
    older = document(capsys, "eval", "language", out / "checkpoints" / "step-000002", *data, "--no-ema")
    assert older["step"] == 2 and older["loss"] != raw["loss"]
    code, text, _ = run(capsys, "eval", "language", out, *data)
    assert code == 0 and "perplexity" in text
    assert (out / "recipe.yaml").is_file()
    assert run(capsys, "convert", out, tmp_path / "hf", "--to", "hf")[0] == 0
    bare = document(capsys, "eval", "language", tmp_path / "hf", *data, "--length", 32)
    assert bare["loss"] == pytest.approx(raw["loss"], rel=1e-5)
    code, _, error = run(capsys, "eval", "language", out)
    assert code == 2 and "--data FILE" in error


def started(recipe: Path, out: Path, *words: str) -> forked.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [
        sys.executable,
        "-m",
        "tensorkeep",
        "train",
        "language",
        str(recipe),
        "--out",
        str(out),
        "--quiet",
        *words,
    ]
    return forked.Popen(command, env=environment)


def ended(process: forked.Popen, run: Path, number: int, rows: int) -> int:
    """Send a signal once the run has made so many rows; returns the exit code."""
    path, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= rows) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait()


def test_a_run_ended_by_signals_goes_on_bitwise_by_the_same_command(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--training.updates", "48", "--training.save_every", "6", "--device", "cpu"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert ended(started(recipe, cut, *words), cut, signal.SIGKILL, 10) == -signal.SIGKILL
    first = checkpoint.steps(cut)[0]
    assert ended(started(recipe, cut, *words), cut, signal.SIGTERM, first + 10) == 130
    assert first < checkpoint.steps(cut)[0] < 48
    assert document(capsys, "train", "language", recipe, "--out", cut, *words)["resumed"] == "exact"
    document(capsys, "train", "language", recipe, "--out", whole, *words)
    one, other = (metrics.comparable(run / "metrics.jsonl") for run in (cut, whole))
    assert one == other and len(one) == 48
    for name in ("model", "optimizer", "ema"):
        a, b = (run / "checkpoints" / "step-000048" / f"{name}.safetensors" for run in (cut, whole))
        assert a.read_bytes() == b.read_bytes()


def test_a_run_goes_on_from_minimind_s_resume_file_and_again_by_the_same_command(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--data.packing",
        "none",
        "--training.updates",
        "null",
        "--training.ema",
        "null",
        "--training.micro_batch",
        "4",
    ]
    config = ["--config.model_type", "qwen3", "--config.tie_word_embeddings", "true"]
    document(capsys, "train", "language", recipe, "--out", tmp_path / "one", *flags, *config, "--training.epochs", "1")
    theirs = tmp_path / "pretrain_16_resume.pth"
    code, text, _ = run(capsys, "convert", tmp_path / "one", theirs, "--to", "pth", "--naming", "minimind")
    assert (
        code == 0 and "proven" in text and set(torch.load(theirs, weights_only=True)) >= {"model", "optimizer", "step"}
    )
    again = ["train", "language", recipe, *flags, *config, "--training.epochs", "3", "--out", tmp_path / "two"]
    code, _, error = run(capsys, *again, "--resume", theirs)
    assert code == 0 and "resumed from" in error
    begun = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    rows = list(metrics.rows(tmp_path / "two" / "metrics.jsonl"))
    assert rows[0]["step"] == begun["step"] + 1 and rows[-1]["samples"] > begun["samples"]
    assert rows[-1]["lr"] < rows[0]["lr"]  # MiniMind's cosine over its epochs
    assert run(capsys, *again, "--resume", theirs)[0] == 0  # nothing is left to do


def test_an_adapter_run_becomes_an_adapter_folder_that_merges_and_never_a_model(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document(capsys, "train", "language", recipe, "--out", tmp_path / "full", "--training.updates", "2")
    assert run(capsys, "convert", tmp_path / "full", tmp_path / "base", "--to", "hf", "--ema")[0] == 0
    out, adapter = tmp_path / "run", tmp_path / "adapter"
    start = ["--config", "null", "--model", tmp_path / "base", "--adapter.targets", "all-linear", "--lora_r", "2"]
    document(capsys, "train", "language", recipe, "--out", out, *start)
    code, _, error = run(capsys, "convert", out, tmp_path / "no", "--to", "hf")
    assert code == 2 and "K08" in error and "--to peft" in error and not (tmp_path / "no").exists()
    assert run(capsys, "diagnose", out)[0] == 0  # what trains over a frozen base is no broken model
    assert run(capsys, "convert", out, adapter, "--to", "peft", "--ema")[0] == 0
    code, text, _ = run(capsys, "merge", tmp_path / "base", adapter, tmp_path / "merged")
    assert code == 0 and "computed twice, proven: loads in transformers" in text
    data = ["--data", tmp_path / "a.jsonl"]
    whole = document(capsys, "eval", "language", tmp_path / "merged", *data, "--length", 32)
    assert whole["loss"] == pytest.approx(document(capsys, "eval", "language", out, *data)["loss"], rel=1e-4)


def test_what_is_cut_off_a_text_is_told(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.packing", "none", "--data.length", "8", "--training.updates", "1"]
    _, _, error = run(capsys, "train", "language", recipe, "--out", tmp_path / "run", *flags)
    assert "tokens lie beyond a row of 8 and are left out" in error
