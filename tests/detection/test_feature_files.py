"""Feature files as people have them: one array gives the same numbers from each, what is odd is said of its file."""

import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tensorkeep import cli
from tensorkeep.detection.data import feature_checks, hdf5
from tensorkeep.detection.data.annotations import parse_annotations
from tensorkeep.detection.data.clips import make_clips
from tensorkeep.detection.data.features import count_features, look_side_by_side, read_features, read_side_by_side
from tensorkeep.detection.data.items import find_items
from tensorkeep.detection.data.readers import FeatureReader, WindowConfig
from tensorkeep.detection.recipe.text import detection_recipe
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.recipe import to_yaml

from .test_side_by_side import recipe_document

ROWS = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
OTHER = np.zeros((3, 3), np.float32)
WINDOW = WindowConfig("sliding", 8, feature_stride=10)


def csv(path: Path, rows: Any, first: str = "") -> None:
    path.write_text(first + "".join(",".join(repr(float(v)) for v in row) + "\n" for row in rows))


def pickled(path: Path, value: Any, protocol: int | None = None) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


FILES: dict[str, Any] = {
    "plain.npy": np.save,
    "half.npy": lambda path, rows: np.save(path, rows.astype(np.float16)),
    "double.npy": lambda path, rows: np.save(path, rows.astype(np.float64)),
    "fortran.npy": lambda path, rows: np.save(path, np.asfortranarray(rows)),
    "leading.npy": lambda path, rows: np.save(path, rows[None]),
    "around.npy": lambda path, rows: np.save(path, rows[None, :, None, :, None]),
    "one.npz": lambda path, rows: np.savez(path, anything=rows),
    "packed.npz": lambda path, rows: np.savez_compressed(path, feats=rows, fps=np.float32(25), names=np.array(["a"])),
    "tensor.pt": lambda path, rows: torch.save(torch.from_numpy(rows), path),
    "bfloat.pth": lambda path, rows: torch.save(torch.from_numpy(rows).bfloat16(), path),
    "array.pt": lambda path, rows: torch.save(np.ascontiguousarray(rows), path),
    "several.pt": lambda path, rows: torch.save(
        {"feats": torch.from_numpy(rows), "other": torch.zeros(2, 2), "n": 3}, path
    ),
    "old.pth": lambda path, rows: torch.save(torch.from_numpy(rows), path, _use_new_zipfile_serialization=False),
    "a.safetensors": lambda path, rows: save_file({"x": torch.from_numpy(rows).contiguous()}, path),
    "saved.pkl": lambda path, rows: torch.save(torch.from_numpy(rows), path),
    "dict.pickle": lambda path, rows: pickled(path, {"feats": rows, "rate": 25, "other": OTHER}),
    "scalars.pkl": lambda path, rows: pickled(path, {"feats": rows, "rate": np.float32(25)}),
    "bare.csv": csv,
    "marked.csv": lambda path, rows: csv(path, rows, "\ufeff"),
    "headed.csv": lambda path, rows: csv(path, rows, ",".join(f"f{n}" for n in range(rows.shape[1])) + "\n"),
    "numbered.csv": lambda path, rows: csv(path, rows, ",".join(str(n) for n in range(rows.shape[1])) + "\n"),
    **{f"p{n}.pkl": lambda path, rows, n=n: pickled(path, rows, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("turned", [False, True])
def test_one_array_reads_the_same_from_every_kind_of_file(tmp_path: Path, name: str, turned: bool) -> None:
    FILES[name](tmp_path / name, ROWS.T if turned else ROWS)
    wanted = torch.from_numpy(ROWS.T).contiguous()
    if "half" in name or "bfloat" in name:
        wanted = wanted.to(torch.float16 if "half" in name else torch.bfloat16).float()
    assert count_features(tmp_path / name, 4) == 12
    got = read_features(tmp_path / name, 4, (3, 9))
    assert torch.equal(got, wanted[:, 3:9]) and got.is_contiguous() and got.dtype == torch.float32
    assert torch.equal(read_features(tmp_path / name, 4), wanted)


def test_no_pickle_runs_and_a_tensor_in_one_is_told_what_to_do(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(ran),))

    for number, value in enumerate((Hostile(), {"feats": ROWS, "x": Hostile()}, np.array([Hostile()], dtype=object))):
        pickled(tmp_path / f"{number}.pkl", value)
        with pytest.raises(TensorkeepError, match=rf"{number}\.pkl.*names posix\.mkdir") as caught:
            count_features(tmp_path / f"{number}.pkl", 4)
        assert caught.value.code == "F04" and not ran.exists()
    pickled(tmp_path / "tensor.pkl", torch.from_numpy(ROWS))
    with pytest.raises(TensorkeepError, match=r"torch\.storage\._load_from_bytes(.|\n)*written by torch.save"):
        read_features(tmp_path / "tensor.pkl", 4)


BAD: dict[str, tuple[Any, str]] = {
    "short.pkl": (lambda p: p.write_bytes(pickle.dumps(ROWS, 4).replace(b"K\x0cK\x04", b"K\x0dK\x04")), "do not fit"),
    "cut.pkl": (lambda p: p.write_bytes(pickle.dumps(ROWS, 4)[:-9]), "damaged pickle"),
    "list.pkl": (lambda p: pickled(p, ROWS.tolist()), "holds no array of numbers"),
    "objects.pkl": (lambda p: pickled(p, np.array([None, None])), "holds no array of numbers"),
    "two.pkl": (lambda p: pickled(p, {"rgb": ROWS, "flow": ROWS}), r"2 arrays \('rgb', 'flow'\)(.|\n)*feature_key"),
    "cut.npz": (lambda p: (np.savez(p, ROWS), p.write_bytes(p.read_bytes()[:-60])), r"no \.npz that can be read"),
    "text.npz": (lambda p: np.savez(p, names=np.array(["a"])), "holds no array of numbers"),
    "torn.csv": (lambda p: p.write_text("1,2,3,4\n1,2\n"), "is no table of numbers: the number of columns changed"),
    "words.csv": (lambda p: p.write_text("a,b\nhop,2\n"), "is no table of numbers: could not convert"),
    "empty.csv": (lambda p: p.write_text(""), r"its shape is \(0, 1\)"),
    "crops.npy": (lambda p: np.save(p, np.zeros((12, 10, 4))), r"its shape is \(12, 10, 4\), features are \[time"),
    "wide.npy": (lambda p: np.save(p, np.zeros((12, 7))), r"\(12, 7\): neither axis has the 4 channels"),
    "bits.npy": (lambda p: np.save(p, ROWS > 0), "no array of numbers: its dtype is bool"),
    "complex.pt": (lambda p: torch.save(torch.zeros(12, 4, dtype=torch.complex64), p), "no array of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_feature_file_is_said_with_the_file_and_what_was_found(tmp_path: Path, name: str) -> None:
    make, said = BAD[name]
    make(tmp_path / name)
    for call in (count_features, read_features):
        with pytest.raises(TensorkeepError, match=rf"{name.replace('.', '[.]')}(.|\n)*{said}"):
            call(tmp_path / name, 4)


def test_a_small_file_does_not_get_memory_for_a_huge_array(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)})
    for name, body, said in (("a.npz", head.getvalue(), "has 0 bytes"), ("b.npz", b"\x93NUMPY\1\0\2\0{(", "no .npz")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("feats.npy", body)
        with pytest.raises(TensorkeepError, match=rf"{name}(.|\n)*{said}"):
            read_features(tmp_path / name, 4)
    for name, body in (("b.npy", b"\x93NUMPY\1\0\2\0{("), ("c.npy", npy(10**30, 4)), ("d.npy", npy(-1, 4))):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(TensorkeepError, match="is no array that can be read"):
            read_features(tmp_path / name, 4)


def npy(*shape: int) -> bytes:
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def test_what_unpacks_to_far_more_than_its_file_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "_LARGE", 1 << 20)
    np.savez_compressed(tmp_path / "zeros.npz", feats=np.zeros((1 << 17, 4), np.float32))
    with pytest.raises(TensorkeepError, match=r"zeros\.npz: feats\.npy: says it has 0\.0 GiB, of which \d+ bytes"):
        count_features(tmp_path / "zeros.npz", 4)
    np.savez_compressed(tmp_path / "noise.npz", np.random.default_rng(0).normal(size=(1 << 16, 4)))
    assert count_features(tmp_path / "noise.npz", 4) == 1 << 16
    for name, body, how, said in (
        ("head.npz", b"\x93NUMPY\2\0" + (1 << 27).to_bytes(4, "little") + bytes(1 << 24), zipfile.ZIP_DEFLATED, "EOF"),
        ("other.npz", npy(12, 4) + bytes(192), zipfile.ZIP_LZMA, "a way that numpy does not use"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", how) as archive:
            archive.writestr("feats.npy", body)
        with pytest.raises(TensorkeepError, match=rf"{name}: is no \.npz(.|\n)*{said}"):
            count_features(tmp_path / name, 4)


def test_a_pipe_among_features_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.npy", "a.h5"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(TensorkeepError, match=rf"{name}: is no file"):
            count_features(tmp_path / name, 4)


def test_a_tables_first_row_is_names_only_where_it_has_some(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("0\n1\n2\n")  # a single column is no count of columns
    assert count_features(tmp_path / "one.csv", 1) == 3
    wide = ",".join(["-1.5e-05"] * 150_000)
    (tmp_path / "wide.csv").write_text(f"{wide}\n{wide}\n")  # longer than a mebibyte
    assert count_features(tmp_path / "wide.csv", 150_000) == 2


def test_features_are_checked_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_checks, "_AT_ONCE", 8)  # two rows
    rows = np.ones((7, 4), np.float32)
    np.save(tmp_path / "a.npy", rows)
    rows[6, 1] = 2
    np.save(tmp_path / "b.npy", rows)
    rows[4, 3] = np.nan
    np.save(tmp_path / "c.npy", rows)
    items, _ = find_items(truth("a", "b", "c"), "training", tmp_path, FeatureReader(4))
    said = [(p.video, p.message) for p in feature_checks.check_features(make_clips(items, WINDOW, FeatureReader(4)))]
    assert [video for video, _ in said] == ["a", "c"]
    assert "all 28 numbers are 1" in said[0][1] and "at time step 4, channel 3" in said[1][1]


def test_an_array_is_chosen_by_the_recipes_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", rgb=ROWS, flow=-ROWS)
    assert torch.equal(read_features(tmp_path / "a.npz", 4, key="flow"), torch.from_numpy(-ROWS.T))
    with pytest.raises(TensorkeepError, match="holds no 'depth', but 'rgb', 'flow'"):
        count_features(tmp_path / "a.npz", 4, key="depth")


def truth(*names: str) -> Any:
    row = {"subset": "training", "duration": 12.0, "frame": 120, "annotations": [{"segment": [1.0, 4.0], "label": "x"}]}
    return parse_annotations({"database": dict.fromkeys(names, row)})


def test_where_both_axes_fit_the_recipe_decides_unless_other_files_speak_against_it(tmp_path: Path) -> None:
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.save(tmp_path / "square.npy", square)
    assert torch.equal(read_features(tmp_path / "square.npy", 4), torch.from_numpy(square.T))
    assert torch.equal(read_features(tmp_path / "square.npy", 4, channels_first=True), torch.from_numpy(square))
    assert look_side_by_side([tmp_path / "square.npy"], 4).against is None
    np.save(tmp_path / "other.npy", ROWS)
    items, problems = find_items(truth("other", "square"), "training", tmp_path, FeatureReader(4))
    assert [item.name for item in items] == ["other", "square"] and problems == []
    np.save(tmp_path / "other.npy", ROWS.T)
    with pytest.raises(TensorkeepError, match=r"square\.npy: both axes have 4 entries, .*data\.feature_layout"):
        find_items(truth("other", "square"), "training", tmp_path, FeatureReader(4))
    items, problems = find_items(truth("other"), "training", tmp_path, FeatureReader(4))
    assert [item.steps for item in items] == [12] and "feature_layout: ct in data says so" in problems[0].message
    assert find_items(truth("other", "square"), "training", tmp_path, FeatureReader(4, True))[1] == []
    shown = make_clips(items, WINDOW, FeatureReader(4)).sample(0, torch.Generator())["inputs"]
    assert torch.equal(shown, torch.from_numpy(ROWS[:8].T))


def test_files_of_known_widths_are_held_against_the_order_of_their_folders(tmp_path: Path) -> None:
    np.save(tmp_path / "rgb.npy", ROWS)
    np.save(tmp_path / "flow.npy", np.zeros((2, 12), np.float32))  # channels first
    paths = [tmp_path / "rgb.npy", tmp_path / "flow.npy"]
    assert look_side_by_side(paths, 6, widths=(4, 2)).steps == 12
    with pytest.raises(TensorkeepError, match=r"flow\.npy: its shape is \(2, 12\): .* the 4 channels(.|\n)*per_file"):
        look_side_by_side(paths[::-1], 6, widths=(4, 2))


def test_axes_of_files_whose_sum_alone_is_known_may_differ(tmp_path: Path) -> None:
    rgb, flow = ROWS, ROWS[:, :2] + 1
    paths = [tmp_path / "rgb.npy", tmp_path / "flow.npy"]
    wanted = torch.from_numpy(np.concatenate([rgb, flow], 1).T[:, 2:5])
    for first, second in ((rgb, flow), (rgb.T, flow), (rgb, flow.T), (rgb.T, flow.T)):
        np.save(paths[0], first)
        np.save(paths[1], second)
        for said in (False, True):
            assert look_side_by_side(paths, 6, channels_first=said).steps == 12
            assert torch.equal(read_side_by_side(paths, 6, 12, (2, 5), channels_first=said), wanted)
    with pytest.raises(TensorkeepError, match=r"12 \+ 12 channels are not 7: .*shapes \(4, 12\), \(2, 12\)"):
        look_side_by_side(paths, 7)
    for path, shape in zip([*paths, tmp_path / "square.npy"], ((5, 3), (3, 5), (5, 5)), strict=True):
        np.save(path, np.zeros(shape))
    with pytest.raises(TensorkeepError, match=r"can be read in 2 ways with 11 channels: .*square\.npy"):
        look_side_by_side([*paths, tmp_path / "square.npy"], 11)


def test_numbers_that_are_not_finite_are_named_by_their_place(tmp_path: Path) -> None:
    rows = ROWS.astype(np.float64)
    rows[5, 2] = np.nan
    np.save(tmp_path / "a.npy", rows)
    with pytest.raises(
        TensorkeepError, match=r"a\.npy: 1 of 24 numbers are not finite, .* nan, at time step 5, chan.* 2"
    ):
        read_features(tmp_path / "a.npy", 4, (3, 9))
    assert read_features(tmp_path / "a.npy", 4, (6, 9)).shape == (4, 3)
    rows[5, 2] = 1e300
    np.save(tmp_path / "a.npy", rows)
    with pytest.raises(TensorkeepError, match=r"not finite, the first, inf, at time step 5"):
        read_features(tmp_path / "a.npy", 4)
    large = np.full((12, 4), 3e38, np.float32)
    np.save(tmp_path / "a.npy", large)
    assert torch.equal(read_features(tmp_path / "a.npy", 4), torch.from_numpy(large.T))


def test_a_file_of_another_ending_is_named_with_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.mat").write_bytes(b"MATLAB")
    with pytest.raises(TensorkeepError, match=r"a: a\.mat is there, which is not read: features are \.npy, \.npz"):
        find_items(truth("a"), "training", tmp_path, FeatureReader(4), pattern="{video}.npy")


def test_check_names_every_odd_file_with_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe_document(tmp_path)
    made["data"]["broken"] = "error"
    (tmp_path / "recipe.yaml").write_text(to_yaml(detection_recipe(made)))
    rows = np.load(tmp_path / "rgb" / "v0.npy")
    rows[7, 3] = np.inf
    np.save(tmp_path / "rgb" / "v0.npy", rows)
    np.save(tmp_path / "flow" / "v1.npy", np.zeros((24, 9), np.float32))
    for folder, width in (("rgb", 5), ("flow", 3)):
        np.save(tmp_path / folder / "v2.npy", np.zeros((24, width), np.float32))
    assert cli.main(["check", "detection", str(tmp_path / "recipe.yaml"), "--json"]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert any("v0: " in line and "rgb/v0.npy" in line and "at time step 7, channel 3" in line for line in files)
    assert any("v1: 5 + 9 channels are not 8: " in line and "(24, 9)" in line for line in files)
    assert any("v2: " in line and "all 192 numbers are 0" in line for line in files)


def test_a_run_on_features_from_before_is_gone_on_with(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    items, _ = find_items(truth("a"), "training", tmp_path, FeatureReader(4))
    assert make_clips(items, WINDOW, FeatureReader(4)).fingerprint() == "9c125fb9ad91dccc4dd42f89c2d8060d"


@pytest.fixture
def h5py() -> Any:
    return pytest.importorskip("h5py")


def test_an_hdf5_file_is_one_video_or_has_those_of_all(tmp_path: Path, h5py: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/feats"], file["names"] = ROWS, np.array([b"x"])
    assert torch.equal(read_features(tmp_path / "a.h5", 4, (3, 9)), torch.from_numpy(ROWS[3:9].T))
    with h5py.File(tmp_path / "all.hdf5", "w") as file:
        file["v_a"], file["v_b/c3d_features"] = ROWS, ROWS.T[None]
        file.create_dataset("v_c/x", data=ROWS, compression="gzip")
        file["v_c/y"] = ROWS
    where, reader = tmp_path / "all.hdf5", FeatureReader(4)
    items, problems = find_items(truth("a", "b"), "training", where, reader, pattern="v_{video}.npy")
    assert [item.steps for item in items] == [12, 12] and [p.kind for p in problems] == ["axes"]
    clips = make_clips(items, WINDOW, reader)
    for index in (0, 2):
        shown = clips.sample(index, torch.Generator())["inputs"]
        assert torch.equal(shown, torch.from_numpy(ROWS[:8].T))
    assert len(clips.digests) == 5
    with pytest.raises(TensorkeepError, match=r"v_c: holds 2 arrays \('x', 'y'\)"):
        find_items(truth("c"), "training", where, reader, pattern="v_{video}")
    keyed = FeatureReader(4, key="y")
    assert len(find_items(truth("c"), "training", where, keyed, pattern="v_{video}")[0]) == 1
    with pytest.raises(TensorkeepError, match=r"d: no v_d in all\.hdf5, which has v_a, v_b, v_c"):
        find_items(truth("d"), "training", where, reader, pattern="v_{video}")


def test_an_hdf5_file_leads_nowhere_else(tmp_path: Path, h5py: Any) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["feats"] = ROWS
    ROWS.tofile(tmp_path / "raw")
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/feats")
        file.create_dataset("raw", ROWS.shape, "f4", external=[(str(tmp_path / "raw"), 0, ROWS.nbytes)])
        layout = h5py.VirtualLayout(ROWS.shape, "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "feats", ROWS.shape)
        file.create_virtual_dataset("virtual", layout)
        os.mkfifo(tmp_path / "pipe")
        file["waits"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/feats")
        file["out"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")
        file["around"] = h5py.SoftLink("/out/feats")
        file["real"], file["alias"] = ROWS, h5py.SoftLink("/real")
        file["turn"], file["none"] = h5py.SoftLink("/turn"), h5py.Empty("f4")
    for name in ("link", "raw", "virtual", "waits", "around"):
        with pytest.raises(TensorkeepError, match="not followed"):
            find_items(truth(name), "training", tmp_path / "all.h5", FeatureReader(4))
    assert torch.equal(read_features(tmp_path / "all.h5" / "alias", 4), torch.from_numpy(ROWS.T))
    for name, said in (("turn", "no turn in"), ("none", "holds no array of numbers")):
        with pytest.raises(TensorkeepError, match=said):
            find_items(truth(name), "training", tmp_path / "all.h5", FeatureReader(4))
    whole = (tmp_path / "secret.h5").read_bytes()
    for body in (whole[:300], whole.replace(b"HEAP", b"HEAT"), whole.replace(b"SNOD", b"SNOB")):
        (tmp_path / "cut.h5").write_bytes(body)
        with pytest.raises(TensorkeepError, match=r"cut\.h5: is no HDF5 file that can be read"):
            read_features(tmp_path / "cut.h5", 4)


def test_without_h5py_such_a_file_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"\x89HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(TensorkeepError, match=r"a\.h5: HDF5 files are read by h5py(.|\n)*pip install h5py"):
        count_features(tmp_path / "a.h5", 4)
