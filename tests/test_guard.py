"""`tensorkeep.guard` over what other trainers save: no half of a save is believed, none of their files touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import seals
from tensorkeep.integrations import guard as guards
from tensorkeep.storage import run_manifest
from tests import folder_layouts as layouts
from tests import forked
from tests.run_states import Faults, in_child, injected

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> dict[str, torch.Tensor]:
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 4, generator=generator) for name in names}


def trainer(folder: Path) -> None:
    """transformers' Trainer under FSDP, in the order in which it writes."""
    folder.mkdir()
    dcp.save({"model": state()}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"))
    dcp.save({"optimizer": {"state": state()}}, checkpoint_id=str(folder / "optimizer_0"))
    layouts.trainer_files(folder)
    (folder / "optimizer.pt").unlink()


def trainer_zero(folder: Path) -> None:
    """transformers' Trainer under DeepSpeed."""
    folder.mkdir()
    layouts.zero(folder, folder.parent, state())
    layouts.trainer_files(folder, ranks=3)
    (folder / "optimizer.pt").unlink()


def accelerate(folder: Path) -> None:
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(state(), folder / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "random_states_1.pkl"):
        torch.save({"state": {}}, folder / name)


def titan(folder: Path) -> None:
    dcp.save({"model": state(), "step": 3}, checkpoint_id=str(folder))


def by_rank(folder: Path) -> None:
    """`torch_checkpointing`."""
    made = layouts.torch_checkpointing(folder.parent / "made", folder.parent, state())
    (made / "step-3").rename(folder)


def lightning(path: Path, step: int = 3) -> None:
    torch.save({"state_dict": state(), "epoch": 1, "global_step": step, "pytorch-lightning_version": "2.6.6"}, path)


# how it is written, its name, where below the training's folder it lies, a file to break
Kind = tuple[Callable[[Path], None], str, str, str]
ZERO = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
KINDS: dict[str, Kind] = {
    "Trainer under FSDP": (trainer, "checkpoint-{}", ".", "optimizer_0/__0_0.distcp"),
    "Trainer under DeepSpeed": (trainer_zero, "checkpoint-{}", ".", f"global_step7/{ZERO}"),
    "accelerate": (accelerate, "checkpoint_{}", "checkpoints", "random_states_1.pkl"),
    "torchtitan": (titan, "step-{}", "checkpoint", "__0_0.distcp"),
    "torch_checkpointing": (by_rank, "step-{}", ".", "model_1.pt"),
    "Lightning": (lightning, "epoch=0-step={}.ckpt", "lightning_logs/version_0/checkpoints", ""),
}


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_SETTLED", 0.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("written")
    (top / "config.json").write_text("{}")
    out = {}
    for kind, (write, _, _, _) in KINDS.items():
        (top / kind).mkdir()
        (top / kind / "config.json").write_text("{}")
        out[kind] = top / kind / "save.ckpt" if kind == "Lightning" else top / kind / "save"
        write(out[kind])
    return out


def put(kind: str, save: Path, root: Path, step: int) -> Path:
    """Copy a save into a training's folder, as the save of that step."""
    _, name, below, _ = KINDS[kind]
    place = root / below / name.format(step)
    place.parent.mkdir(parents=True, exist_ok=True)
    if save.is_dir():
        shutil.copytree(save, place)
        if (place / "trainer_state.json").is_file():
            (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    else:
        lightning(place, step)
    return place


def theirs(path: Path) -> dict[str, tuple[bytes, int]]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def broken(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 7)
    else:
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 3] ^= 16
        path.write_bytes(blob)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainers_saves_are_sealed_and_damage_falls_back(
    kind: str, written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = [put(kind, written[kind], tmp_path, step) for step in (9, 10, 100)]
    before = [theirs(save) for save in saves]
    guard = tk.guard(tmp_path)
    assert guard.newest().path is None and {f.code for f in guard.newest().skipped} == {"F01"}
    assert sorted(guard.seal().paths) == sorted(saves)
    assert [theirs(save) for save in saves] == before
    assert guard.newest() == (saves[2], []) and guard.resume_path() == str(saves[2])
    assert guard.seal() == ([], [])  # what is sealed stays as it is
    for place in (tmp_path, saves[0]):
        assert main(["verify", str(place)]) == 0, capsys.readouterr()
    for how, save, left in (("flip", saves[2], saves[1]), ("cut", saves[1], saves[0])):
        broken(save / KINDS[kind][3] if save.is_dir() else save, how)
        path, skipped = guard.newest()
        assert path == left and skipped[-1].code == {"flip": "F03", "cut": "F02"}[how]
        assert main(["verify", str(save)]) == 1 and main(["verify", str(tmp_path)]) == 1
    guard.seal()  # never vouches for what differs from its seal
    assert guard.newest().path == saves[0]
    broken(saves[0] / KINDS[kind][3] if saves[0].is_dir() else saves[0], "missing")
    if saves[0].is_dir():
        assert guard.newest().skipped[-1].code == "F05"
        with pytest.raises(TensorkeepError, match="none of its saves is whole"):
            guard.resume_path()


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_lost_before_the_seal_is_refused(kind: str, written: dict[str, Path], tmp_path: Path) -> None:
    guard = tk.guard(tmp_path)
    for step, how in enumerate(["missing", "cut"] if written[kind].is_dir() else ["cut"]):
        save = put(kind, written[kind], tmp_path, step)
        broken(save / KINDS[kind][3] if save.is_dir() else save, how)
        if kind == "accelerate" and how == "missing":  # of the last process's, no other file says that it was there
            (save / "random_states_2.pkl").write_bytes((save / "random_states_0.pkl").read_bytes())
        with pytest.raises(TensorkeepError) as refused:
            guard.seal(save)
        assert refused.value.code in ("F01", "F02", "F05", "F07") and not seals.is_sealed(save)
        assert guard.seal().paths == []
        shutil.rmtree(save) if save.is_dir() else save.unlink()


@pytest.mark.parametrize("kind", ["Trainer under FSDP", "torchtitan", "Lightning"])
def test_no_prefix_of_what_a_killed_save_wrote_is_sealed(kind: str, written: dict[str, Path], tmp_path: Path) -> None:
    guard, whole = tk.guard(tmp_path), written[kind]
    if whole.is_file():
        size = whole.stat().st_size
        for at in range(0, size, size // 9):
            (tmp_path / "last.ckpt").write_bytes(whole.read_bytes()[:at])
            assert guard.seal().paths == []
        return
    files = sorted((p for p in whole.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_mtime_ns, p.name))
    save = tmp_path / KINDS[kind][2] / KINDS[kind][1].format(1)
    for file in files:
        place = save / file.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        for part in (0.5, 0.99, 1):
            if part < 1 or file != files[-1]:
                place.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
                assert guard.seal().paths == [], (place, part)
    shutil.copy(files[-1], save / files[-1].relative_to(whole))
    assert guard.seal().paths == [save]


def test_a_save_that_lacks_what_the_sealed_one_has_is_left(written: dict[str, Path], tmp_path: Path) -> None:
    guard = tk.guard(tmp_path)
    for step in (1, 2):
        save = put("accelerate", written["accelerate"], tmp_path, step)
        torch.save({}, save / "custom_checkpoint_0.pkl")
        if step == 1:
            assert guard.seal().paths == [save]
    (save / "custom_checkpoint_0.pkl").unlink()  # accelerate writes these after the random states
    sealed, left = guard.seal()
    assert sealed == [] and "custom_checkpoint_0.pkl, which checkpoint_1 has" in left[0].message
    assert guard.seal("checkpoints/checkpoint_2").paths == [save]  # vouched for


def test_a_save_that_is_written_again_over_an_old_one_is_left(written: dict[str, Path], tmp_path: Path) -> None:
    save, guard = put("torchtitan", written["torchtitan"], tmp_path, 1), tk.guard(tmp_path)
    os.utime(save / ".metadata", (1e9, 1e9))  # of the save before, which this one has not replaced yet
    sealed, left = guard.seal()
    assert sealed == [] and "is being written again" in left[0].message
    assert guard.seal(save).paths == [save]


def test_what_is_written_while_it_is_sealed_has_no_seal(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (put("torchtitan", written["torchtitan"], tmp_path, step) for step in (1, 2))
    guard, stop = tk.guard(tmp_path), threading.Event()
    monkeypatch.setattr(guards, "_SETTLED", 0.3)

    def write() -> None:
        while not stop.is_set():
            with (new / "__0_1.distcp").open("ab") as file:
                file.write(b"more")
            begun.set()
            stop.wait(0.02)

    writer, begun = threading.Thread(target=write), threading.Event()
    writer.start()
    try:
        assert begun.wait(60)
        sealed, left = guard.seal()
    finally:
        stop.set()
        writer.join()
    assert sealed == [old] and left[0].code == "F01" and "is being written" in left[0].message
    real = seals._digested

    def later(folder: Path, name: str) -> object:
        (new / "late.pt").write_bytes(b"x")
        return real(folder, name)

    monkeypatch.setattr(seals, "_digested", later)
    with pytest.raises(TensorkeepError, match=r"changed while it was sealed: late.pt"):
        seals.seal(new, 2)
    assert guard.newest().path == old


def test_killed_at_any_call_of_a_sealing_there_is_a_whole_seal_or_none(
    written: dict[str, Path], tmp_path: Path
) -> None:
    old, new = (put("Trainer under FSDP", written["Trainer under FSDP"], tmp_path, step) for step in (1, 2))
    guard, before = tk.guard(tmp_path), theirs(new)
    guard.seal(old)
    with injected(Faults()) as counted:
        guard.seal(new)
    outcomes = set()
    for at in sorted({*range(1, len(counted.calls), 6), len(counted.calls)}):
        (new / "manifest.json").unlink(missing_ok=True)
        with_kill = Faults(at, lambda: os.kill(os.getpid(), signal.SIGKILL))

        def sealing(faults: Faults = with_kill) -> None:
            with injected(faults):
                guard.seal(new)

        assert in_child(sealing) == -signal.SIGKILL
        outcomes.add(guard.newest().path)
        assert theirs(new).items() >= before.items()
    assert outcomes == {old, new}
    guard.seal(new)
    assert guard.newest() == (new, []) and [p for p in new.iterdir() if p.name.endswith("-tmp")] == []


def test_a_whole_seal_is_kept_with_all_it_says(written: dict[str, Path], tmp_path: Path) -> None:
    save, guard = put("torchtitan", written["torchtitan"], tmp_path, 5), tk.guard(tmp_path)
    seals.seal(save, 5, {"digest": "of the frozen weights"})
    for _ in range(2):
        guard.seal(save)
    assert run_manifest.read_manifest(save).base == {"digest": "of the frozen weights"}


def test_files_that_come_after_the_seal(written: dict[str, Path], tmp_path: Path) -> None:
    save = put("Trainer under FSDP", written["Trainer under FSDP"], tmp_path, 5)
    guard = tk.guard(tmp_path)
    guard.seal()
    (save / "README.md").write_text("notes")  # nothing loads it
    assert guard.newest() == (save, []) and guard.seal(save).paths == [save]
    torch.save({}, save / "rng_state_2.pth")
    assert guard.newest().path is None and "rng_state_2.pth" in guard.newest().skipped[0].message


def test_lightnings_last_is_of_the_step_in_it_and_versions_go_on(tmp_path: Path) -> None:
    for place, step in (("version_0", 40), ("version_0", 20), ("version_1", 10)):
        (folder := tmp_path / "lightning_logs" / place / "checkpoints").mkdir(parents=True, exist_ok=True)
        lightning(folder / (f"epoch=1-step={step}.ckpt" if step < 40 else "last.ckpt"), step)
    guard, order = tk.guard(tmp_path), []
    guard.seal()
    while (path := guard.newest().path) is not None:
        order.append(path.name)
        assert sorted(p.name for p in path.parent.glob("last*")) in ([], ["last.ckpt"])  # as Lightning looks for it
        os.truncate(path, 9)
    assert order == ["epoch=1-step=10.ckpt", "last.ckpt", "epoch=1-step=20.ckpt"]


def test_what_is_not_ours_stays(written: dict[str, Path], tmp_path: Path) -> None:
    save = put("torchtitan", written["torchtitan"], tmp_path, 5)
    guard = tk.guard(tmp_path)
    (save / "manifest.json").write_text('{"of": "another"}')
    sealed, left = guard.seal()
    assert sealed == [] and "another program" in left[0].message
    assert (save / "manifest.json").read_text() == '{"of": "another"}'
    (save / "manifest.json").unlink()
    (save / "away").symlink_to(tmp_path)
    with pytest.raises(TensorkeepError, match="symbolic link"):
        guard.seal(save)


@pytest.mark.parametrize("name", ["../outside.pt", "sub/../x.pt", "./x.pt", "linked/outside.pt"])
def test_a_seal_that_leads_out_of_its_save_is_refused(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    save = put("torchtitan", written["torchtitan"], tmp_path, 5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "outside.pt").write_bytes(b"abc")
    (save / "linked").symlink_to(tmp_path / "out")
    entry = {"bytes": 3, "chunks": [run_manifest.durable.digest(b"abc")]}
    document = {"schema": 1, "step": 5, "chunk": run_manifest.durable.CHUNK, "files": {name: entry}, "tensors": {}}
    more = {"base": None, "not_captured": []}
    (save / "manifest.json").write_bytes(run_manifest.manifest_bytes(document | more))
    path, skipped = tk.guard(tmp_path).newest()
    assert path is None and skipped[0].code in ("F06", "F07")


def test_starting_anew_is_told_from_nothing_whole(written: dict[str, Path], tmp_path: Path) -> None:
    guard = tk.guard(tmp_path / "not-there")
    assert guard.newest() == (None, []) and guard.resume_path() is None and guard.seal() == ([], [])
    save, guard = put("torchtitan", written["torchtitan"], tmp_path, 1), tk.guard(tmp_path)
    with pytest.raises(TensorkeepError, match="none of its saves is whole"):  # finished, and nobody sealed it
        guard.resume_path()
    (save / ".metadata").rename(tmp_path / "metadata")
    assert guard.resume_path() is None  # the first save, killed half-way
    put("torchtitan", written["torchtitan"], tmp_path, 2)
    with pytest.raises(TensorkeepError, match="none of its saves is whole"):
        guard.resume_path()
    (tmp_path / "metadata").rename(save / ".metadata")
    assert guard.seal(save).paths == [save] and guard.resume_path() == str(save)


def test_what_a_trainer_leaves_beside_its_saves_is_no_save(written: dict[str, Path], tmp_path: Path) -> None:
    save = put("Trainer under FSDP", written["Trainer under FSDP"], tmp_path, 5)
    (tmp_path / "trainer_state.json").write_text("{}")  # `trainer.save_state()` at the end of the training
    (tmp_path / "last-70b").mkdir()
    (tmp_path / "last-70b" / "trainer_state.json").write_text('{"global_step": 5}')
    assert tk.guard(tmp_path).seal().paths == [save]


def test_the_guides_example_runs(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "guides" / "integrations.md").read_text()
    code = page.partition("## Any trainer")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    held: dict[str, object] = {}
    exec(code, held)
    assert held["start"] is None and held["path"] is None
    put("Trainer under FSDP", written["Trainer under FSDP"], Path("runs/x"), 500)
    tk.guard("runs/x").seal("checkpoint-500")
    put("Trainer under FSDP", written["Trainer under FSDP"], Path("runs/x"), 600)
    exec(code, held)
    assert held["start"] == "runs/x/checkpoint-500" and held["path"] == Path("runs/x/checkpoint-600")
    assert capsys.readouterr().out == "sealed runs/x/checkpoint-600\n"


def test_nan_is_not_sealed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save = tmp_path / "checkpoint-1"
    accelerate(save)
    save_file({"w": torch.tensor([1.0, float("nan")])}, save / "model.safetensors")
    assert tk.guard(tmp_path).seal().left[0].code == "V01"


def test_accelerate_under_fsdp_on_two_ranks_falls_back(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    command = [sys.executable, "-W", "ignore", "-m", "tests.accelerate_fsdp", str(tmp_path)]
    ranks = [forked.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    came = [json.loads((tmp_path / f"came_{rank}.json").read_text()) for rank in (0, 1)]
    wanted = {"own": "checkpoint_2", "own is that step": True, "ours": "step_2", "ours is that step": True}
    assert came == [{"kind": "FSDP", **wanted}] * 2
    assert "__1_0.distcp: damaged since it was written" in said[0] and "has 100 bytes" in said[0]


def test_the_guard_needs_no_torch() -> None:
    code = "import sys, tensorkeep as tk; tk.guard('x').newest(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
