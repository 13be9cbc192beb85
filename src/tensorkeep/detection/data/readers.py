"""How windows are placed, and how the frames or features of a window are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tensorkeep.detection.data.augment import AugmentConfig

Broken = Literal["error", "skip", "keep"]


@dataclass(frozen=True)
class WindowConfig:
    """How windows are placed and segments kept; names and values of OpenTAD's AdaTAD configs.

    Attributes:
        method: how windows are placed (see `clips`).
        window_size: grid steps of a window.
        feature_stride: frames between two features (or snippets).
        sample_stride: every so many features are a grid step.
        scale_factor: frames decoded for each grid step.
        offset_frames: frame that grid step 0 stands for (half a clip, for features of clips).
        window_overlap_ratio: part of a sliding window that the next one repeats.
        trunc_thresh: part of a segment that must lie in a random window for it to be ground truth there.
        crop_ratio: range of the part of a video shorter than a window that is kept in training; None: all of it.
        ioa_thresh: part of a segment that must lie in a sliding window to count there (for a validation loss).
    """

    method: Literal["random_trunc", "sliding", "resize"] = "random_trunc"
    window_size: int = 768
    feature_stride: int = 4
    sample_stride: int = 1
    scale_factor: int = 1
    offset_frames: float = 0.0
    window_overlap_ratio: float = 0.5
    trunc_thresh: float = 0.75
    crop_ratio: tuple[float, float] | None = (0.9, 1.0)
    ioa_thresh: float = 0.75

    @property
    def snippet_stride(self) -> int:
        """Number of frames from one grid step to the next."""
        return self.feature_stride * self.sample_stride


@dataclass(frozen=True)
class VideoReader:
    """How frames are read from video files.

    Attributes:
        size: pixels of the shorter side, and of the square cut out of its middle, where nothing is augmented.
        augment: random changes for training; None: none.
        broken: a file or picture that cannot be decoded stops everything ("error"), leaves an empty, masked sample that
            counts for nothing ("skip"), or is replaced by the picture before it ("keep").
        threads: of the decoder.
    """

    size: int = 160
    augment: AugmentConfig | None = None
    broken: Broken = "error"
    threads: int = 1

    @property
    def short_side(self) -> int:
        """Pixels of the shorter side that frames are decoded to."""
        return self.size if self.augment is None else self.augment.short_side


@dataclass(frozen=True)
class FeatureReader:
    """How features are read from files, in place of frames.

    Attributes:
        channels: C.
        channels_first: whether files hold `[C, T]` instead of `[T, C]`, where both axes have C entries.
        broken: as in `VideoReader`.
        resized: whether files of one video that differ in length are stretched to the longest.
        widths: channels of each of the files of one video; empty: only their sum is known.
        key: name of the array in a file that holds several; None: the only one, or `feats`.
    """

    channels: int
    channels_first: bool = False
    broken: Broken = "error"
    resized: bool = False
    widths: tuple[int, ...] = ()
    key: str | None = None

    @property
    def stored(self) -> dict[str, Any]:
        """How files hold features, as `features` takes it by name."""
        return {"channels_first": self.channels_first, "widths": self.widths, "key": self.key}
