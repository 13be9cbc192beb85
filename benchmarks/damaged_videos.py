"""Are healthy videos read whole and not blamed, and damaged ones not believed?

Healthy ones are those of `benchmarks.healthy_videos`. Each is decoded by PyAV straight through, which says how many
pictures it has, what they show and when; ours has to give the same and say nothing. Damaged ones are made of a sample
of them, in twenty ways: cut, overwritten by noise or zeros, bytes flipped, packets taken out, joined. Where pictures of
the healthy file do not come out, or others do, something has to be said: at the start, or when pictures are read.

    python -m benchmarks.damaged_videos FOLDER [--damaged] [--every 4] [--only NAME] [--part 0/2] [--verbose]

Files are made in FOLDER and stay there. Silent ones are counted by what is wrong with what is read in silence: only the
end or the start lacks, pictures come at wrong times, or pictures are wrong. Needs `ffmpeg` beside PyAV.
"""

from __future__ import annotations

import argparse
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from benchmarks.healthy_videos import make_all
from tensorkeep.detection.data.containers import frame_table, probe, shown_times
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

SMALL = (32, 16)  # width and height of what is compared of a picture
ALIKE = 6.0  # of 255: the mean difference of two of one picture
LATE = 0.021  # seconds
_COVER = 1024


class Played(NamedTuple):
    """What comes out of a file: when, and small pictures [N, H, W, 3]; what was said of it."""

    seconds: NDArray[np.float64]
    pictures: NDArray[np.int16]
    said: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def played(path: Path) -> Played | None:
    """Decode a file as players do, errors passed over; None where nothing comes out."""
    seconds, shown = [], []
    try:
        with av.open(str(path), format="mjpeg" if path.suffix in (".mjpeg", ".mjpg") else None) as container:
            streams = [s for s in container.streams.video if not s.disposition & _COVER]
            stream = streams[0]
            stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
            packets = iter(container.demux(stream))
            while True:
                try:
                    packet = next(packets)
                except (StopIteration, IndexError, av.error.FFmpegError):
                    break
                if not packet.size and packet.dts is not None:
                    continue
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    continue
                for frame in frames:
                    turn = round(frame.rotation / 90) % 4
                    size = SMALL[::-1] if turn % 2 else SMALL
                    pixels = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
                    shown.append(np.rot90(pixels, turn).astype(np.int16))
                    seconds.append(np.nan if frame.pts is None else float(frame.pts * stream.time_base))
    except (av.error.FFmpegError, IndexError):
        pass
    return Played(np.array(seconds), np.stack(shown)) if shown else None


def ours(path: Path) -> Played:
    """Read a file as training with `broken: keep` does, and note what is said."""
    none = Played(np.zeros(0), np.zeros((0, SMALL[1], SMALL[0], 3), np.int16))
    try:
        info, shown = probe(path), frame_table(path)
        times = shown_times(shown, info)
        times = np.arange(info.frames) / info.fps if times is None else times[:-1]
        said = [f"start: {info.problem}"] if info.problem else []
        problems: list[Problem] = []
        made = decode(path, np.arange(info.frames), size=SMALL[::-1], broken="keep", problems=problems)
    except TensorkeepError as error:
        return none._replace(said=(f"refused: {error.line}",))
    except Exception as error:  # noqa: BLE001 - a traceback is what is counted here
        return none._replace(said=(f"TRACEBACK: {error!r}",))
    said += [f"pictures: {p.message}" for p in problems if p.kind == "damaged video"]
    return Played(times, made.permute(0, 2, 3, 1).numpy().astype(np.int16), tuple(said), info.notes)


def single(path: Path, pictures: NDArray[np.int16]) -> bool:
    """Return whether some frames that are asked for alone are those of reading the whole file."""
    for index in {0, len(pictures) // 3, len(pictures) // 2, len(pictures) - 1}:
        alone = decode(path, [index], size=SMALL[::-1], broken="keep")[0].permute(1, 2, 0).numpy().astype(np.int16)
        if np.abs(alone - pictures[index]).mean() > ALIKE:
            return False
    return True


def judge_healthy(path: Path) -> tuple[list[str], Played]:
    """Return what is wrong with how a healthy file is read."""
    right, made = played(path), ours(path)
    if right is None:
        return ["plays nothing"], made
    if any(each.startswith("TRACEBACK") for each in made.said):
        return ["traceback"], made
    if any(each.startswith("refused") for each in made.said):
        return ["refused"], made
    found = ["blamed"] * bool(made.said)
    if len(made.pictures) != len(right.pictures):
        return [*found, f"frames {len(made.pictures)} of {len(right.pictures)}"], made
    seconds = right.seconds - right.seconds[0]
    rising = len(seconds) < 2 or bool((np.diff(seconds) > 0).all())
    if rising and np.abs(seconds - made.seconds).max() > LATE:
        found.append(f"times {np.abs(seconds - made.seconds).max():.3f}")
    if np.abs(made.pictures - right.pictures).mean((1, 2, 3)).max() > ALIKE:
        found.append("pictures")
    if not single(path, made.pictures):
        found.append("single pictures")
    return found, made


def judge_damaged(path: Path, right: Played, *, twice: bool) -> tuple[str, Played]:
    """Return whether a damaged file is `told`, `harmless` or what is wrong in silence; `right` is what it was."""
    made = ours(path)
    if any(each.startswith("TRACEBACK") for each in made.said):
        return "traceback", made
    if made.said or made.notes:
        return "told", made
    distance = np.stack([np.abs(right.pictures - one).mean((1, 2, 3)) for one in made.pictures])
    nearest = distance.argmin(1)
    wrong = distance.min(1) > ALIKE
    if wrong.any():
        return "pictures", made
    times = right.seconds[nearest] - right.seconds[0]
    usual = float(np.median(np.diff(right.seconds)))
    late = (made.seconds - made.seconds[0]) - (times - times[0])
    if twice:  # a second file behind: read, or told
        return ("end" if len(made.pictures) < 2 * len(right.pictures) else "harmless"), made
    if np.abs(late).max() > 0.6 * usual:
        return "times", made
    return ("end" if len(set(nearest.tolist())) < len(right.pictures) else "harmless"), made


def noise(number: int, seed: int) -> bytes:
    """Return bytes of no meaning, none of them 0."""
    return np.random.default_rng(seed).integers(1, 255, number, dtype=np.uint8).tobytes()


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    """Give a file's bytes damaged in twenty ways, each with its name."""
    data, seed = path.read_bytes(), zlib.crc32(path.name.encode())
    length = len(data)

    def over(start: float, end: float, fill: bytes | None = None) -> bytes:
        a, b = int(length * start), int(length * end)
        return data[:a] + (noise(b - a, seed) if fill is None else fill * (b - a)) + data[b:]

    yield "cut at 55 %", data[: length * 55 // 100]
    yield "cut at 83 %", data[: length * 83 // 100]
    yield "last byte cut", data[:-1]
    yield "40 bytes cut", data[:-40]
    yield "8 % noise", over(0.45, 0.53)
    yield "3 % noise", over(0.3, 0.33)
    yield "8 % zeros", over(0.6, 0.68, b"\0")
    yield "10 % gone", over(0.4, 0.5, b"")
    for number in (30, 3):
        rng, flipped = np.random.default_rng(seed + number), bytearray(data)
        for place in rng.integers(int(length * 0.3), int(length * 0.7), number):
            flipped[place] ^= int(rng.integers(1, 256))
        yield f"{number} bytes flipped", bytes(flipped)
    yield from _packets_damaged(path, data, seed)
    yield "joined", data + data
    yield "noise behind", data + noise(length // 20, seed)


def _packets_damaged(path: Path, data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Give those of `damages` that know where packets lie."""
    with av.open(str(path), format="mjpeg" if path.suffix in (".mjpeg", ".mjpg") else None) as container:
        streams = [s for s in container.streams.video if not s.disposition & _COVER]
        rows = [(p.pos, p.size, p.is_keyframe) for p in container.demux(streams[0]) if p.size and (p.pos or -1) >= 0]
    if len(rows) < 9:
        return
    yield "cut between pictures", data[: rows[len(rows) * 6 // 10][0]]
    yield "last picture cut", data[: rows[-1][0]]
    place, size, _ = rows[len(rows) // 2 + 1]
    behind = rows[len(rows) // 2 + 2][0]
    if size > 30:
        yield "picture noise", data[: place + 12] + noise(size - 12, seed) + data[place + size :]
        yield "picture zeros", data[: place + 12] + bytes(size - 12) + data[place + size :]
    if behind > place:
        yield "picture gone", data[:place] + data[behind:]
    keys = [place for place, _, key in rows if key]
    if 4 < len(keys) < len(rows) / 2:
        start, end = keys[2:4]
        yield "group noise", data[:start] + noise(end - start, seed) + data[end:]
        yield "group zeros", data[:start] + bytes(end - start) + data[end:]
        yield "group gone", data[:start] + data[end:]


def report(title: str, counts: dict[str, Counter[str]]) -> None:
    """Print a table: a line for each kind, a column for each outcome."""
    columns = sorted({name for row in counts.values() for name in row}, key=lambda name: (name != "right", name))
    print(f"\n| {title} | files | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for kind, row in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        print(f"| {kind} | {row.total()} | {' | '.join(str(row[name]) for name in columns)} |")


def main() -> None:
    """Judge all files and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--damaged", action="store_true")
    parser.add_argument("--every", type=int, default=4, help="of the healthy files that are damaged one in so many")
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--verbose", action="store_true")
    told = parser.parse_args()
    av.logging.set_level(None)
    make_all(told.folder / "healthy")
    paths = [p for p in sorted((told.folder / "healthy").glob("*/*")) if told.only in f"{p.parent.name}/{p.name}"]
    paths = [p for p in paths if _sampled(p)][:: told.every] if told.damaged else paths
    nth, parts = map(int, told.part.split("/"))
    counts: dict[str, Counter[str]] = {}
    ways: dict[str, Counter[str]] = {}
    for path in paths[nth::parts]:
        kind = path.parent.name.replace("_", " ")
        if not told.damaged:
            found, made = judge_healthy(path)
            counts.setdefault(kind, Counter())[(found or ["right"])[0].split()[0]] += 1
            if found or told.verbose:
                print(f"{kind}/{path.name}: {', '.join(found)} | {made.said[:3]} {made.notes}", flush=True)
            continue
        right = played(path)
        if right is None or len(right.pictures) < 9:
            continue
        if np.isnan(right.seconds).any():  # bare pictures
            right = right._replace(seconds=ours(path).seconds)
        for way, data in damages(path):
            bad = told.folder / f"damaged-{nth}{path.suffix}"
            bad.write_bytes(data)
            outcome, made = judge_damaged(bad, right, twice=way == "joined")
            counts.setdefault(kind, Counter())[outcome] += 1
            ways.setdefault(way, Counter())[outcome] += 1
            if outcome not in ("told", "harmless") or told.verbose:
                print(f"{kind}/{path.name}, {way}: {outcome} | {made.said[:2]} {made.notes}", flush=True)
            bad.unlink()
    report("kind", counts)
    if told.damaged:
        report("damage", ways)


def _sampled(path: Path) -> bool:
    """Return whether a healthy file may be damaged: most are as coded, and no two of their pictures are alike."""
    left = ("cut.", "from", "any", "edit", "nocues", "unknown", "dropped", "later", "black", "fps", "lapse")
    return not path.name.startswith(left) and "stops" not in path.name


if __name__ == "__main__":
    main()
