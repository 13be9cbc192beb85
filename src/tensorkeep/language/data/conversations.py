"""What one record is: a text, a conversation or a preference, recognized by its own keys and checked.

Accepted are MiniMind's three kinds of records and OpenAI-style messages, so no setting says which kind a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from tensorkeep.errors import TensorkeepError, shown

Format = Literal["auto", "jsonl", "text"]
Objective = Literal["pretrain", "sft", "dpo"]


class Conversation(NamedTuple):
    """Messages (each with `role`, `content` and what else the template knows), and the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class Preference(NamedTuple):
    """Two conversations with the same question, the first one preferred."""

    chosen: Conversation
    rejected: Conversation


Record = str | Conversation | Preference
# keys that make a record, and the objective it serves
KINDS = {"text": "pretrain", "conversations": "sft", "messages": "sft", "chosen": "dpo"}


def record_of(document: Any, objective: Objective, where: str) -> Record:
    """Return the record in one JSON value, checked against the objective.

    Args:
        document: the value.
        objective: what the record is for.
        where: its place, for errors.

    Raises:
        TensorkeepError: it is no record, or one for another objective.
    """
    if not isinstance(document, Mapping):
        raise TensorkeepError(f"is no object but {shown(document)}", where=where)
    kind = next((KINDS[key] for key in KINDS if key in document), None)
    if kind is None:
        keys = ", ".join(map(repr, list(document)[:6])) or "nothing"
        raise TensorkeepError(f"has none of {', '.join(KINDS)}, but {keys}", where=where, hint="rename its keys")
    if kind != objective:
        raise TensorkeepError(f"is a record for {kind}, not for {objective}", where=where, hint=f"objective: {kind}")
    if objective == "pretrain":
        if not isinstance(document["text"], str):
            raise TensorkeepError(f"text is no text but {shown(document['text'])}", where=where)
        return refuse_broken(document["text"], where)
    if objective == "sft":
        key = "conversations" if "conversations" in document else "messages"
        return conversation(document[key], document.get("tools"), f"{where}: {key}")
    if "rejected" not in document:
        raise TensorkeepError("has chosen but no rejected", where=where)
    chosen, rejected = (conversation(document[k], None, f"{where}: {k}") for k in ("chosen", "rejected"))
    return Preference(chosen, rejected)


def conversation(messages: Any, tools: Any, where: str) -> Conversation:
    """Check a list of messages and make it a conversation.

    Tools may stand beside the list, or in the system message as MiniMind has them; JSON text in `tools` and
    `tool_calls` is read.
    """
    if not isinstance(messages, list) or not messages:
        raise TensorkeepError(f"is no list of messages but {shown(messages)}", where=where)
    out = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TensorkeepError(f"message {at} has no role: {shown(message)}", where=where)
        made = {k: v for k, v in message.items() if k != "tools"}
        made["content"] = "" if made.get("content") is None else made["content"]
        if isinstance(made["content"], str):
            refuse_broken(made["content"], f"{where}: message {at}")
        if isinstance(made.get("tool_calls"), str):
            made["tool_calls"] = _parsed(made["tool_calls"], f"{where}: message {at}: tool_calls")
        if not made.get("tool_calls", True):  # MiniMind's files say "" where there are none
            del made["tool_calls"]
        if message["role"] == "system" and message.get("tools"):
            tools = message["tools"]
        out.append(made)
    return Conversation(out, _parsed(tools, f"{where}: tools") if isinstance(tools, str) and tools else tools or None)


def refuse_broken(text: str, where: str) -> str:
    """Return a text as it is, or refuse it: half a character (a lone surrogate) is nothing that a tokenizer can read.

    Args:
        text: the text.
        where: its place, for errors.

    Raises:
        TensorkeepError: it holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start} is half of one ({text[error.start]!a}): the text was cut inside a character"
        raise TensorkeepError(what, where=where, hint="leave it out, or replace it by U+FFFD") from None
    return text


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text, None for a blank one."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(f"is no JSON: {str(error)[:100]}", where=where) from None
