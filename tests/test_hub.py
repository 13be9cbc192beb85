"""Hub ids as paths: a cache laid out as huggingface_hub lays it out, and no network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.hub import cache_folder, cached_snapshot, wanted_files

COMMIT, OTHER = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def store(cache: Path, model: str, commit: str, *files: str, reference: str | None = "main") -> Path:
    """A snapshot of links into blobs, as huggingface_hub makes it."""
    root = cache / f"models--{model.replace('/', '--')}"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in files:
        (root / "blobs" / f"{commit}-{file}").write_bytes(b"x")
        (folder / file).symlink_to(Path("../../blobs") / f"{commit}-{file}")
    if reference:
        (root / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / reference).write_text(commit)
    return folder


def test_main_branch_tag_and_commit(cache: Path) -> None:
    first = store(cache, "org/a-model.v2", COMMIT, "config.json", "model.safetensors")
    second = store(cache, "org/a-model.v2", OTHER, "model.safetensors", reference="refs/pr/1")
    assert cached_snapshot("org/a-model.v2") == first
    assert cached_snapshot("org/a-model.v2@refs/pr/1") == second
    assert cached_snapshot(f"org/a-model.v2@{OTHER}") == second


def test_without_reference_the_only_snapshot_serves(cache: Path) -> None:
    folder = store(cache, "org/name", COMMIT, "model.safetensors", reference=None)
    assert cached_snapshot("org/name") == folder
    store(cache, "org/name", OTHER, "model.safetensors", reference=None)
    with pytest.raises(TensorkeepError, match="no such"):
        cached_snapshot("org/name")


@pytest.mark.parametrize(
    "path",
    [
        "/abs/x",
        "./org/name",
        "~/name",
        "a/b/c",
        "model.safetensors",
        "org/model.safetensors",
        "run/x.pth",
        "name",
        "a\0/b",
        "",
    ],
)
def test_local_paths_are_plain_errors(cache: Path, path: str) -> None:
    with pytest.raises(TensorkeepError) as error:
        cached_snapshot(path)
    assert error.value.code == "F05" and error.value.what == "no such file or folder"


def test_an_existing_folder_makes_it_a_path(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store(cache, "runs/name", COMMIT, "model.safetensors")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TensorkeepError, match="no such file or folder") as error:
        cached_snapshot("runs/name")
    assert error.value.what == "no such file or folder"


def test_not_cached(cache: Path) -> None:
    with pytest.raises(TensorkeepError, match="no such model in the Hub cache") as error:
        cached_snapshot("org/name")
    assert error.value.code == "F05" and "HF_HUB_OFFLINE" in str(error.value.hint)


def test_cached_without_weights(cache: Path) -> None:
    folder = store(cache, "org/name", COMMIT, "config.json")
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(TensorkeepError, match="without weights"):
        cached_snapshot("org/name")


@pytest.mark.parametrize("commit", ["../../../elsewhere", "/etc", "", "a/b"])
def test_a_reference_cannot_lead_out_of_the_cache(cache: Path, commit: str) -> None:
    store(cache, "org/name", COMMIT, "model.safetensors", reference=None)
    store(cache, "org/name", OTHER, "model.safetensors", reference=None)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text(commit)
    with pytest.raises(TensorkeepError):
        cached_snapshot("org/name")
    with pytest.raises(TensorkeepError):
        cached_snapshot(f"org/name@{commit}")


def test_where_the_cache_is(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hub"
    monkeypatch.delenv("HF_HOME")
    assert cache_folder() == Path("~/.cache/huggingface/hub").expanduser()


def test_wanted_files() -> None:
    beside = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    other = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling_evil.py",
        "README.md",
        "onnx/model.safetensors",
        "original/config.json",
        "x.gguf",
    ]
    assert wanted_files([*beside, *weights, *other]) == sorted([*beside, *weights])
    assert wanted_files(["config.json", "pytorch_model.bin", "training_args.bin", "x.gguf", "a.py"]) == [
        "config.json",
        "pytorch_model.bin",
    ]


class _Refused(OSError):
    pass


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, files: list[str], folder: Path, error: Exception | None = None
) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    class Api:
        def model_info(self, repository: str, revision: str | None, timeout: float) -> SimpleNamespace:
            if error:
                raise error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files])

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, files=allow_patterns)
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Api, snapshot_download=download))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return asked


def test_download_takes_no_code(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py"], cache)
    assert cached_snapshot("org/name@v1") == cache
    assert asked == {"repository": "org/name", "revision": "v1", "files": ["config.json", "model.safetensors"]}


def test_download_errors_are_ours(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, [], cache, _Refused("401 Client Error\nmore"))
    with pytest.raises(TensorkeepError, match="401 Client Error") as error:
        cached_snapshot("org/name")
    assert error.value.code == "F05" and "more" not in str(error.value)
    fake_hub_files = ["README.md", "model.py"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fake_hub(monkeypatch, fake_hub_files, cache)
    with pytest.raises(TensorkeepError, match="no weights that can be read"):
        cached_snapshot("org/name")


def test_without_huggingface_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(TensorkeepError) as error:
        cached_snapshot("org/name")
    assert "pip install huggingface_hub" in str(error.value.hint)
