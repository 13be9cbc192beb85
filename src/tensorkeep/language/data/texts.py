"""Read training texts: records with texts, conversations or preferences (see `sources`), and plain text files.

Accepted are MiniMind's three kinds of JSON lines and OpenAI-style messages. A record is recognised by its own keys, so
no setting says which kind a file holds. A line that is no record is an error with its number: a file that is half read
would train on half the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.language.data.sources import documents, expanded, is_plain, text_of

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


def records(paths: Sequence[str | Path], objective: Objective, form: Format = "auto") -> Iterator[Record]:
    """Read every record of the files in their order; a plain text file is one text.

    Args:
        paths: the files.
        objective: decides what a record is: a text for `pretrain`, a conversation for `sft`, a preference for `dpo`.
        form: `auto` goes by the file's ending.

    Raises:
        TensorkeepError: names file and line of what is no such record.

    Example:
        >>> next(records(["stories.txt"], "pretrain"))[:16]                  # doctest: +SKIP
        'Once upon a time'
    """
    for path in expanded(paths):
        yield from records_of(path, objective, form)


def records_of(
    path: Path, objective: Objective, form: Format = "auto", begin: int = 0, end: int | None = None
) -> Iterator[Record]:
    """Read the records of one file, as `records` does; of a file of lines those that begin at `begin` to `end`.

    Args:
        path: the file.
        objective: as in `records`.
        form: as in `records`.
        begin: first byte of the part that is read.
        end: byte behind it; None: the file's end.

    Raises:
        TensorkeepError: as `records` does.
    """
    if is_plain(path, form):
        yield _plain(path, objective)
        return
    for where, document in documents(path, form, begin, end):
        yield _record(document, objective, where)


def objective_of(path: str | Path) -> Objective:
    """Guess the objective that a file's first record is for; plain text is for `pretrain`."""
    first = expanded([path])[0]
    if is_plain(first, "auto"):
        return "pretrain"
    document: Any = next((d for _, d in documents(first)), {})
    found = next((kind for key, kind in KINDS.items() if isinstance(document, dict) and key in document), "pretrain")
    return cast(Objective, found)


def _plain(path: Path, objective: Objective) -> str:
    """The text of a plain file, decoded as UTF-8."""
    if objective != "pretrain":
        raise TensorkeepError(
            f"is plain text, which {objective} cannot use",
            where=path,
            hint='objective: pretrain, or JSON lines: {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    try:
        return text_of(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TensorkeepError(f"is no UTF-8 text (byte {error.start})", where=path, hint="convert it: iconv") from None


def _record(document: Any, objective: Objective, where: str) -> Record:
    """The record in one JSON value, checked against the objective."""
    if not isinstance(document, Mapping):
        raise TensorkeepError(f"is no object but {shown(document)}", where=where)
    kind = next((KINDS[key] for key in KINDS if key in document), None)
    if kind is None:
        keys = ", ".join(map(repr, list(document)[:6]))
        raise TensorkeepError(f"has none of {', '.join(KINDS)}, but {keys}", where=where, hint="rename its keys")
    if kind != objective:
        raise TensorkeepError(f"is a record for {kind}, not for {objective}", where=where, hint=f"objective: {kind}")
    if objective == "pretrain":
        return str(document["text"])
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
        if isinstance(made.get("tool_calls"), str):
            made["tool_calls"] = _parsed(made["tool_calls"], f"{where}: message {at}: tool_calls")
        if not made.get("tool_calls", True):  # MiniMind's files say "" where there are none
            del made["tool_calls"]
        if message["role"] == "system" and message.get("tools"):
            tools = message["tools"]
        out.append(made)
    return Conversation(out, _parsed(tools, f"{where}: tools") if isinstance(tools, str) and tools else tools or None)


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text, None for a blank one."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(f"is no JSON: {str(error)[:100]}", where=where) from None
