"""Check what the shapes of several kinds of projections have alike."""

from __future__ import annotations

from tensorkeep.errors import TensorkeepError


def check_per_file(per_file: tuple[tuple[int, int], ...], in_channels: int, channels: int) -> None:
    """Check that convolutions of their own for each feature file take all channels and make all of a level's.

    Args:
        per_file: for each file its channels, and those made of them; none: there are no such convolutions.
        in_channels: of the features.
        channels: of a level.

    Raises:
        TensorkeepError: They do not add up.
    """
    for name, at, whole in (("in_channels", 0, in_channels), ("channels", 1, channels)):
        parts = [pair[at] for pair in per_file]
        if parts and (min(parts) < 1 or sum(parts) != whole):
            what = f"{' + '.join(map(str, parts))} of per_file are {sum(parts)}, {name} is {whole}"
            hint = f"per_file has [channels of the file, channels made of them] for each file; {name} is their sum"
            raise TensorkeepError(what, where="projection", hint=hint)


def check_windows(windows: tuple[int, ...], branch_layers: int) -> None:
    """Check that there is one window, or one for each level.

    Args:
        windows: of the levels, stem first.
        branch_layers: levels after the first.

    Raises:
        TensorkeepError: There are more, or fewer.
    """
    if len(windows) not in (1, 1 + branch_layers):
        what = f"windows has {len(windows)} entries, the pyramid {1 + branch_layers} levels"
        raise TensorkeepError(what, where="projection", hint="give one window, or one for each level")
