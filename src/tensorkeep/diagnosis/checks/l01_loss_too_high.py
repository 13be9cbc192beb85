"""L01 loss too high: every tensor, every buffer and the config are right, and the loss is still not what it should be.

What it means
    The model is sound. What goes into it, or how the loss is computed, is not: labels shifted twice or not at all, a
    lost causal mask, padding or the prompt in the loss, softmax applied twice, label smoothing, a sum for a mean, no
    BOS (beginning-of-text token), packed documents without their boundaries.

How it shows
    SmolLM2 has a loss of 2.89. The same logits against wrong labels give 11.34 without the shift, 9.66 with two and
    10.77 with three; with label smoothing 0.1, 4.59. A loss below the reference is a fault as well: 2.48 without the
    causal mask, 1.88 with end-of-text padding counted. Where packed documents see each other, the first token of a
    document costs some 12 nats.

How it is found
    `tensorkeep diagnose CKPT --forward --text FILE` finds what the model itself shows: that it predicts another token
    than the next (it was trained with shifted labels), that positions see later ones, that it wants BOS. A number
    that your own run reports is explained by computing it again: `explain_loss(model, batch, reported_loss)` names
    the one mistake that gives that number to three digits, and says that it cannot tell rather than guess.

What to do
    First make sure that the tensors are right (`tensorkeep diagnose CKPT`, and `check_loaded` in the process that
    trains). Then follow the fix of the finding: shift labels once, divide by the tokens that count, pass the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensorkeep.findings import Finding

CODE = "L01"
LIVE = True  # about live processes and forwards: others call it
_LEAK = 1e-2  # standard deviations of a logit; causal models show 1e-6
_BETTER = 1.0  # nats by which another label offset must beat the right one


def check(case: Any) -> Iterator[Finding]:
    """Report what the forward pass of this case shows, where one was asked for.

    Args:
        case: the checkpoint, with the figures of its forward pass in `forward`.

    Yields:
        The findings of `judge`.
    """
    seen = getattr(case, "forward", None)
    if seen is not None:
        yield from judge(seen)


def judge(seen: Any) -> Iterator[Finding]:
    """Report what the figures of one forward pass (a `live.forward.Forward`) prove by themselves."""
    offset, lowest = min(seen.offsets.items(), key=lambda item: item[1], default=("1", float("inf")))
    if lowest < seen.loss - _BETTER and lowest < seen.uniform - _BETTER:
        message = (
            f"the model predicts the token at distance {offset} (loss {lowest:.3f}), not the next (loss "
            f"{seen.loss:.3f}): it was trained with shifted labels"
        )
        evidence = {"loss": seen.loss, "offsets": seen.offsets}
        yield Finding(
            CODE,
            "error",
            message,
            [],
            evidence,
            fix="shift labels once: either in the data or in the loss; train again from the last sound checkpoint",
        )
    if seen.leak > _LEAK:
        message = (
            f"logits change when only later tokens change (by {seen.leak:.2g} of their spread): the causal mask is "
            "lost, and every loss comes out too low"
        )
        evidence = {"leak": seen.leak, "loss": seen.loss}
        yield Finding(CODE, "error", message, [], evidence, fix="set is_causal, or pass the causal mask")
    if seen.bos is not None and seen.bos < -0.5:
        message = (
            f"with BOS in front the loss is {-seen.bos:.2f} lower: the model expects it, and texts without it start "
            "too high"
        )
        yield Finding(
            CODE, "warning", message, [], {"bos": seen.bos}, fix="let the tokenizer put BOS in front of every document"
        )
