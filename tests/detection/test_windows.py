import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.detection.data.windows import (
    clip_to_window,
    count_snippets,
    make_window,
    place_windows,
    resized_frames,
    resized_segments,
    segment_frames,
)
from tensorkeep.errors import TensorkeepError


@given(st.integers(1, 500), st.integers(1, 100), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75]))
def test_every_snippet_is_in_a_window_and_no_window_comes_twice(snippets, size, overlap):
    if int(size * (1 - overlap)) < 1:
        return
    windows = place_windows(snippets, size, overlap)
    covered = np.zeros(snippets, dtype=bool)
    for first, stop in windows:
        assert 0 <= first < stop <= snippets and stop - first == min(size, snippets)
        covered[first:stop] = True
    assert covered.all() and len(set(windows)) == len(windows)


@given(st.integers(1, 500), st.integers(2, 100), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_the_original_has_no_other_windows(snippets, size, overlap):
    step = int(size * (1 - overlap))
    if step < 1:
        return
    original = set()
    for number in range(max(1, snippets // step)):
        start = number * step
        if start + size > snippets:
            original.add((max(0, snippets - size), snippets))
            break
        original.add((start, start + size))
    ours = set(place_windows(snippets, size, overlap))
    assert original <= ours and all(stop == snippets for _, stop in ours - original)


def test_a_short_video_is_padded_with_its_last_frame_and_masked():
    window = make_window((0, 3), 10, size=5, snippet_stride=4)
    assert window.frames.tolist() == [0, 4, 8, 8, 8] and window.mask.tolist() == [True] * 3 + [False] * 2
    assert (window.first, window.last, window.start_frame) == (0, 2, 0)


def test_several_frames_a_snippet_stay_within_the_video():
    window = make_window((1, 3), 10, size=2, snippet_stride=4, scale=2)
    assert window.frames.tolist() == [4, 6, 8, 8]
    with pytest.raises(TensorkeepError, match="no multiple"):
        make_window((0, 1), 10, size=1, snippet_stride=4, scale=3)


def test_segments_mostly_outside_a_window_are_left_out_and_others_cut():
    window = make_window((10, 20), 400, size=10, snippet_stride=4)  # frames 40 to 76
    segments = np.array([[40.0, 60.0], [30.0, 60.0], [36.0, 60.0], [90.0, 99.0], [50.0, 50.0]])
    inside, kept = clip_to_window(segments, window, snippet_stride=4)
    assert kept.tolist() == [0, 2] and inside.tolist() == [[0, 5], [0, 5]]


def test_seconds_become_whole_frames_by_dropping_the_rest():
    assert segment_frames(np.array([[0.99, 2.5]]), duration=10, frames=300).tolist() == [[29, 75]]


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 4))
def test_resized_frames_rise_evenly_within_the_video(frames, length, scale):
    got = resized_frames(frames, length, scale)
    assert len(got) == length * scale and got[0] >= 0 and got[-1] < frames and (np.diff(got) >= 0).all()
    assert np.ptp(np.diff(got)) <= 1 if len(got) > 1 else True


def test_resized_segments_are_clipped_to_the_grid():
    assert resized_segments(np.array([[-1.0, 5.0], [5.0, 20.0]]), duration=10, length=8).tolist() == [[0, 4], [4, 8]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: place_windows(0, 4, 0.5),
        lambda: place_windows(9, 4, 1.0),
        lambda: place_windows(9, 1, 0.5),
        lambda: count_snippets(0, 4),
        lambda: resized_frames(0, 4),
        lambda: segment_frames(np.zeros((1, 2)), duration=0, frames=4),
        lambda: resized_segments(np.zeros((1, 2)), duration=0, length=4),
    ],
)
def test_impossible_windows_are_refused(call):
    with pytest.raises(TensorkeepError):
        call()
