"""Links in other people's folders: nothing is written through one, and nothing outside is copied into a sink."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tensorkeep.cli import main
from tensorkeep.conversion.execution import convert
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import COMPANIONS
from tensorkeep.formats.view import read
from tensorkeep.storage import run_folder, run_manifest
from tensorkeep.storage.run_folder import LATEST, locked
from tensorkeep.training import metrics
from tensorkeep.training.saver import newest, save
from tests.language_files import config, save_tokenizer, texts
from tests.run_states import state as run_state
from tests.samples import plan_of, run, write_hf

SECRET = "KEY=hunter2\n" * 20


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "precious"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


# -- run files --------------------------------------------------------------------------------------------------------

SPOILED: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda path, precious: path.symlink_to(f"../elsewhere/{precious.name}"),
    "an absolute link": lambda path, precious: path.symlink_to(precious),
    "a link to nothing": lambda path, precious: path.symlink_to(precious.with_name("new")),
    "a link to a folder": lambda path, precious: path.symlink_to(precious.parent),
    "a hard link": lambda path, precious: path.hardlink_to(precious),
    "a pipe": lambda path, precious: os.mkfifo(path),
    "a folder": lambda path, precious: path.mkdir(),
}
USES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lock": (".lock", lambda place: locked(place).__enter__()),
    "append": ("metrics.jsonl", lambda place: metrics.append(place / "metrics.jsonl", {"step": 1})),
    "sync": ("metrics.jsonl", lambda place: metrics.sync(place / "metrics.jsonl")),
    "rewind": ("metrics.jsonl", lambda place: metrics.rewind(place / "metrics.jsonl", 1)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", SPOILED)
def test_a_run_s_file_is_never_written_through_a_link(use: str, kind: str, precious: Path, tmp_path: Path) -> None:
    name, do = USES[use]
    place = tmp_path / "run"
    place.mkdir()
    SPOILED[kind](place / name, precious)
    if use == "sync" and kind == "a link to nothing":
        pytest.skip("there is nothing to wait for")
    with pytest.raises(TensorkeepError) as caught:
        do(place)
    assert name in caught.value.line and caught.value.exit_code == 2
    assert precious.read_text() == SECRET and [p.name for p in precious.parent.iterdir()] == ["precious"]


def test_a_lock_file_with_somebody_s_words_in_it_stays(tmp_path: Path) -> None:
    for words in (SECRET, "12345 and more\n", "\0"):
        (tmp_path / ".lock").write_text(words)
        with pytest.raises(TensorkeepError, match="somebody else"):
            locked(tmp_path).__enter__()
        assert (tmp_path / ".lock").read_text() == words
    for ours in ("", "12345\n"):
        (tmp_path / ".lock").write_text(ours)
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_s_file_that_is_a_link_is_named_and_passed_over(name: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run", run_state(step))
    folder = run_folder.folder_of(tmp_path / "run", 2)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    (found,) = run_manifest.findings(folder)
    assert found.code == "F07" and "symbolic link" in found.message and name in found.message
    back = newest(tmp_path / "run")
    assert back is not None and back[1].name == "step-000001" and back[2][0].code == "F07"


def test_latest_and_best_are_replaced_and_not_followed(precious: Path, tmp_path: Path) -> None:
    save(tmp_path / "run", run_state(1))
    path = tmp_path / "run" / "checkpoints" / LATEST
    path.unlink()
    path.symlink_to(precious)
    with pytest.raises(TensorkeepError, match="symbolic link"):
        run_folder.named_step(tmp_path / "run", LATEST)
    save(tmp_path / "run", run_state(2))
    assert path.read_text() == "step-000002\n" and not path.is_symlink() and precious.read_text() == SECRET


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    document = {
        "config": config(),
        "tokenizer": str(save_tokenizer(tmp_path / "tok")),
        "data": {"files": str(texts(tmp_path / "a.jsonl")), "length": 32, "packing": "concatenate"},
        "training": {"updates": 1, "batch": 2},
    }
    path = tmp_path / "run" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text("# why I chose these numbers\n" + yaml.safe_dump(document))
    return path


def test_a_recipe_in_the_run_s_folder_is_not_replaced_by_its_own_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = recipe.read_text()
    for _ in range(2):  # nothing that was left makes the second time another
        assert main(["train", "language", str(recipe), "--out", str(recipe.parent), "--device", "cpu"]) == 2
        assert recipe.read_text() == before and "another --out" in capsys.readouterr().err
    assert main(["train", "language", str(recipe), "--out", str(tmp_path / "other"), "--device", "cpu"]) == 0


def test_a_tokenizer_s_linked_file_does_not_come_into_the_run(recipe: Path, precious: Path, tmp_path: Path) -> None:
    (tmp_path / "tok" / "merges.txt").symlink_to(precious)
    out = tmp_path / "other"
    assert main(["train", "language", str(recipe), "--out", str(out), "--device", "cpu"]) == 0
    assert (out / "tokenizer.json").is_file() and not (out / "merges.txt").exists()


# -- companions -------------------------------------------------------------------------------------------------------


def holding_the_secret(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]


@pytest.mark.parametrize("name", [n for n in COMPANIONS if n not in ("config.json", "recipe.yaml")])
@pytest.mark.parametrize("to", ["hf", "dcp", "pth"])
def test_a_companion_that_leads_out_is_left_and_said(
    name: str, to: str, precious: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_hf(tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(precious)
    (source / "inner.txt").write_text("{}")
    if name != "vocab.json":
        (source / "vocab.json").symlink_to("inner.txt")  # leads nowhere else
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 0
    said = capsys.readouterr().err
    assert "F06" in said and name in said and not holding_the_secret(tmp_path / "out")
    assert name == "vocab.json" or (tmp_path / "out" / "vocab.json").read_text() == "{}"


def test_a_config_that_leads_out_is_read_and_not_copied_unless_it_is_named(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source")
    other = tmp_path / "elsewhere" / "config.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"hidden_size": 4, "token": "hunter2"}))
    (source / "config.json").unlink(missing_ok=True)
    (source / "config.json").symlink_to(other)
    assert read(source).config == {"hidden_size": 4, "token": "hunter2"}
    assert main(["convert", str(source), str(tmp_path / "a"), "--to", "hf"]) == 0
    assert not holding_the_secret(tmp_path / "a")
    words = ["convert", str(source), str(tmp_path / "b"), "--to", "hf", "--config", str(other)]
    assert main(words) == 0 and json.loads((tmp_path / "b" / "config.json").read_text())["hidden_size"] == 4


def test_merge_and_repair_leave_it_too(precious: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree("examples/tiny-llama", tmp_path / "base")
    (base / "merges.txt").symlink_to(precious)
    assert main(["merge", str(base), "examples/tiny-adapter", str(tmp_path / "merged")]) == 0
    assert "merges.txt" in capsys.readouterr().err and not holding_the_secret(tmp_path / "merged")
    broken = shutil.copytree("examples/tiny-llama", tmp_path / "broken")
    document = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**document, "num_attention_heads": 1}))
    (broken / "merges.txt").symlink_to(precious)
    words = ["repair", str(broken), str(tmp_path / "mended"), "--reference", str(base)]
    assert main([*words, "--take-from-reference", "config.json"]) == 0
    assert (tmp_path / "mended").is_dir() and not holding_the_secret(tmp_path / "mended")


BLOB = "0123456789" * 4


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_snapshot_of_the_hub_s_cache_is_copied_whole(below: str, tmp_path: Path) -> None:
    whole = write_hf(tmp_path / "source")
    model = tmp_path / "hub" / "models--a--b"
    snapshot = model / "snapshots" / "abc" / below
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (whole / "merges.txt").write_text("a b")
    for number, file in enumerate(sorted(whole.iterdir())):
        blob = f"{number:064x}" if number % 2 else f"{number:040x}"
        shutil.copy(file, model / "blobs" / blob)
        (snapshot / file.name).symlink_to(os.path.relpath(model / "blobs" / blob, snapshot))
    run(snapshot, tmp_path / "out", "hf")
    assert {p.name for p in whole.iterdir()} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("trick", ["another name", "a link for a blob", "a link for all blobs", "another model"])
def test_what_only_looks_like_the_hub_s_cache_is_not_believed(trick: str, precious: Path, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--a--b"
    snapshot = write_hf(model / "snapshots" / "abc")
    target = f"../../blobs/{BLOB}"
    if trick == "a link for all blobs":
        precious.rename(precious.with_name(BLOB))
        (model / "blobs").symlink_to(precious.parent)
    else:
        (model / "blobs").mkdir()
    if trick == "another name":
        shutil.move(precious, model / "blobs" / "precious")
        target = "../../blobs/precious"
    elif trick == "a link for a blob":
        (model / "blobs" / BLOB).symlink_to(precious)
    elif trick == "another model":
        (tmp_path / "hub" / "models--c--d" / "blobs").mkdir(parents=True)
        shutil.move(precious, tmp_path / "hub" / "models--c--d" / "blobs" / BLOB)
        target = f"../../../models--c--d/blobs/{BLOB}"
    (snapshot / "merges.txt").symlink_to(target)
    assert "hunter2" in (snapshot / "merges.txt").read_text()
    convert(plan_of(snapshot, "hf"), str(tmp_path / "out"), "hf")
    assert not holding_the_secret(tmp_path / "out")
