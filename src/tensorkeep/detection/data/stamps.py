"""When pictures are shown, where the times that containers and decoders give are not right as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PARTS = 1000  # of a unit of time
_HUGE = 1 << 48  # units of time
_FEW = 0.1  # part of the pictures that may lack their times to get those between their neighbours
_EVEN = 0.5  # frames whose times are off the mean rate by less than this part of a frame are evenly spread


def signed(kind: str, time: int | None) -> int | None:
    """Return a time as it is meant: FFmpeg reads those that begin below 0 in Ogg as more by a power of two."""
    if kind != "ogg" or time is None or time < _HUGE:
        return time
    return time - (1 << (time * 3 // 2).bit_length() - 1)


def rising(
    times: list[int | None], unit: float, rate: float, dts: list[int], restarted: bool
) -> tuple[NDArray[np.int64], float]:
    """Return rising times of pictures, and their unit in seconds (see `_counted_table`)."""
    number = len(times)
    known = [t for t in times if t is not None]
    if 0 < number - len(known) <= _FEW * number:
        times, known = _filled(times)
    if len(known) == number:
        made = np.array(known, dtype=np.int64)
        if restarted:
            steps = np.diff(made)
            usual = int(np.median(steps[steps > 0])) if (steps > 0).any() else max(1, round(1 / rate / unit))
            made = made[0] + np.concatenate([[0], np.cumsum(np.where(steps > 0, steps, usual))])
        if (np.diff(made) > 0).all():
            return made, unit
        if (np.diff(made) >= 0).all() and made[-1] > made[0]:
            return _parted(made), unit / _PARTS
    ordered = np.unique(np.array(dts, dtype=np.int64))
    if len(ordered) == number and not restarted:
        return ordered, unit
    own = np.unique(np.array(known, dtype=np.int64))
    if len(own) == number and not restarted:  # AVI's, of pictures that were reordered
        return own, unit
    return np.arange(number), 1 / rate


def _filled(times: list[int | None]) -> tuple[list[int | None], list[int]]:
    """Return times in which those that lack lie evenly between their neighbours; as they were where none rise then."""
    places = [k for k, time in enumerate(times) if time is not None]
    known = [time for time in times if time is not None]
    made = np.rint(np.interp(np.arange(len(times)), places, known)).astype(np.int64).tolist()
    return (list(made), made) if (np.diff(made) > 0).all() else (times, known)


def _parted(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return times, in units of 1 / `_PARTS`, at which pictures of one time are spread over its unit.

    Matroska counts whole milliseconds, so that the pictures of a burst come at one time.
    """
    starts = np.flatnonzero(np.diff(times, prepend=times[0] - 1))
    counts = np.diff(starts, append=len(times))
    nth = np.arange(len(times)) - np.repeat(starts, counts)
    made: NDArray[np.int64] = times * _PARTS + nth * _PARTS // np.repeat(counts, counts)
    return made


def last_step(pts: NDArray[np.int64], unit: float, rate: float) -> float:
    """Return the seconds of the last frame: those of the others where they are evenly spread, else their median."""
    if len(pts) < 2:
        return 1 / rate
    mean = float(pts[-1] - pts[0]) / (len(pts) - 1)
    even = np.abs(pts - pts[0] - np.arange(len(pts)) * mean).max() <= _EVEN * mean
    return (mean if even else float(np.median(np.diff(pts)))) * unit
