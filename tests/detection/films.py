"""Small video files made on the spot: with sound, late starts, uneven times, cut out by copying packets, damaged."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def picture(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """A picture of six bright or dark columns that are the bits of its number, above a texture that moves."""
    width, height = size
    texture = np.random.default_rng(0).integers(60, 200, (height // 4, width // 4, 3)).astype(np.uint8)
    pixels = np.roll(np.kron(texture, np.ones((4, 4, 1), np.uint8)), number, 1)
    for bit in range(6):
        pixels[: height // 2, bit * width // 6 : (bit + 1) * width // 6] = 240 if number >> bit & 1 else 15
    return pixels


def number_of(pixels: Any) -> int:
    """The number that a picture [3, H, W] shows."""
    top = np.asarray(pixels)[:, : pixels.shape[1] // 2].astype(float)
    width = top.shape[2]
    means = [top[:, 2:-2, bit * width // 6 + 2 : (bit + 1) * width // 6 - 2].mean() for bit in range(6)]
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 128)


def film(
    path: Path,
    frames: int = 40,
    rate: int = 20,
    codec: str = "mpeg4",
    *,
    sound: float = 0.0,
    start: float = 0.0,
    times: Any = None,
    unit: Fraction = Fraction(1, 1000),
    gop: int = 12,
    b_frames: int = 2,
    form: str | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    **options: str,
) -> Path:
    """Write `frames` numbered pictures and `sound` seconds of sound, all `start` seconds late; `times` in `unit`."""
    with av.open(str(path), "w", format=form, options=options) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        context = stream.codec_context
        context.gop_size, context.thread_count = gop, 1
        context.max_b_frames = b_frames
        if codec == "libx264":
            context.options = {"preset": "veryfast", "x264-params": "log-level=none"}
        unit = Fraction(1, rate) if times is None else unit
        context.time_base = unit
        kind = "libmp3lame" if path.suffix == ".flv" else "mp2"
        heard = out.add_stream(kind, rate=44100, layout="mono") if sound else None

        def put(packets: Any) -> None:
            for packet in packets:
                late = round(start / packet.time_base) if packet.time_base else 0
                packet.pts = None if packet.pts is None else packet.pts + late
                packet.dts = None if packet.dts is None else packet.dts + late
                out.mux(packet)

        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size), "rgb24")
            frame.pts, frame.time_base = number if times is None else int(times[number]), unit
            put(stream.encode(frame))
        put(stream.encode(None))
        if heard is not None:
            for at in range(0, int(sound * 44100), 1152):
                form = heard.codec_context.format.name
                silent = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1152), np.int32 if form == "s32p" else np.int16), form, "mono"
                )
                silent.sample_rate, silent.pts, silent.time_base = 44100, at, Fraction(1, 44100)
                put(heard.encode(silent))
            put(heard.encode(None))
    return path


def copied(source: Path, path: Path, first: float, last: float) -> Path:
    """The packets of `source` from the keyframe before `first` seconds to `last`, timed from `first`, as cutters do."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as out:
        kept = {stream.index: out.add_stream_from_template(stream) for stream in whole.streams}
        whole.seek(int(first * 1_000_000), backward=True)
        for packet in whole.demux():
            if packet.dts is None or packet.dts * packet.time_base > last:
                continue
            by = round(first / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - by, packet.dts - by, kept[packet.stream.index]
            out.mux(packet)
    return path


def without_start(source: Path, path: Path, packets: int) -> Path:
    """A copy that lacks the first packets: pictures up to the next keyframe cannot be decoded."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if packet.dts is not None and number >= packets:
                packet.stream = stream
                out.mux(packet)
    return path


def torn(source: Path, path: Path, group: int) -> Path:
    """A copy with the bytes of one group of pictures, keyframe to keyframe, overwritten by noise."""
    with av.open(str(source)) as container:
        starts = [p.pos for p in container.demux(video=0) if p.size and p.is_keyframe]
    data, (begin, end) = bytearray(source.read_bytes()), starts[group : group + 2]
    if path.suffix in (".mkv", ".webm"):  # the next cluster's head lies before its first picture
        end = data.rfind(b"\x1f\x43\xb6\x75", begin, end)
    data[begin:end] = np.random.default_rng(1).integers(1, 255, end - begin, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    return path


def presented(path: Path) -> tuple[np.ndarray, list[int]]:
    """Seconds after the first picture, and the numbers shown, by plain decoding."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = [
            (float(frame.pts * stream.time_base), number_of(frame.to_ndarray(format="rgb24").transpose(2, 0, 1)))
            for frame in container.decode(stream)
        ]
    seconds = np.array([time for time, _ in shown])
    return seconds - seconds[0], [number for _, number in shown]
