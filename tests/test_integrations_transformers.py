"""transformers' own Trainer with the callback: what it resumes from is whole, and nothing but the newest of that."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout

pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import seals
from tensorkeep.integrations import _folders as folders
from tensorkeep.integrations.transformers import CHECKPOINT, TensorkeepCallback, load_ema, newest_valid, seal
from tensorkeep.training.distributed import World
from tests.run_states import Faults, in_child, injected
from tests.training import ranks

STEPS = 6


class Net(nn.Module):
    """A regression with dropout, in the form that Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(self.body(x)).squeeze(-1)  # [B]
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def data() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.sum()} for row in x]


def trainer(out: Path, callback: TensorkeepCallback, model: nn.Module | None = None, **more: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "logging_strategy": "steps",
    }
    callbacks = [callback, *more.pop("callbacks", [])]
    arguments |= more
    return Trainer(
        model=model or Net(),
        args=TrainingArguments(**arguments),
        train_dataset=data(),
        eval_dataset=data()[:8],
        callbacks=callbacks,
    )


def outcome(run: Trainer) -> tuple[dict[str, torch.Tensor], list[float]]:
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    return {n: t.clone() for n, t in run.model.state_dict().items()}, losses


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    callback = TensorkeepCallback(ema_decay=0.5)
    run = trainer(tmp_path_factory.mktemp("whole"), callback)
    run.train()
    assert callback.ema is not None
    return *outcome(run), callback.ema.state_dict()


class Killed(BaseException):
    """Not an Exception: nothing on the way may handle it, as nothing handles SIGKILL."""


def kill_in_save(run: Trainer, step: int) -> None:
    """Make the save of one step end after the weights, before optimizer and state are written."""
    whole = run._save_optimizer_and_scheduler

    def cut(folder: str) -> None:
        if run.state.global_step == step:
            raise Killed
        whole(folder)

    run._save_optimizer_and_scheduler = cut


def flip_a_bit(path: Path, at: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 4
    path.write_bytes(blob)


def damage(out: Path, kind: str) -> None:
    newest = out / "checkpoint-5"
    if kind == "flipped bit in the weights":
        flip_a_bit(newest / "model.safetensors", -9)
    elif kind == "flipped bit in the moments":
        flip_a_bit(newest / "optimizer.pt", 700)
    elif kind == "flipped bit in the manifest":
        flip_a_bit(newest / "manifest.json", 60)
    elif kind == "missing file":
        (newest / "scheduler.pt").unlink()
    elif kind == "cut file":
        (newest / "rng_state.pth").write_bytes((newest / "rng_state.pth").read_bytes()[:-100])
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()


KINDS = [
    "flipped bit in the weights",
    "flipped bit in the moments",
    "flipped bit in the manifest",
    "missing file",
    "cut file",
    "no manifest",
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed inside the save of step 6: checkpoint-6 is there, torn; 3, 4 and 5 are sealed."""
    out = tmp_path_factory.mktemp("killed")
    run = trainer(out, TensorkeepCallback(keep_last=3, ema_decay=0.5))
    kill_in_save(run, 6)
    with pytest.raises(Killed):
        run.train()
    return out


def test_a_run_killed_inside_a_save_goes_on_bitwise_from_the_one_before(
    killed: Path, tmp_path: Path, uninterrupted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = copied(killed, tmp_path)
    with caplog.at_level(logging.WARNING):
        found = newest_valid(out)
    assert found == str(out / "checkpoint-5")
    assert "F01" in caplog.text and "checkpoint-6" in caplog.text
    assert (out / "checkpoint-6").is_dir()  # reported, not deleted
    finish_and_compare(out, found, uninterrupted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_is_passed_over_and_training_goes_on_bitwise(
    kind: str, killed: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    out = copied(killed, tmp_path)
    damage(out, kind)
    found = newest_valid(out)
    assert found == str(out / "checkpoint-4")
    finish_and_compare(out, found, uninterrupted)


def copied(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def finish_and_compare(out: Path, found: str, uninterrupted: Any) -> None:
    callback = TensorkeepCallback(keep_last=3, ema_decay=0.5)
    run = trainer(out, callback)
    run.train(resume_from_checkpoint=found)
    weights, losses = outcome(run)
    assert equal(weights, uninterrupted[0])
    assert losses == uninterrupted[1]
    assert callback.ema is not None and equal(callback.ema.state_dict(), uninterrupted[2])
    assert newest_valid(out) == str(out / "checkpoint-6")


def test_trainer_alone_would_have_stopped_at_the_torn_one(killed: Path, tmp_path: Path) -> None:
    run = trainer(copied(killed, tmp_path), TensorkeepCallback())
    with pytest.raises((OSError, ValueError, RuntimeError)):
        run.train(resume_from_checkpoint=True)


def test_the_damaged_tensor_is_named(killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = copied(killed, tmp_path)
    flip_a_bit(out / "checkpoint-5" / "model.safetensors", -9)
    newest_valid(out)
    assert "head" in caplog.text or "body" in caplog.text


def test_only_the_newest_stay_and_the_torn_one_is_not_counted(killed: Path) -> None:
    assert sorted(p.name for p in killed.iterdir() if p.is_dir()) == [f"checkpoint-{n}" for n in (3, 4, 5, 6)]


def test_weights_with_nan_stop_the_run_and_are_never_resumed_from(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                kwargs["model"].head.weight.data[0, 2] = float("nan")

    with pytest.raises(TensorkeepError, match=r"head\.weight") as caught:
        trainer(tmp_path, TensorkeepCallback(), callbacks=[Poison()]).train()
    assert caught.value.code == "V01"
    assert newest_valid(tmp_path) == str(tmp_path / "checkpoint-2")


def test_save_total_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorkeepError, match="save_total_limit=2"):
        trainer(tmp_path, TensorkeepCallback(), save_total_limit=2)


def test_files_of_every_process_at_every_depth_are_sealed(tmp_path: Path) -> None:
    for step in (1, 2):
        trainer_fsdp_checkpoint(tmp_path / f"checkpoint-{step}")
        seal(tmp_path / f"checkpoint-{step}")
    assert newest_valid(tmp_path) == str(tmp_path / "checkpoint-2")
    flip_a_bit(tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0" / "__1_0.distcp", -3)
    assert newest_valid(tmp_path) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "optimizer_0" / "__1_0.distcp").unlink()
    with pytest.raises(TensorkeepError, match="none of its 2 checkpoints is valid"):
        newest_valid(tmp_path)


def trainer_fsdp_checkpoint(folder: Path) -> None:
    """The names that Trainer writes under FSDP on two processes; the bytes are read by nobody here."""
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir(parents=True)
        for file in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            (folder / name / file).write_bytes(os.urandom(64))
    (folder / "trainer_state.json").write_text("{}")


def test_an_average_is_refused_where_weights_may_be_shards(tmp_path: Path) -> None:
    for more in ({"fsdp": "full_shard", "deepspeed": None}, {"fsdp": "", "deepspeed": "zero3.json"}):
        arguments = SimpleNamespace(save_total_limit=None, **more)
        with pytest.raises(TensorkeepError, match="an average needs whole weights"):
            TensorkeepCallback(ema_decay=0.9).on_init_end(arguments, None, None)
        TensorkeepCallback().on_init_end(arguments, None, None)


def test_the_best_checkpoint_outlives_keep_last(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        TensorkeepCallback(keep_last=1),
        metric_for_best_model="loss",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.01,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint).name
    kept = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert kept == {best, "checkpoint-6"} and best != "checkpoint-6"


def test_evaluation_sees_the_average_and_checkpoints_hold_the_trained_weights(tmp_path: Path) -> None:
    callback = TensorkeepCallback(ema_decay=0.9)
    run = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=3)
    run.train()
    trained = outcome(run)[0]
    reported = run.evaluate()["eval_loss"]
    assert equal(run.model.state_dict(), trained)  # bitwise back
    assert callback.ema is not None

    # against forwards of a copy: of the average, and of the trained weights
    average = Net()
    average.load_state_dict(trained)
    load_ema(average, tmp_path / "checkpoint-6")
    assert equal({n: p.detach() for n, p in average.named_parameters()}, callback.ema.state_dict())
    assert reported == pytest.approx(own_loss(average), rel=1e-6)
    plain = Net()
    plain.load_state_dict(trained)
    assert abs(reported - own_loss(plain)) > 1e-3
    from safetensors.torch import load_file

    assert equal(load_file(tmp_path / "checkpoint-6" / "model.safetensors"), trained)


def own_loss(model: nn.Module) -> float:
    model.eval()
    rows = data()[:8]
    with torch.no_grad():
        loss = model(torch.stack([r["x"] for r in rows]), torch.stack([r["labels"] for r in rows]))["loss"]
    return float(loss)


def test_an_adapter_generates_with_the_average_and_resumes_bitwise(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        base = LlamaForCausalLM(
            LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
        )
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))

    def run(out: Path, callback: TensorkeepCallback) -> Trainer:
        made = trainer(out, callback, adapted(), max_steps=4)
        ids = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(2))
        made.train_dataset = [{"input_ids": row, "labels": row} for row in ids]
        return made

    whole = run(tmp_path / "whole", TensorkeepCallback(ema_decay=0.9))
    whole.train()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        whole.model.eval()
        averaged = whole.model(input_ids=ids).logits[:, -1]
        made = whole.model.generate(
            input_ids=ids,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        inner = whole.model.get_base_model()
        plain = type(inner).forward(inner, input_ids=ids).logits[:, -1]  # past the hooks: the trained weights
        assert (made.logits[0] - averaged).abs().max() < 1e-5 < 1e-3 < (plain - averaged).abs().max()

    cut = run(tmp_path / "cut", TensorkeepCallback(ema_decay=0.9))
    kill_in_save(cut, 3)
    with pytest.raises(Killed):
        cut.train()
    again = TensorkeepCallback(ema_decay=0.9)
    resumed = run(tmp_path / "cut", again)
    resumed.train(resume_from_checkpoint=newest_valid(tmp_path / "cut"))
    assert equal(outcome(resumed)[0], outcome(whole)[0]) and outcome(resumed)[1] == outcome(whole)[1]


def test_an_error_in_a_forward_of_an_evaluation_leaves_the_trained_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, TensorkeepCallback(ema_decay=0.9), max_steps=2)
    run.train()
    trained = outcome(run)[0]
    run.model.eval()
    with pytest.raises(RuntimeError):
        run.model(x=torch.zeros(1, 5), labels=torch.zeros(1))
    assert equal(run.model.state_dict(), trained)


def test_the_best_model_comes_back_with_its_own_average(tmp_path: Path) -> None:
    callback = TensorkeepCallback(keep_last=1, ema_decay=0.5)
    run = trainer(
        tmp_path,
        callback,
        metric_for_best_model="loss",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.01,
        load_best_model_at_end=True,
    )
    run.train()
    assert not run.state.best_model_checkpoint.endswith("-6") and run.state.best_metric == max(
        row["eval_loss"] for row in run.state.log_history if "eval_loss" in row
    )
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


def test_an_average_that_cannot_go_on_is_an_error_not_a_new_one(tmp_path: Path) -> None:
    trainer(tmp_path, TensorkeepCallback(), max_steps=2).train()  # saved without an average
    run = trainer(tmp_path, TensorkeepCallback(ema_decay=0.9))
    with pytest.raises(TensorkeepError, match="average cannot go on") as caught:
        run.train(resume_from_checkpoint=newest_valid(tmp_path))
    assert caught.value.code == "F05"


def test_nothing_is_there_and_nothing_but_one_torn_save_start_anew(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none") is None
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    assert newest_valid(tmp_path) is None


def test_checkpoints_of_a_trainer_without_us_are_not_started_over(killed: Path, tmp_path: Path) -> None:
    out = copied(killed, tmp_path)
    for manifest in out.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(TensorkeepError, match="none of its 4 checkpoints is valid"):
        newest_valid(out)
    seal(out / "checkpoint-4")
    assert newest_valid(out) == str(out / "checkpoint-4")


def test_sharded_folders_are_refused_not_half_covered(tmp_path: Path) -> None:
    inner = tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0"
    inner.mkdir(parents=True)
    (inner.parent / "trainer_state.json").write_text("{}")
    with pytest.raises(TensorkeepError, match="pytorch_model_fsdp_0"):
        seal(inner.parent)


# -- killed at every call of the system ------------------------------------------------------------------------------


def written(out: Path, step: int) -> Path:
    """What a Trainer leaves, small and unsealed."""
    from safetensors.torch import save_file

    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.full((4,), float(step))}, folder / "model.safetensors")
    (folder / "optimizer.pt").write_bytes(bytes(range(256)))
    return folder


def sealed_and_pruned(out: Path) -> None:
    seal(out / "checkpoint-3")
    folders.prune_folders(folders.numbered(out, CHECKPOINT), 3, 1, set())


def prepared(out: Path) -> Path:
    for step in (1, 2):
        seal(written(out, step))
    written(out, 3)
    return out


def test_every_file_is_on_the_disk_before_the_manifest_and_older_ones_go_after_it(tmp_path: Path) -> None:
    with injected(Faults()) as seen:
        sealed_and_pruned(prepared(tmp_path))
    last = [(call, Path(path).name) for call, path in seen.calls if "checkpoint-3" in path or call == "rename"]
    fsynced = [name for call, name in last if call == "fsync"]
    renames = [i for i, (call, _) in enumerate(last) if call == "rename"]
    manifest = next(i for i in renames if "manifest" in last[i][1] and i > last.index(("fsync", "optimizer.pt")))
    assert {"model.safetensors", "optimizer.pt"} <= {name for call, name in last[:manifest] if call == "fsync"}
    assert any("manifest" in name for name in fsynced)
    assert ("fsync", "checkpoint-3") in last[manifest:]
    assert all(i > manifest for i in renames if last[i][1].startswith("checkpoint-"))


@pytest.mark.slow
def test_killed_at_any_call_of_sealing_and_pruning_the_newest_valid_one_is_there(tmp_path: Path) -> None:
    with injected(Faults()) as seen:
        out = prepared(tmp_path / "count")
        before = len(seen.calls)
        sealed_and_pruned(out)
    found = set()
    for at in range(1, len(seen.calls) - before + 1):
        out = prepared(tmp_path / str(at))

        def work(out: Path = out, at: int = at) -> None:
            with injected(Faults(at, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                sealed_and_pruned(out)

        assert in_child(work) == -signal.SIGKILL
        found.add(Path(str(newest_valid(out))).name)
        sealed_and_pruned(out)  # and the next start can go on
        assert newest_valid(out) == str(out / "checkpoint-3")
    assert found == {"checkpoint-2", "checkpoint-3"}


def test_verify_compares_a_sealed_guest_folder_with_its_manifest(tmp_path: Path) -> None:
    from tensorkeep import verify

    folder = written(tmp_path, 5)
    seal(folder)
    assert not verify(folder)[0]
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[7] ^= 1
    (folder / "optimizer.pt").write_bytes(data)
    found, view, _ = verify(folder)
    assert [f.code for f in found] == ["F03"] and "optimizer.pt" in found[0].message and view is None


def test_ranks_wait_for_the_seal_outside_of_any_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests of a large checkpoint take longer than a group's time-out, which would end the job."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"1" * 100)
    real = seals.seal

    def slow_seal(folder: Path, step: int) -> None:
        time.sleep(1.0)
        real(folder, step)

    monkeypatch.setattr(seals, "seal", slow_seal)
    state = SimpleNamespace(global_step=5, best_model_checkpoint=None)

    def work(_world: World) -> None:
        torch.distributed.barrier()
        _set_pg_timeout(timedelta(seconds=0.4))
        TensorkeepCallback().on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)

    assert ranks(2, work) == [0, 0]
    assert seals.is_sealed(folder)
