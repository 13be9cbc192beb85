"""The samples of `pretrain` and `sft`: rows of cached tokens, or conversations drawn anew at every visit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tensorkeep.language.data.augmentation import Augmentation
from tensorkeep.language.data.batches import make_sample
from tensorkeep.language.data.chat import Chat
from tensorkeep.language.data.conversations import Conversation, conversation
from tensorkeep.language.data.packing import RowPlan
from tensorkeep.language.data.tokens import Tokens


@dataclass(frozen=True, eq=False)
class PackedData:
    """Rows of cached tokens; a sample is one row as `batches.make_sample` gives it.

    Args:
        tokens: all documents, one after another.
        rows: which pieces of them lie in which row.
        settings: how rows were made, which is a part of the fingerprint.
        digests: of each source file, as `parts.file_digests` gives them.
    """

    tokens: Tokens
    rows: RowPlan
    settings: str
    digests: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Row `index`; nothing is drawn from the generator."""
        segments = self.rows.segments(index)
        ids = np.concatenate([self.tokens.ids[a:b].astype(np.int64) for a, b in segments])
        lengths = [b - a for a, b in segments]
        counted = np.ones(len(ids), bool)
        if self.tokens.marks is not None:
            counted = np.concatenate([self.tokens.marks[a:b] for a, b in segments]).astype(bool)
        return make_sample(ids, counted, lengths)

    def fingerprint(self) -> str:
        """A text that changes with the source files, the tokenizer and the way rows are made."""
        return f"{self.tokens.fingerprint} {self.settings}"


@dataclass(frozen=True, eq=False)
class LiveConversations:
    """Conversations that are augmented: each visit renders and tokenizes anew, so no tokens are cached.

    Args:
        lines: bytes of one JSON line each as `uint8`, in the form that `Tokens` has for ids.
        chat: renders a conversation and marks its answers.
        augmentation: what is drawn at every visit.
        length: at most so many tokens a sample.
        digest: of the source files, the tokenizer and the settings.
        digests: of each source file, as `parts.file_digests` gives them.
    """

    lines: Tokens
    chat: Chat
    augmentation: Augmentation
    length: int
    digest: str
    digests: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Conversation `index`, changed by what `generator` draws."""
        a, b = int(self.lines.offsets[index]), int(self.lines.offsets[index + 1])
        document = json.loads(self.lines.ids[a:b].astype(np.uint8).tobytes())
        made = conversation(document["messages"], document["tools"], f"conversation {index}")
        ids, marks = self.chat.encode(made, self.augmentation, generator)
        return make_sample(ids[: self.length], marks[: self.length], [len(ids[: self.length])])

    def fingerprint(self) -> str:
        """A text that changes with the source files, the tokenizer and the augmentation."""
        return self.digest


def as_line(one: Conversation) -> bytes:
    """Write a conversation as one line of JSON, without the line end."""
    return json.dumps({"messages": one.messages, "tools": one.tools}).encode()
