"""A video network of another kind, whose files put `dummy.` in front of the names and hold a lid."""

from __future__ import annotations

from tensorkeep.detection.model.vit import VisionTransformer


class Backbone(VisionTransformer):
    """A ViT whose feature map is twice VideoMAE's."""

    kind = "dummy"

    def finish(self, x):  # type: ignore[no-untyped-def]
        """Return the last block's output, doubled."""
        return 2 * x


def own_name(name: str) -> str | None:
    """Return the name without what this kind's files put in front."""
    return name.removeprefix("dummy.") if name.startswith("dummy.") else None


def dropped(name: str) -> str | None:
    """Return why a tensor has no place."""
    return "a lid" if name == "lid" else None
