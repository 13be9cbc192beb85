"""Checkpoints of a run: what was saved comes back bit for bit, or an error says which tensor is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.diagnosis.verification import verify
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage import run_manifest
from tensorkeep.storage.finite import all_finite
from tensorkeep.training.saver import Keep, Saver, State, best, load, mark_best, newest, prune, save, steps
from tests import forked
from tests.helpers import refused
from tests.run_states import identical, same, state

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda n: n != "__metadata__")
KINDS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))


def made(dtype: torch.dtype, shape: list[int], *, finite: bool, seed: int) -> torch.Tensor:
    """Random bits of a dtype and shape; where `finite`, small numbers."""
    generator = torch.Generator().manual_seed(seed)
    if finite or dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    width = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * width
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@settings(max_examples=25, deadline=None)
@given(
    model=st.dictionaries(NAMES, KINDS, max_size=5),
    moments=st.dictionaries(NAMES, KINDS, max_size=5),
    numbers=st.dictionaries(
        st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), max_size=3
    ),
    adapter=st.booleans(),
)
def test_what_is_saved_comes_back_bit_for_bit(
    model: dict[str, Any], moments: dict[str, Any], numbers: dict[str, Any], adapter: bool
) -> None:
    before = State(
        {n: made(*k, finite=True, seed=i) for i, (n, k) in enumerate(model.items())},
        {n: made(*k, finite=False, seed=i) for i, (n, k) in enumerate(moments.items())},
        {},
        {**numbers, "step": 3},
        {"digest": "00", "path": "base"} if adapter else None,
        ("sampler",),
    )
    with tempfile.TemporaryDirectory() as folder:
        assert same(load(save(Path(folder), before)), before)


def test_tensors_that_are_not_row_major_come_back_the_same(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    model = {"t": base.t(), "sliced": base[:, ::2], "expanded": torch.ones(1, 3).expand(4, 3), "one": base[1]}
    after = load(save(tmp_path, State(model, {}, {}, {"step": 0})))
    assert all(identical(after.model[n], t) for n, t in model.items())


def test_a_checkpoint_larger_than_a_chunk_comes_back_the_same(tmp_path: Path) -> None:
    big = State(
        {"small": torch.ones(3), "big": torch.randn(5_000_001)}, {"big/m": torch.randn(4_200_000)}, {}, {"step": 1}
    )
    folder = save(tmp_path, big)
    assert same(load(folder), big)
    manifest = run_manifest.read_manifest(folder)
    assert len(manifest.files["model.safetensors"].chunks) == 2
    view = read(folder / "model.safetensors")
    assert {n: view.digest(n) for n in view} == {n: e.digest for n, e in manifest.tensors["model.safetensors"].items()}


def test_any_safetensors_reader_opens_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = save(tmp_path, state(5))
    assert identical(load_file(folder / "model.safetensors")["layers.0.w"], state(5).model["layers.0.w"])


def test_a_run_and_a_step_open_as_a_view_of_its_weights(tmp_path: Path) -> None:
    save(tmp_path, state(5))
    folder = save(tmp_path, state(6))
    for path in (tmp_path, tmp_path / "checkpoints", folder):
        view = read(path)
        assert set(view) == set(state(6).model) and view.notes == []
        assert view.metadata["run"] == {"step": 6, "epoch": 0, "samples": 48, "world_size": 1}
        findings, _, proven = verify(path)
        assert findings == [] and proven


@pytest.mark.parametrize("value", [torch.ones(2), object(), {1: 2}, [b"x"], {"a": {"b": {3}}}])
def test_a_document_that_json_does_not_keep_is_refused_by_path(tmp_path: Path, value: Any) -> None:
    with refused(None, "document.value"):
        save(tmp_path, State({}, {}, {}, {"step": 1, "value": value}))
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.empty(2, device="meta")]
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    with refused(None, "odd.one"):
        save(tmp_path, State({"odd.one": tensor}, {}, {}, {"step": 1}))
    assert steps(tmp_path) == []


# -- NaN and Inf --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(
    tmp_path: Path, part: str, value: float, dtype: torch.dtype
) -> None:
    save(tmp_path, state(1), Keep(1))
    bad = state(2)
    getattr(bad, part)["bad"] = torch.tensor([0.0, value, -1.0]).to(dtype)
    with pytest.raises(TensorkeepError) as caught:
        save(tmp_path, bad, Keep(1))
    assert caught.value.code == "V01" and caught.value.tensors == ("bad",)
    assert steps(tmp_path) == [1] and clean(tmp_path)
    assert same(load(tmp_path / "checkpoints/step-000001"), state(1))


def clean(run: Path) -> bool:
    return not [p for p in (run / "checkpoints").iterdir() if p.name.endswith("tensorkeep-tmp")]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([d for d in DTYPES if d.is_floating_point]), st.binary(min_size=1, max_size=64))
def test_finite_is_what_torch_says_for_every_bit_pattern(dtype: torch.dtype, data: bytes) -> None:
    width = torch.empty((), dtype=dtype).element_size()
    data = bytes(data) + bytes(-len(data) % width)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype)
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bfloat16: "BF16"}.get(dtype)
    name = name or f"F{8 * width}"
    assert all_finite(memoryview(data), name) == bool(tensor.to(torch.float64).isfinite().all())


# -- damage -------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_its_tensor_named_and_the_checkpoint_before_it_used(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    folder = save(tmp_path, state(2))
    files = sorted(folder.iterdir())
    tensors = run_manifest.read_manifest(folder).tensors
    chance = random.Random(0)
    for _ in range(200):
        path = chance.choice(files)
        whole = path.read_bytes()
        at, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        with pytest.raises(TensorkeepError) as caught:
            load(folder)
        assert caught.value.code == "F03" and path.name in str(caught.value)
        hit = tuple(n for n, e in tensors.get(path.name, {}).items() if e.start <= at < e.start + e.nbytes)
        assert caught.value.tensors == hit
        found = newest(tmp_path)
        assert found is not None and found[1].name == "step-000001" and same(found[0], state(1))
        assert [(f.code, f.severity) for f in found[2]] == [("F03", "warning")] and tuple(found[2][0].tensors) == hit
        path.write_bytes(whole)
    assert same(load(folder), state(2))


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "longer"])
def test_a_file_that_is_missing_or_of_another_size_is_named(tmp_path: Path, name: str, harm: str) -> None:
    save(tmp_path, state(1))
    path = save(tmp_path, state(2)) / name
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-1], "longer": whole + b"\0"}[harm])
    codes = {"missing": "F05", "empty": "F02", "cut": "F02", "longer": "F07"}
    code = codes[harm] if name != "manifest.json" else "F01" if harm == "missing" else "F03"
    with refused(code, "step-000002"):
        load(path.parent)
    found = newest(tmp_path)
    assert found is not None and same(found[0], state(1)) and [f.code for f in found[2]] == [code]
    findings, _, _ = verify(path.parent)
    assert [f.code for f in findings if f.severity == "error"] == [code]


def test_where_every_checkpoint_is_damaged_a_resume_stops(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, state(step)) / "model.safetensors").write_bytes(b"x")
    with refused("F02", "all 2 checkpoints are damaged"):
        newest(tmp_path)
    assert {f.code for f in verify(tmp_path)[0]} == {"F02"}


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None and steps(tmp_path) == []


def test_a_renamed_step_is_not_taken_for_another(tmp_path: Path) -> None:
    folder = save(tmp_path, state(1))
    folder.rename(folder.with_name("step-000009"))
    with refused("F07", "was renamed"):
        load(folder.with_name("step-000009"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLACES = [
    ("schema",),
    ("step",),
    ("chunk",),
    ("files",),
    ("tensors",),
    ("base",),
    ("not_captured",),
    ("files", "model.safetensors"),
    ("files", "model.safetensors", "bytes"),
    ("files", "model.safetensors", "chunks"),
    ("files", "state.json"),
    ("tensors", "model.safetensors"),
    ("tensors", "model.safetensors", "layers.0.w"),
    *[("tensors", "model.safetensors", "layers.0.w", key) for key in ("dtype", "shape", "start", "xxh3_128")],
    ("files", "../../escape"),
    ("files", "/etc/passwd"),
    ("files", "a/b"),
    ("tensors", "nowhere.safetensors"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), state(1))


@settings(max_examples=120, deadline=None)
@given(place=st.sampled_from(PLACES), value=JSON | st.integers(-(1 << 70), 1 << 70))
def test_a_hostile_manifest_gives_one_clear_error_and_never_another_state(
    sound: Path, place: tuple[str, ...], value: Any
) -> None:
    document = json.loads((sound / "manifest.json").read_bytes())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "step-000001"
        shutil.copytree(sound, copied)
        (copied / "manifest.json").write_bytes(run_manifest.manifest_bytes(document))
        try:
            after = load(copied)
        except TensorkeepError as error:
            assert error.code in ("F02", "F03", "F05", "F06", "F07"), error
        else:  # what says nothing about the tensors may be anything of its type
            assert place[0] in ("base", "not_captured") or value == _at(sound, place) or place[-1] == "xxh3_128"
            assert all(identical(after.model[n], t) for n, t in state(1).model.items())


def _at(sound: Path, place: tuple[str, ...]) -> Any:
    inner = json.loads((sound / "manifest.json").read_bytes())
    for key in place:
        inner = inner.get(key) if isinstance(inner, dict) else None
    return inner


@pytest.mark.parametrize("text", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"schema": 1e999}', b"1" * 5000])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, text: bytes) -> None:
    folder = save(tmp_path, state(1))
    (folder / "manifest.json").write_bytes(text)
    with refused("F03", "manifest.json"):
        load(folder)


# -- which checkpoints stay -----------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    saved=st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True),
    last=st.integers(0, 4),
    every=st.none() | st.integers(1, 20),
    marked=st.integers(0, 6),
)
def test_pruning_keeps_the_last_the_every_nth_the_best_and_the_newest_valid(
    saved: list[int], last: int, every: int | None, marked: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        everything = Keep(last=100)
        for step in sorted(saved):
            save(run, State({"w": torch.ones(1)}, {}, {}, {"step": step}), everything)
        chosen = sorted(saved)[marked % len(saved)]
        mark_best(run, chosen)
        gone = prune(run, Keep(last, every))
        left = set(steps(run))
        kept = set(sorted(saved)[-max(last, 1) :]) | {s for s in saved if every and s % every == 0} | {chosen}
        assert left == kept and {p.name for p in gone} == {run_manifest.step_name(s) for s in set(saved) - kept}
        assert best(run) == chosen and clean(run)


def test_pruning_never_takes_the_newest_valid_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step), Keep(9))
    for step in (2, 3):
        path = tmp_path / f"checkpoints/step-00000{step}/model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    prune(tmp_path, Keep(1))
    assert steps(tmp_path) == [3, 1]
    save(
        tmp_path, state(2), Keep(1)
    )  # a resume from 1 comes by 2 again: it replaces the damaged one, and 3 is not newer
    found = newest(tmp_path)
    assert found is not None and same(found[0], state(2)) and steps(tmp_path) == [3, 2]


@pytest.mark.parametrize("text", ["", "step-", "step-1", "step-000001x", "\0\0\0\0", "../step-000001"])
def test_a_torn_best_or_latest_loses_no_checkpoint(tmp_path: Path, text: str) -> None:
    for step in (1, 2):
        save(tmp_path, state(step), Keep(9))
    mark_best(tmp_path, 1)
    for name in ("best", "latest"):
        (tmp_path / "checkpoints" / name).write_text(text)
    found = newest(tmp_path)
    assert found is not None and found[0].document["step"] == 2
    with refused("F07", "names no step"):
        best(tmp_path)
    with refused("F07", "names no step"):  # what it named is unknown, so nothing is deleted; the save itself is durable
        save(tmp_path, state(3), Keep(1))
    assert steps(tmp_path) == [3, 2, 1]


def test_latest_names_the_newest_and_best_the_marked(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state(step))
    mark_best(tmp_path, 1)
    read_text = {n: (tmp_path / "checkpoints" / n).read_text() for n in ("latest", "best")}
    assert read_text == {"latest": "step-000002\n", "best": "step-000001\n"} and best(tmp_path) == 1
    with refused("F05", "no such checkpoint"):
        mark_best(tmp_path, 7)


# -- one writer -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    with refused(None, "this process saves into it already"):
        save(tmp_path, state(1))
    source = "import sys; from tensorkeep.training.saver import Saver; Saver(sys.argv[1])"
    other = forked.run([sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True)
    assert f"process {os.getpid()} saves into it" in other.stderr
    saver.close()
    assert same(load(save(tmp_path, state(1))), state(1))


def test_the_lock_goes_with_its_process_though_children_live_on(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    first = os.fork()
    if first == 0:
        Saver(tmp_path)
        child = os.fork()  # as a data loader's worker: inherits every handle, outlives the kill
        if child == 0:
            os.write(tell, b"x")
            __import__("time").sleep(3)
        os._exit(0)
    os.read(ready, 1)
    os.waitpid(first, 0)
    save(tmp_path, state(1))
    os.close(ready)
    os.close(tell)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system that refuses even its owner")
def test_a_read_only_run_says_so(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    if subprocess.run(["mount", "--bind", "-o", "ro", str(tmp_path), str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True, capture_output=True)
        with refused(None, "read-only"):
            save(tmp_path, state(2))
        found = newest(tmp_path)
        assert found is not None and same(found[0], state(1))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
