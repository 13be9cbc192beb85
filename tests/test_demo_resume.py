"""Chapter `resume` of the demo: what counts as killed inside a save and as the same run; all of it on a small model."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tensorkeep.commands.demo import resume as demo_resume
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.state_files import State
from tests import forked
from tests.language_files import LINES, save_model


def saved(run: Path, step: int, change: float = 0.0) -> Path:
    """A checkpoint of three tensors, and the rows of metrics up to it."""
    weight = torch.arange(4096.0)
    weight[7] += change
    state = State({"w": weight}, {"w/exp_avg": weight / 2}, {"w": weight / 3}, {"step": step})
    (run / metrics.METRICS).write_text(
        "".join(json.dumps({"step": n, "loss": 1 / n, "seconds": random.random()}) + "\n" for n in range(1, step + 1))
    )
    return checkpoint.save(run, state)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def half(run: Path, step: int, size: int) -> Path:
    folder = run / "checkpoints" / f".step-{step:06}.0a1b2c3d.tensorkeep-tmp"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes(size))
    return folder


def test_a_save_counts_as_hit_with_half_of_its_bytes_and_a_whole_checkpoint_before_it(run: Path) -> None:
    assert demo_resume.half_written(run) is None
    half(run, 2, 10**6)
    assert demo_resume.half_written(run) is None  # nothing whole is there
    half(run, 2, 0)
    size = sum(p.stat().st_size for p in saved(run, 2).iterdir())
    half(run, 4, size // 4)
    assert demo_resume.half_written(run) is None  # hardly begun
    folder = half(run, 4, size)
    assert demo_resume.half_written(run) == folder
    half(run, 1, size)  # an old checkpoint on its way out
    assert demo_resume.half_written(run) == folder


def test_runs_are_the_same_by_every_bit_and_every_number_but_the_clock_s(run: Path, tmp_path: Path) -> None:
    other, said = tmp_path / "other", list[str]()
    other.mkdir()
    saved(run, 3)
    saved(other, 3)
    assert demo_resume.same_end(run, other, said.append) and said[-1].strip() == "Bitwise equal"
    assert "1 of 1 weights, 1 of 1 moments, 1 of 1 averages" in said[0] and "3 of 3 rows" in said[0]
    with (other / metrics.METRICS).open("a") as file:  # a row twice
        file.write('{"step": 3, "loss": 0.3333333333333333}\n')
    assert not demo_resume.same_end(run, other, said.append)
    saved(other, 3, change=2**-11)  # the last bit of one weight
    assert not demo_resume.same_end(run, other, said.append) and "0 of 1 weights" in said[-2]


def test_a_start_is_killed_for_good_and_a_failed_one_says_why(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = {1: ["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 2: ["json.tool", str(tmp_path / "none")]}
    monkeypatch.setattr(demo_resume, "command", lambda *_: ["python3", "-m", *commands[1]])
    start = demo_resume.TrainingProcess(Path("r"), run)
    assert start.until(lambda: start.process.pid > 0)
    start.kill()
    assert start.killed and start.process.returncode == -9
    monkeypatch.setattr(demo_resume, "command", lambda *_: ["python3", "-m", *commands[2]])
    failed = demo_resume.TrainingProcess(Path("r"), run)
    assert not failed.until(lambda: False) and failed.log != start.log
    with pytest.raises(TensorkeepError, match="training failed") as error:
        failed.finish()
    assert str(failed.log) in str(error.value.hint)


def test_an_interrupted_demo_leaves_nobody_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = ["python3", "-m", "timeit", "-n1", "-r1", "import time; time.sleep(60)"]
    monkeypatch.setattr(demo_resume, "command", lambda *_: sleep)
    start = demo_resume.TrainingProcess(Path("r"), run)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start.until(interrupted)
    assert start.process.wait(10) == -9


def test_the_last_layers_train_by_the_base_s_own_count(tmp_path: Path) -> None:
    text = demo_resume.write_topics(tmp_path / "text.txt", demo_resume.TOPICS)
    assert "call" in text.read_text("utf-8") and len(text.read_text("utf-8")) > 5000
    base = save_model(tmp_path / "base", "llama")
    made: dict[str, Any] = demo_resume.resume_recipe(base, text)
    assert made["trainable"] == ["model.layers.0.*", "model.layers.1.*", "model.norm.weight"]


@pytest.mark.slow
def test_the_whole_story_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four starts of the real command; the model is large enough for a save to take longer than a look at it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)
    base = save_model(
        tmp_path / "base", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=3, head_dim=128
    )
    (tmp_path / "text.txt").write_text("\n".join(LINES * 40))
    document = demo_resume.resume_recipe(base, tmp_path / "text.txt")
    document["data"]["length"] = 32
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    said: list[str] = []
    assert demo_resume.killed_and_compared(tmp_path / "recipe.yaml", tmp_path, said.append, random.Random(0)), said
    story = "\n".join(said)
    assert "without a manifest" in story and "exact resume confirmed for steps" in story and "Bitwise equal" in story
