"""What may be changed in a conversation at random, drawn from the sample's own generator."""

from __future__ import annotations

from dataclasses import dataclass

from tensorkeep.errors import TensorkeepError


@dataclass(frozen=True)
class Augmentation:
    """MiniMind's two random changes of a conversation, drawn from the sample's own generator.

    Args:
        system: probability that a conversation without a system message gets a random one.
        empty_think: probability that empty thinking tags stay where the template wrote some (None: they always stay).

    Raises:
        TensorkeepError: a value is no probability.
    """

    system: float = 0.0
    empty_think: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("system", self.system), ("empty_think", self.empty_think)):
            if value is not None and not 0 <= value <= 1:
                raise TensorkeepError(f"{name} {value} is no probability", where="data.augmentation")

    @property
    def on(self) -> bool:
        """Whether anything can change."""
        return self.system > 0 or self.empty_think is not None
