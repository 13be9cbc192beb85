"""Give torchcodec the FFmpeg that PyAV's wheel brings: a folder of links, under the names that torchcodec looks for.

    LINKS="from tensorkeep.detection.data.ffmpeg_links import library_path; print(library_path('ffmpeg'))"
    export LD_LIBRARY_PATH=$(python -c "$LINKS")

PyAV's wheel names its libraries by their content (`libavcodec-5e6b81c2.so.62.28.102`), torchcodec needs
`libavcodec.so.62`. Both then use one copy of FFmpeg. CUDA's libraries of pip are put on the path too: torchcodec's own
search does not find them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tensorkeep.errors import TensorkeepError

_NAMED = re.compile(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]{8}(\.so\.\d+)[.\d]*")


def link_ffmpeg(folder: str | Path) -> Path:
    """Make the folder of links.

    Args:
        folder: where; it is made.

    Returns:
        The folder, absolute.

    Raises:
        TensorkeepError: PyAV is not installed, or was not installed as a wheel with libraries of its own.
    """
    libraries = [path for root in _roots("av") for path in (root.parent / "av.libs").glob("lib*.so*")]
    if not any(_NAMED.fullmatch(path.name) for path in libraries):
        what = "PyAV brings no FFmpeg of its own here"
        raise TensorkeepError(what, where="av", hint="pip install av, or use the system's FFmpeg: torchcodec finds it")
    target = Path(folder).absolute()
    target.mkdir(parents=True, exist_ok=True)
    for path in libraries:  # libraries find each other beside the link, by their long names
        found = _NAMED.fullmatch(path.name)
        for name in (path.name, *([found[1] + found[2]] if found else [])):
            link = target / name
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return target


def library_path(folder: str | Path) -> str:
    """Return what LD_LIBRARY_PATH must hold for torchcodec.

    Args:
        folder: of the links, as in `link_ffmpeg`.
    """
    cuda = sorted(path for root in _roots("nvidia") for path in root.glob("cu*/lib") if any(path.glob("libnvrtc.so*")))
    return ":".join(map(str, [link_ffmpeg(folder), *cuda]))


def _roots(package: str) -> list[Path]:
    """Return the folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
