r"""Conversations as tokens, with a mark on every token of an answer: the loss is taken there and nowhere else.

The tokenizer's own chat template renders. Where an answer begins is found by rendering what comes before it with the
opening of an answer; where it ends, by rendering up to it, or by the text the template puts after every answer. Both
must be prefixes of the whole rendering and fall between tokens, or the conversation is refused. On MiniMind's template
this marks exactly what its own rule marks: from after `<|im_start|>assistant\n` to `<|im_end|>\n`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.language.data.augmentation import Augmentation
from tensorkeep.language.data.conversations import Conversation
from tensorkeep.models.refusals import REFUSALS, said

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THINK = "<think>\n\n</think>\n\n"
# system prompts for MiniMind's augmentation: one in five conversations without a system message gets one
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a knowledgeable AI. Answer the user's questions as accurately as you can.",
    "You are a small but useful language model.",
    "你是一个乐于助人的助手。",
    "你是一个专业的人工智能助手，请尽量准确地回答用户的问题。",
)


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template, which renders conversations and marks their answers.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Attributes:
        ending: the text that the template puts after every answer.

    Raises:
        TensorkeepError: the tokenizer has no chat template, or does not tell where its tokens lie in the text.
    """

    tokenizer: Any
    ending: str = field(init=False)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise TensorkeepError(
                "the tokenizer has no chat template",
                where="tokenizer",
                hint="name a folder whose tokenizer_config.json or chat_template.jinja has one (tokenizer: FOLDER)",
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise TensorkeepError("the tokenizer gives no offsets", where="tokenizer", hint="use its tokenizer.json")
        probe = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\u2042"}]
        object.__setattr__(self, "ending", self.render(Conversation(probe)).rpartition("\u2042")[2])

    def render(self, conversation: Conversation, opening: bool = False) -> str:
        """Render the conversation as text; `opening` adds what the template puts before an answer."""
        text: str = self._applied(conversation, tokenize=False, add_generation_prompt=opening)
        return text

    def _applied(self, conversation: Conversation, **options: Any) -> Any:
        """Return what transformers makes of a conversation, within the bounds of templates."""
        from jinja2.exceptions import TemplateError

        from tensorkeep.language.data.template import bounded_templates

        try:
            with bounded_templates():
                return self.tokenizer.apply_chat_template(conversation.messages, tools=conversation.tools, **options)
        # a template is a program: besides Jinja's own, it raises what Python does of what it computes
        except (TemplateError, *REFUSALS, SyntaxError) as error:
            what = f"the chat template refuses it: {said(error)}"
            raise TensorkeepError(what, where="data") from None

    def encode(
        self,
        conversation: Conversation,
        augmentation: Augmentation | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Tokenize a conversation, and mark the tokens of its answers.

        Args:
            conversation: messages and tools.
            augmentation: random changes to make, None for none.
            generator: the changes are drawn from it.

        Returns:
            Token ids, and for each of them whether it belongs to an answer.

        Raises:
            TensorkeepError: the template refuses the conversation, or its answers cannot be found in the text.
        """
        if augmentation is not None and augmentation.system > 0:
            conversation = _with_system(conversation, augmentation.system, generator)
        if _GENERATION.search(str(self.tokenizer.chat_template)):
            return self._tagged(conversation, augmentation)
        whole = self.render(conversation)
        spans = self._spans(conversation, whole)
        keep = augmentation.empty_think if augmentation is not None and _EMPTY_THINK in whole else None
        if keep is not None and float(torch.rand((), generator=generator)) >= keep:
            whole, spans = without(whole, spans, _EMPTY_THINK)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), marks(encoded["offset_mapping"], spans, whole)

    def _tagged(self, conversation: Conversation, augmentation: Augmentation | None) -> tuple[list[int], list[bool]]:
        """Let transformers mark what stands between the template's own generation tags."""
        if augmentation is not None and augmentation.empty_think is not None:
            raise TensorkeepError(
                "cannot take thinking out of a template with generation tags", where="data.augmentation"
            )
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._applied(conversation, **options)
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]

    def _spans(self, conversation: Conversation, whole: str) -> list[tuple[int, int]]:
        """Find the character spans `[start, end)` of the answers in the rendered text."""
        messages, tools = conversation
        spans: list[tuple[int, int]] = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._start(Conversation(messages[:at], tools), whole, spans[-1][1] if spans else 0, at)
            spans.append((start, self._end(Conversation(messages[: at + 1], tools), whole, start, at)))
        return spans

    def _start(self, before: Conversation, whole: str, after: int, at: int) -> int:
        """The character at which the answer in message `at` begins; `after`: the end of the answer before it."""
        opening = self._opening(before)
        opened = (self.render(before) if at else "") + opening
        if whole.startswith(opened):
            return len(opened)
        # templates that drop the thinking of earlier turns render what comes before in another way, too
        found = whole.find(opening, after) if self._is_mark(opening) else -1
        if found < 0:
            raise _unplaced(at, "begins")
        return found + len(opening)

    def _is_mark(self, text: str) -> bool:
        """Whether a text holds a special token, which the text of a message does not hold by chance."""
        return any(token and token in text for token in self.tokenizer.all_special_tokens)

    def _opening(self, before: Conversation) -> str:
        """The text between the conversation so far and an answer; thinking tags count as the answer's."""
        if not before.messages:
            before = Conversation([{"role": "user", "content": ""}], before.tools)
        plain, opened = self.render(before), self.render(before, opening=True)
        if not opened.startswith(plain):
            raise _unplaced(len(before.messages), "begins")
        return opened[len(plain) :].partition("<think>")[0]

    def _end(self, upto: Conversation, whole: str, start: int, at: int) -> int:
        """The character behind the answer in message `at`, which begins at `start`."""
        rendered = self.render(upto)
        if whole.startswith(rendered) and len(rendered) > start:
            return len(rendered)
        found = whole.find(self.ending, start) if self._is_mark(self.ending) else -1
        if found < 0:
            raise _unplaced(at, "ends")
        return found + len(self.ending)


def _unplaced(at: int, verb: str) -> TensorkeepError:
    """The error for an answer whose beginning or end cannot be found."""
    return TensorkeepError(
        f"where the answer in message {at} {verb} cannot be found in what the chat template renders",
        where="data",
        hint="put {% generation %} ... {% endgeneration %} around answers in the template",
    )


def marks(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], text: str) -> list[bool]:
    """Say for each token whether it lies in a span.

    Args:
        offsets: characters `[start, end)` of each token, in order.
        spans: characters `[start, end)` of each answer, in order.
        text: what both point into, for the error.

    Raises:
        TensorkeepError: a token crosses the border of a span.

    >>> marks([(0, 2), (2, 4), (4, 5)], [(2, 5)], "abcde")
    [False, True, True]
    """
    out, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside = at < len(spans) and spans[at][0] <= start and end <= spans[at][1] and end > start
        touches = at < len(spans) and start < spans[at][1] and end > spans[at][0]
        if touches and not inside:
            raise TensorkeepError(
                f"a token crosses the border of an answer: {shown(text[start:end])}",
                where="data",
                hint="the template must put a special token or a line end between question and answer",
            )
        out.append(inside)
    return out


def without(text: str, spans: Sequence[tuple[int, int]], part: str) -> tuple[str, list[tuple[int, int]]]:
    """Take every `part` out of a text, and move the spans along.

    >>> without("ab--cd", [(0, 6)], "--")
    ('abcd', [(0, 4)])
    """
    places = [m.start() for m in re.finditer(re.escape(part), text)]

    def moved(at: int) -> int:
        return at - sum(min(len(part), max(0, at - place)) for place in places)

    return text.replace(part, ""), [(moved(a), moved(b)) for a, b in spans]


def _with_system(conversation: Conversation, probability: float, generator: torch.Generator | None) -> Conversation:
    """Put a random system message in front, by chance, where there is none and no tools are given."""
    messages, tools = conversation
    if messages[0]["role"] == "system" or tools:
        return conversation
    if float(torch.rand((), generator=generator)) >= probability:
        return conversation
    prompt = _SYSTEM_PROMPTS[int(torch.randint(len(_SYSTEM_PROMPTS), (), generator=generator))]
    return Conversation([{"role": "system", "content": prompt}, *messages], tools)


def tokenizer_settings(tokenizer: Any) -> Mapping[str, Any]:
    """Collect what decides the tokens of a text, as plain values for a fingerprint."""
    backend = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(tokenizer)
    return {
        "tokenizer": backend,
        "chat_template": str(getattr(tokenizer, "chat_template", None)),
        "special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())},
    }
