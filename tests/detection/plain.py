"""The rules written out as loops over Python numbers: slow, plain, and independent of the package."""

from __future__ import annotations

import numpy as np

F = np.float32


def iou(a, b, floor=1e-8):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / max((a[1] - a[0]) + (b[1] - b[0]) - shared, floor)


def soft_nms(segments, scores, method, sigma, threshold, t1, t2, min_score):
    """(index, score) in the order taken; swaps and drops as the C loops do."""
    items = [[F(s), F(e), F(F(e) - F(s) + F(1e-6)), F(p), i] for i, ((s, e), p) in enumerate(zip(segments, scores))]
    turn = 0
    while turn < len(items):
        best = max(range(turn, len(items)), key=lambda k: (items[k][3], -k))
        items[turn], items[best] = items[best], items[turn]
        start, end, length, _, _ = items[turn]
        place = turn + 1
        while place < len(items):
            other = items[place]
            shared = max(F(0), F(min(end, other[1]) - max(start, other[0])))
            overlap = F(shared / F(F(length + other[2]) - shared))
            weight = F(1)
            if method == "hard" and overlap >= F(threshold):
                weight = F(0)
            if method == "linear" and overlap >= F(threshold):
                weight = F(F(1) - overlap)
            if method == "gaussian" or (method == "adaptive" and overlap >= F(t1) + F(t2) * length):
                weight = np.exp(-F(overlap * overlap) / F(sigma))
            other[3] = F(other[3] * weight)
            if other[3] < F(min_score):
                items[place] = items[-1]
                items.pop()
            else:
                place += 1
        turn += 1
    return [(item[4], item[3]) for item in items]


def greedy_nms(segments, scores, threshold, min_score):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    left = [i for i in order if min_score <= 0 or scores[i] > F(min_score)]
    kept = []
    while left:
        head, left = left[0], left[1:]
        kept.append((head, scores[head]))
        s, e = segments[head]
        length = F(e - s + F(1e-6))

        def near(i, s=s, e=e, length=length):
            shared = max(F(0), F(min(e, segments[i][1]) - max(s, segments[i][0])))
            return F(shared / F(F(length + F(segments[i][1] - segments[i][0] + F(1e-6))) - shared)) >= F(threshold)

        left = [i for i in left if not near(i)]
    return kept


def average_precision(truth, found, threshold):
    """ActivityNet: truth {video: [segment]}, found [(video, segment, score)]; detections choose; interpolated."""
    taken, hits = set(), []
    for video, segment, _ in sorted(found, key=lambda row: -row[2]):
        options = [(iou(segment, other), k) for k, other in enumerate(truth.get(video, [])) if (video, k) not in taken]
        best = max(options, default=(0.0, -1))
        hits.append(best[0] >= threshold)
        if hits[-1]:
            taken.add((video, best[1]))
    total = sum(map(len, truth.values()))
    points = [(sum(hits[: i + 1]) / total, sum(hits[: i + 1]) / (i + 1)) for i in range(len(hits))]
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[i:])
        before = recall
    return area


def kit_precision(truth, found, ambiguous, threshold):
    """THUMOS'14 kit: annotated segments choose, strictly above, `ambiguous` forgives; not interpolated."""
    flags = []
    for video in sorted({row[0] for row in found}):
        own = sorted((row for row in found if row[0] == video), key=lambda row: -row[2])
        free = [True] * len(own)
        for segment in truth.get(video, []):
            options = [(iou(segment, row[1]), -k) for k, row in enumerate(own) if free[k]]
            best = max(options, default=(0.0, 0))
            if best[0] > threshold:
                free[-best[1]] = False
        for k, row in enumerate(own):
            touched = any(iou(row[1], other) > 0 for other in ambiguous.get(video, []))
            if not free[k] or not touched:
                flags.append((row[2], not free[k]))
    flags.sort(key=lambda flag: -flag[0])
    total, true, area = sum(map(len, truth.values())), 0, 0.0
    for place, (_, hit) in enumerate(flags, 1):
        true += hit
        area += true / place if hit else 0.0
    return area / total
