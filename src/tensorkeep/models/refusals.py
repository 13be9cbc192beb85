"""What the libraries underneath raise when they are given a config, a tokenizer or weights that they cannot take."""

from __future__ import annotations

import sys

from tensorkeep.errors import FOREIGN

REFUSALS = (*FOREIGN, MemoryError)


def refusals() -> tuple[type[BaseException], ...]:
    """Return the errors that transformers, huggingface_hub and tokenizers raise of bad files.

    Write `except refusals() as error:` around the library's call and nothing else: Python asks for the types only once
    something was raised, so that no library is imported for it.

    Returns:
        REFUSALS, system errors, huggingface_hub's own; and the panic or the bare `Exception` of a Rust extension, where
        one is being handled.
    """
    found: list[type[BaseException]] = [*REFUSALS, OSError]
    hub = sys.modules.get("huggingface_hub.errors")
    for name in ("StrictDataclassError", "EntryNotFoundError", "RevisionResolutionError", "SafetensorsParsingError"):
        if hasattr(hub, name):
            found.append(getattr(hub, name))
    raised = sys.exc_info()[0]
    panic = raised is not None and (raised.__module__, raised.__name__) == ("pyo3_runtime", "PanicException")
    if raised is not None and (panic or raised is Exception):
        found.append(raised)  # tokenizers' Rust: a panic is no Exception and importable from nowhere, errors are bare
    return tuple(found)


def said(error: BaseException, most: int = 200) -> str:
    r"""Return a library's error in one line: its kind, and the beginning of its message.

    Args:
        error: what was raised.
        most: most letters of the message.

    Example:
        >>> said(KeyError("a\nb"))
        "KeyError: 'a\\nb'"
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"
