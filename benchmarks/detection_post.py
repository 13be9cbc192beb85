"""How fast is everything after the model, on a result set of THUMOS'14's size?

211 videos x 2,000 detections x 20 classes through soft-NMS (which merges a video's windows) and mean average
precision at five IoUs. Beside it, on the same numbers:

- the evaluator of the public kind: a Python loop over detections with a numpy IoU each (dicts in place of pandas,
  which only makes it faster),
- suppression as a plain Python loop, timed on a few videos and scaled,
- suppression as a compiled C++ loop (where `g++` is there) and as the same loop under numba (where it is importable).

    python -m benchmarks.detection_post [--videos 211] [--detections 2000] [--plain-videos 3]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tensorkeep.detection.data.annotations import Annotations, Video
from tensorkeep.detection.results.evaluation import evaluate
from tensorkeep.detection.results.nms import Detections, Suppression, suppress_videos
from tensorkeep.detection.results.results import DetectionTable

CLASSES, SIGMA, LIMIT = 20, 0.7, 2000
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
CPP = r"""
#include <cmath>
#include <cstdint>
#include <utility>
// one group: the highest score moves to the front, the rest decays; returns the number kept
extern "C" void soft_nms(float* s, float* e, float* p, int64_t* id, const int64_t* sizes, int64_t groups, float sigma) {
  for (int64_t g = 0, base = 0; g < groups; base += sizes[g++]) {
    float *S = s + base, *E = e + base, *P = p + base; int64_t* I = id + base; const int64_t n = sizes[g];
    for (int64_t i = 0; i < n; ++i) {
      int64_t best = i;
      for (int64_t j = i + 1; j < n; ++j) if (P[j] > P[best]) best = j;
      std::swap(S[i], S[best]); std::swap(E[i], E[best]); std::swap(P[i], P[best]); std::swap(I[i], I[best]);
      const float si = S[i], ei = E[i], li = ei - si + 1e-6f;
      for (int64_t j = i + 1; j < n; ++j) {
        const float inter = std::fmax(0.f, std::fmin(ei, E[j]) - std::fmax(si, S[j]));
        const float o = inter / (li + (E[j] - S[j] + 1e-6f) - inter);
        P[j] *= std::exp(-(o * o) / sigma);
      }
    }
  }
}
"""


def make_data(videos: int, detections: int) -> tuple[Annotations, Detections, Any]:
    """Annotated videos and detections, half of them near an annotated segment; video number of each detection."""
    rng = np.random.default_rng(0)
    truth: dict[str, Video] = {}
    parts = []
    for number in range(videos):
        duration = float(rng.uniform(60, 400))
        own = int(rng.integers(4, 28))
        labels = rng.choice(rng.choice(CLASSES, 2, replace=False), own)
        start = rng.uniform(0, duration - 12, own)
        segments = np.stack([start, start + rng.gamma(2, 2.3, own) + 0.3], axis=1)
        names = tuple(f"class{label:02d}" for label in labels)
        truth[f"v{number:04d}"] = Video(f"v{number:04d}", "test", segments, names, duration)
        near = rng.integers(0, own, detections)
        moved = segments[near] + rng.normal(0, 1.5, (detections, 2))
        stray = rng.random(detections) < 0.5
        moved[stray] = np.sort(rng.uniform(0, duration, (int(stray.sum()), 2)), axis=1)
        moved = np.sort(np.clip(moved, 0, duration), axis=1)
        found = np.where(stray, rng.integers(0, CLASSES, detections), labels[near])
        parts.append((moved.astype(np.float32), rng.beta(0.4, 4, detections).astype(np.float32), found))
    everything = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    names = tuple(f"class{label:02d}" for label in range(CLASSES))
    return Annotations(truth, names, "opentad", "benchmark"), everything, np.repeat(np.arange(videos), detections)


def ours(truth: Annotations, found: Detections, videos: Any) -> tuple[float, float, Any]:
    """Seconds of suppression, seconds of evaluation, mAP."""
    begin = time.perf_counter()
    kept, owners = suppress_videos(found, videos, Suppression("gaussian", sigma=SIGMA, limit=LIMIT))
    middle = time.perf_counter()
    table = as_table(truth, kept, owners)
    result = evaluate(truth, table, thresholds=THRESHOLDS, subset="test")
    return middle - begin, time.perf_counter() - middle, result.map


def as_table(truth: Annotations, kept: Detections, owners: Any) -> DetectionTable:
    """The detections as the evaluator reads them."""
    names = tuple(truth.videos)
    return DetectionTable(
        names, truth.classes, owners, kept.labels, kept.segments.astype(np.float64), kept.scores.astype(np.float64)
    )


def public_evaluator(truth: Annotations, table: DetectionTable) -> Any:
    """mAP by a loop over detections with one numpy IoU each, as the ActivityNet evaluator and its copies work."""
    maps = []
    for number, name in enumerate(truth.classes):
        ground = {
            place: video.segments[[label == name for label in video.labels]]
            for place, video in enumerate(truth.videos.values())
            if name in video.labels
        }
        total = sum(map(len, ground.values()))
        if not total:
            continue
        own = np.flatnonzero(table.labels == number)
        own = own[np.argsort(-table.scores[own], kind="stable")]
        hit = np.zeros((len(THRESHOLDS), len(own)))
        taken = {place: np.zeros((len(THRESHOLDS), len(rows)), dtype=bool) for place, rows in ground.items()}
        for rank, index in enumerate(own):
            place = int(table.videos[index])
            if place not in ground:
                continue
            rows, (start, end) = ground[place], table.segments[index]
            shared = np.clip(np.minimum(end, rows[:, 1]) - np.maximum(start, rows[:, 0]), 0, None)
            union = (rows[:, 1] - rows[:, 0]) + (end - start) - shared
            iou = shared / np.clip(union, 1e-8, None)
            order = iou.argsort()[::-1]
            for level, threshold in enumerate(THRESHOLDS):
                for best in order:
                    if iou[best] < threshold:
                        break
                    if not taken[place][level, best]:
                        taken[place][level, best] = True
                        hit[level, rank] = 1
                        break
        maps.append([interpolated(row, total) for row in hit])
    return np.array(maps).mean(axis=0)


def interpolated(hit: Any, total: int) -> float:
    """Area under the interpolated precision-recall curve."""
    true = np.cumsum(hit)
    precision = true / np.arange(1, len(hit) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * hit).sum() / total)


def python_nms(segments: Any, scores: Any) -> list[tuple[int, float]]:
    """Gaussian soft-NMS of one group as a loop over Python numbers."""
    items = [[float(s), float(e), float(p), i] for i, ((s, e), p) in enumerate(zip(segments, scores, strict=True))]
    for turn in range(len(items)):
        best = max(range(turn, len(items)), key=lambda k: items[k][2])
        items[turn], items[best] = items[best], items[turn]
        start, end, _, _ = items[turn]
        length = end - start + 1e-6
        for other in items[turn + 1 :]:
            shared = max(0.0, min(end, other[1]) - max(start, other[0]))
            overlap = shared / (length + (other[1] - other[0] + 1e-6) - shared)
            other[2] *= math.exp(-(overlap * overlap) / SIGMA)
    return [(int(item[3]), item[2]) for item in items]


def time_python_nms(found: Detections, videos: Any, count: int) -> float:
    """Seconds for all videos, scaled from the first `count`."""
    begin = time.perf_counter()
    for video in range(count):
        for label in range(CLASSES):
            own = np.flatnonzero((videos == video) & (found.labels == label))
            python_nms(found.segments[own], found.scores[own])
    return (time.perf_counter() - begin) * (int(videos.max()) + 1) / count


def group(found: Detections, videos: Any) -> tuple[Any, Any]:
    """Detections ordered by (video, class), and the group sizes, for the compiled loops."""
    keys = videos * CLASSES + found.labels
    order = np.argsort(keys, kind="stable")
    return order, np.unique(keys, return_counts=True)[1].astype(np.int64)


def time_cpp_nms(found: Detections, videos: Any) -> tuple[float, Any] | None:
    """Seconds of the C++ loop with grouping and sorting around it, and its scores; None without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "nms.cpp"), Path(folder, "nms.so")
        source.write_text(CPP)
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
        call: Callable[..., None] = ctypes.CDLL(str(library)).soft_nms
        return time_loop(
            found,
            videos,
            lambda *columns: call(
                *(ctypes.c_void_p(c.ctypes.data) for c in columns), len(columns[-1]), ctypes.c_float(SIGMA)
            ),
        )


def time_numba_nms(found: Detections, videos: Any) -> tuple[float, Any] | None:
    """The same loop under numba (compiled before the clock starts); None where numba cannot be imported."""
    if find_spec("numba") is None:
        return None
    import numba

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def loop(s: Any, e: Any, p: Any, index: Any, sizes: Any, sigma: Any) -> None:
        base = 0
        for size in sizes:
            for i in range(base, base + size):
                best = i
                for j in range(i + 1, base + size):
                    if p[j] > p[best]:
                        best = j
                s[i], s[best], e[i], e[best] = s[best], s[i], e[best], e[i]
                p[i], p[best], index[i], index[best] = p[best], p[i], index[best], index[i]
                length = e[i] - s[i] + np.float32(1e-6)
                for j in range(i + 1, base + size):
                    shared = max(np.float32(0), min(e[i], e[j]) - max(s[i], s[j]))
                    o = shared / (length + (e[j] - s[j] + np.float32(1e-6)) - shared)
                    p[j] *= np.exp(-(o * o) / sigma)
            base += size

    few = videos < 1
    time_loop(Detections(*(column[few] for column in found)), videos[few], lambda *c: loop(*c, np.float32(SIGMA)))
    return time_loop(found, videos, lambda *c: loop(*c, np.float32(SIGMA)))


def time_loop(found: Detections, videos: Any, call: Callable[..., None]) -> tuple[float, Any]:
    """Seconds of grouping, the loop and the final sort; kept scores by video, falling."""
    begin = time.perf_counter()
    order, sizes = group(found, videos)
    start, end = (np.ascontiguousarray(found.segments[order, side]) for side in (0, 1))
    scores, index = found.scores[order], order.astype(np.int64)
    call(start, end, scores, index, sizes)
    final = np.lexsort((-scores, videos[index]))
    return time.perf_counter() - begin, scores[final]


def main() -> None:
    """Measure, compare, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=211)
    parser.add_argument("--detections", type=int, default=2000)
    parser.add_argument("--plain-videos", type=int, default=3)
    options = parser.parse_args()
    truth, found, videos = make_data(options.videos, options.detections)
    runs = [ours(truth, found, videos) for _ in range(3)]
    nms, evaluation = min(run[0] for run in runs), min(run[1] for run in runs)
    tracemalloc.start()
    ours(truth, found, videos)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    kept, owners = suppress_videos(found, videos, Suppression("gaussian", sigma=SIGMA, limit=LIMIT))
    begin = time.perf_counter()
    public = public_evaluator(truth, as_table(truth, kept, owners))
    public_seconds = time.perf_counter() - begin
    assert np.allclose(public, runs[0][2], atol=1e-9), "the evaluators disagree"
    figures: dict[str, Any] = {
        "detections": len(found.scores),
        "average mAP": float(runs[0][2].mean()),
        "ours nms s": nms,
        "ours evaluation s": evaluation,
        "ours peak MiB": peak,
        "public evaluator s": public_seconds,
        "evaluation: times faster": public_seconds / evaluation,
        "python nms s (scaled)": time_python_nms(found, videos, min(options.plain_videos, options.videos)),
    }
    for name, measure in (("c++", time_cpp_nms), ("numba", time_numba_nms)):
        measured = measure(found, videos)
        if measured is None:
            figures[f"{name} nms"] = "not measured: g++ is not there" if name == "c++" else "not measured: no numba"
            continue
        again = measure(found, videos)
        seconds = min(measured[0], again[0] if again else measured[0])
        assert np.allclose(measured[1], kept.scores, atol=1e-5), f"{name} keeps other scores"
        figures[f"{name} nms s"] = seconds
        figures[f"nms: ours / {name}"] = nms / seconds
    for name, value in figures.items():
        print(f"{name:28s} {value:.3f}" if isinstance(value, float) else f"{name:28s} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
