"""Generate text with a model, piece by piece as it comes, through transformers' own `generate`.

Greedy by default, so that two checkpoints differ by their weights alone; with a temperature every draw comes from the
seed. The checkpoint's own sampling settings are left aside, its end tokens are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.chat import Chat
from tensorkeep.language.data.conversations import Conversation
from tensorkeep.models.language_model import text_config

Write = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """A text that a model wrote.

    Args:
        prompt: what it was to go on from.
        text: the new text, without special tokens.
        ids: the new tokens, an end token included.
        seconds: how long it took.
        stopped_by: `end` (the model ended it), `length` (max_tokens) or `context` (the model takes no more tokens).
    """

    prompt: str
    text: str
    ids: list[int]
    seconds: float
    stopped_by: Literal["end", "length", "context"]

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second."""
        return len(self.ids) / max(self.seconds, 1e-9)


class TextStream:
    """Passes text on to `write` as it comes; half a character waits for its other half.

    transformers gives `put` the prompt first, then the new ids one by one, and calls `end`.
    """

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.written = ""
        self.prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Take ids: first the prompt's `[1, prompt]`, then `[1]` each."""
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.ids += [int(i) for i in value.flatten().tolist()]
        text = self.text()
        if not text.endswith("\ufffd") and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text

    def end(self) -> None:
        """Write what was held back."""
        text = self.text()
        if text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text

    def text(self) -> str:
        """Decode all new tokens, without special ones."""
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt_ids(tokenizer: Any, prompt: str, raw: bool = False, bos: int | None = None) -> list[int]:
    """Tokenize a prompt: as a question in the tokenizer's chat template, or as it is.

    Args:
        tokenizer: of transformers.
        prompt: the text; an empty one is the token that begins a text.
        raw: leave the chat template out.
        bos: the id that begins a text, where the tokenizer names none.

    Raises:
        TensorkeepError: the prompt is empty, and no token begins a text.
    """
    if getattr(tokenizer, "chat_template", None) and not raw:
        text = Chat(tokenizer).render(Conversation([{"role": "user", "content": prompt}]), opening=True)
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = [int(i) for i in tokenizer(prompt)["input_ids"]]
    first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos
    if not ids and first is None:
        raise TensorkeepError("is empty, and no token begins a text", where="prompt", hint="--prompt TEXT")
    return ids or [int(first)]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    write: Write = lambda _: None,
) -> Generated:
    """Let a model go on from a prompt.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: a question for the chat template, where there is one, or the text to go on from.
        max_tokens: at most so many new tokens.
        temperature: 0 takes the likeliest token; above it tokens are drawn from the whole distribution.
        seed: of the draws; the process's random state stays as it was.
        raw: leave the chat template out.
        write: is given each piece of text as it comes.

    Returns:
        The text, its tokens, and why it ended.

    Raises:
        TensorkeepError: the prompt leaves no room for a token, or a number is out of range.

    Example:
        >>> generate(model, tokenizer, "Once upon a time", max_tokens=8).stopped_by           # doctest: +SKIP
        'length'
    """
    if max_tokens < 1 or temperature < 0:
        raise TensorkeepError(f"max_tokens {max_tokens}, temperature {temperature}: at least 1 and 0", where="generate")
    live: Any = model
    ids = prompt_ids(tokenizer, prompt, raw, getattr(text_config(live.config), "bos_token_id", None))
    rows = getattr(text_config(live.config), "max_position_embeddings", None)
    room = rows - len(ids) if isinstance(rows, int) else max_tokens
    if room < 1:
        what = f"is {len(ids)} tokens, the model's rows hold {rows}"
        raise TensorkeepError(what, where="prompt", hint="a shorter one leaves room for an answer")
    device = next(model.parameters()).device
    stream, ends = TextStream(tokenizer, write), _end_tokens(live, tokenizer)
    given = torch.tensor([ids], device=device)  # [1, prompt]
    before = live.generation_config
    live.generation_config = _config(tokenizer, ends, min(room, max_tokens), temperature)
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            live.generate(given, attention_mask=torch.ones_like(given), streamer=stream)
    finally:
        live.generation_config = before
    seconds = time.perf_counter() - started
    ended = bool(stream.ids) and stream.ids[-1] in ends
    by: Literal["end", "length", "context"] = "end" if ended else "context" if room < max_tokens else "length"
    return Generated(prompt, stream.text(), stream.ids, seconds, by)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Collect every token that ends an answer: by the model's generation config, its config and the tokenizer."""
    configs = (model.generation_config, text_config(model.config), tokenizer)
    said = [getattr(config, "eos_token_id", None) for config in configs]
    flat = [i for one in said for i in (one if isinstance(one, (list, tuple)) else [one]) if i is not None]
    return sorted({int(i) for i in flat})


def _config(tokenizer: Any, ends: list[int], tokens: int, temperature: float) -> Any:
    """Set every sampling option: transformers would take what is unset from the checkpoint."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else ends[0] if ends else 0,
        **drawn,
    )
