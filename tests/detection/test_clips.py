import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("av")

from tensorkeep.detection.data.annotations import parse_annotations, read_annotations
from tensorkeep.detection.data.augment import AugmentConfig
from tensorkeep.detection.data.batches import collate
from tensorkeep.detection.data.clips import draw_truncation, make_clips
from tensorkeep.detection.data.features import count_features, read_features
from tensorkeep.detection.data.items import find_items
from tensorkeep.detection.data.readers import FeatureReader, VideoReader, WindowConfig
from tensorkeep.detection.data.synthetic import SyntheticConfig, make_dataset
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

from .tiny import detector

SET = SyntheticConfig(seconds=(6.0, 9.0), actions=(2, 4), action_seconds=(1.0, 2.0), size=32, fps=8)
PLAIN = VideoReader(size=32)
VARIED = VideoReader(size=32, augment=AugmentConfig(size=32, short_side=32))
TRAIN = WindowConfig(window_size=16, feature_stride=2)
TEST = replace(TRAIN, method="sliding", window_overlap_ratio=0.25)


def key(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: dict, other: dict) -> bool:
    tensors = all(torch.equal(one[name], other[name]) for name in ("inputs", "mask", "segments", "labels"))
    return tensors and one["meta"] == other["meta"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "set"
    make_dataset(folder, videos=3, held_out=1, seed=1, config=SET)
    return folder, read_annotations(folder / "annotations.json")


def clips(dataset, window=TRAIN, reader=PLAIN, subset="training"):
    items, problems = find_items(dataset[1], subset, dataset[0] / "videos", reader, sorted(SET.classes))
    assert problems == []
    return make_clips(items, window, reader)


@pytest.mark.parametrize("window", [TRAIN, TEST, replace(TRAIN, method="resize"), replace(TRAIN, scale_factor=2)])
def test_a_sample_is_a_pure_function_of_index_and_key_in_any_process(dataset, window):
    data = clips(dataset, window, VARIED)
    other = pickle.loads(pickle.dumps(data))
    for index in (len(data) - 1, 0, 1):
        sample = data.sample(index, key(index))
        assert same(sample, other.sample(index, key(index)))
        assert not torch.equal(sample["inputs"], data.sample(index, key(index + 7))["inputs"])


def test_sliding_windows_cover_every_snippet_and_tell_where_they_are(dataset):
    data = clips(dataset, TEST)
    seen: dict[str, set] = {item.name: set() for item in data.items}
    for index in range(len(data)):
        sample = data.sample(index, key())
        meta, mask = sample["meta"], sample["mask"]
        steps = range(meta["window_start_frame"], meta["window_start_frame"] + 2 * int(mask.sum()), 2)
        seen[meta["video"]] |= set(steps)
        item = next(item for item in data.items if item.name == meta["video"])
        shown = [min(frame, (item.frames - 1) // 2 * 2) for frame in steps]
        assert torch.equal(sample["inputs"].transpose(0, 1)[: len(shown)], decode(item.path, shown, size=32))
    for item in data.items:
        assert seen[item.name] == set(range(0, item.frames, 2))


def test_segments_lie_where_the_annotation_puts_them(dataset):
    data = clips(dataset, TEST)
    for index in range(len(data)):
        sample = data.sample(index, key())
        meta = sample["meta"]
        item = next(item for item in data.items if item.name == meta["video"])
        for (start, end), label in zip(sample["segments"].tolist(), sample["labels"].tolist()):
            seconds = [(step * 2 + meta["window_start_frame"]) / meta["fps"] for step in (start, end)]
            near = np.abs(item.segments - seconds).min(axis=0)  # an end may be cut at the window's
            assert label in item.labels and near.min() < 0.13 and 0 <= start < end <= 16


def test_a_short_video_is_padded_with_its_last_frame_and_masked(dataset):
    data = clips(dataset, replace(TEST, window_size=64))
    assert len(data) == len(data.items)
    sample = data.sample(0, key())
    steps = -(-data.items[0].frames // 2)
    assert sample["mask"].tolist() == [True] * steps + [False] * (64 - steps)
    frames = sample["inputs"].transpose(0, 1)
    assert torch.equal(frames[steps:], frames[steps - 1 : steps].expand(64 - steps, -1, -1, -1))


@given(
    st.integers(1, 200),
    st.integers(1, 64),
    st.lists(st.tuples(st.floats(0, 190), st.floats(0, 30)), max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([None, (0.9, 1.0), (0.3, 0.5)]),
)
@settings(deadline=None)
def test_a_random_window_lies_in_the_video_and_on_a_segment_where_it_can(steps, size, pairs, seed, ratio):
    segments = np.array([[a, a + b] for a, b in pairs]).reshape(-1, 2)
    config = WindowConfig(window_size=size, crop_ratio=ratio)
    first, stop = draw_truncation(steps, segments, config, key(seed))
    assert 0 <= first < stop <= steps
    if steps > size:
        assert stop - first == size
    elif ratio is None:
        assert (first, stop) == (0, steps)
    else:
        assert max(1, round(ratio[0] * steps)) <= stop - first <= max(1, round(ratio[1] * steps))
    whole = [(a, b) for a, b in segments if b > a and a >= 0 and b <= steps]
    if steps > size and any(b - a > 1.4 * size for a, b in whole):  # no such segment fits by three quarters
        return
    if steps > size and any(size / 2 < b - a <= size for a, b in whole) and steps < 2 * size:
        cut = np.clip(segments, first, stop)
        length = np.maximum(segments[:, 1] - segments[:, 0], 1e-9)
        assert ((cut[:, 1] - cut[:, 0]) / length >= 0.75).any()


def test_the_whole_video_is_resized_to_the_grid(dataset):
    data = clips(dataset, replace(TRAIN, method="resize", window_size=24))
    sample, item = data.sample(0, key()), data.items[0]
    assert sample["inputs"].shape == (3, 24, 32, 32) and sample["mask"].all()
    expected = item.segments / item.duration * 24
    assert np.allclose(sample["segments"].numpy(), expected, atol=1e-4)


def test_a_batch_goes_through_a_detector(dataset):
    data = clips(dataset, replace(TRAIN, window_size=8), VARIED)
    batch = collate([data.sample(index, key(index)) for index in range(2)])
    assert batch["inputs"].shape == (2, 3, 8, 32, 32) and batch["inputs"].dtype == torch.uint8
    model = detector()
    predictions = model(batch["inputs"], batch["masks"])
    labels = [row.clamp(max=2) for row in batch["labels"]]
    loss = model.loss(predictions, batch["segments"], labels)
    assert torch.isfinite(loss.cost)
    assert [meta["video"] for meta in batch["meta"]] == ["training_0000", "training_0001"]


def test_the_fingerprint_follows_the_data_and_not_its_place(dataset, tmp_path):
    base = clips(dataset).fingerprint()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (dataset[0] / "videos").iterdir():
        os.link(path, moved / path.name)
    items, _ = find_items(dataset[1], "training", moved, PLAIN, sorted(SET.classes))
    assert make_clips(items, TRAIN, PLAIN).fingerprint() == base
    assert make_clips(items, TRAIN, replace(PLAIN, threads=0)).fingerprint() == base
    changed = [items[0]._replace(segments=items[0].segments + 0.01), *items[1:]]
    prints = {
        make_clips(changed, TRAIN, PLAIN).fingerprint(),
        make_clips(items[1:], TRAIN, PLAIN).fingerprint(),
        make_clips(items, replace(TRAIN, feature_stride=4), PLAIN).fingerprint(),
        make_clips(items, TRAIN, VARIED).fingerprint(),
        base,
    }
    assert len(prints) == 5


def test_missing_and_broken_files_are_named_or_left_out_by_choice(dataset, tmp_path):
    for path in sorted((dataset[0] / "videos").iterdir())[1:2]:
        os.link(path, tmp_path / path.name)
    (tmp_path / "training_0002.mp4").write_bytes(b"broken")
    arguments = (dataset[1], "training", tmp_path)
    with pytest.raises(TensorkeepError, match=r"training_0000: no .*training_0002.*cannot be read as a video"):
        find_items(*arguments, PLAIN, sorted(SET.classes))
    items, problems = find_items(*arguments, replace(PLAIN, broken="skip"), sorted(SET.classes))
    assert [item.name for item in items] == ["training_0001"]
    assert [(p.video, p.kind) for p in problems] == [
        ("training_0000", "no file"),
        ("training_0002", "unreadable video"),
    ]


def test_a_file_that_breaks_later_stops_the_reading_or_counts_for_nothing(dataset, tmp_path):
    path = tmp_path / "training_0000.mp4"
    path.write_bytes((dataset[0] / "videos" / path.name).read_bytes())
    annotations = replace(dataset[1], videos={"training_0000": dataset[1].videos["training_0000"]})
    items, _ = find_items(annotations, "training", tmp_path, PLAIN, sorted(SET.classes))
    path.write_bytes(b"broken")
    with pytest.raises(TensorkeepError, match=r"training_0000\.mp4"):
        make_clips(items, TRAIN, PLAIN).sample(0, key())
    sample = make_clips(items, TRAIN, replace(PLAIN, broken="skip")).sample(0, key())
    assert not sample["mask"].any() and not sample["inputs"].any() and len(sample["segments"]) == 0
    assert "training_0000.mp4" in sample["meta"]["problems"][0]


FEATURES = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


@pytest.fixture
def features(tmp_path):
    np.save(tmp_path / "a.npy", FEATURES)
    torch.save(torch.from_numpy(FEATURES[:10]), tmp_path / "b.pt")
    rows = [{"segment": [2.0, 8.0], "label": "x"}]
    video = {"subset": "training", "duration": 20.0, "frame": 500, "annotations": rows}
    document = {"database": {"a": video, "b": {**video, "duration": 10.0, "frame": 130}}}
    return tmp_path, parse_annotations(json.loads(json.dumps(document)))


def test_features_are_windows_of_their_rows(features):
    reader = FeatureReader(6)
    items, problems = find_items(features[1], "training", features[0], reader)
    assert problems == [] and [item.steps for item in items] == [40, 10]
    window = WindowConfig("sliding", 16, feature_stride=12, offset_frames=8, window_overlap_ratio=0.5)
    data = make_clips(items, window, reader)
    batch = collate([data.sample(index, key()) for index in range(len(data))])
    assert batch["inputs"].shape == (5, 6, 16) and len(data) == 5
    assert torch.equal(batch["inputs"][1], torch.from_numpy(FEATURES[8:24].T))
    assert torch.equal(batch["inputs"][4, :, :10], torch.from_numpy(FEATURES[:10].T))
    assert not batch["inputs"][4, :, 10:].any() and batch["masks"][4].sum() == 10
    # 2 s to 8 s of 25 frames a second: frames 50 to 200, less half a clip, in strides of 12; three quarters are needed
    assert batch["segments"][0].tolist() == [[pytest.approx(42 / 12), pytest.approx((180 - 8) / 12)]]
    resized = make_clips(items, replace(window, method="resize"), reader).sample(0, key())
    assert resized["inputs"].shape == (6, 16) and resized["segments"].tolist() == [
        [pytest.approx(1.6), pytest.approx(6.4)]
    ]


def test_both_kinds_of_feature_files_give_the_same_numbers(tmp_path):
    np.save(tmp_path / "a.npy", FEATURES.astype(np.float64))
    torch.save({"feats": torch.from_numpy(FEATURES)}, tmp_path / "a.pt")
    np.save(tmp_path / "turned.npy", FEATURES.T)
    for name, turned in (("a.npy", False), ("a.pt", False), ("turned.npy", True)):
        got = read_features(tmp_path / name, 6, (3, 9), channels_first=turned)
        assert torch.equal(got, torch.from_numpy(FEATURES[3:9].T)) and got.is_contiguous()
        assert count_features(tmp_path / name, 6, channels_first=turned) == 40


def test_no_feature_file_runs_code_or_lies_about_its_size(tmp_path):
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))

    np.save(tmp_path / "pickle.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"feats": Hostile()}))
    np.save(tmp_path / "cut.npy", FEATURES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-40])
    np.save(tmp_path / "flat.npy", FEATURES[0])
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "wide.npy", FEATURES[:, :5])
    torch.save({"a": torch.zeros(4, 6), "b": torch.zeros(4, 6)}, tmp_path / "two.pt")
    for name in ("pickle.npy", "pickle.pt", "cut.npy", "flat.npy", "text.npy", "wide.npy", "two.pt", "absent.npy"):
        for call in (count_features, read_features):
            with pytest.raises(TensorkeepError, match=name.replace(".", r"\.")):
                call(tmp_path / name, 6)
    assert not ran.exists()
