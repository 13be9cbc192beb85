"""Parameter names: path segments, wrappers, natural order, patterns, grouping for people.

Names are edited by segment and never by replacing text inside them: `model_ema.model.x` is not `_ema.x`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from tensorkeep.errors import near_misses

# what DDP, torch.compile, FSDP1, activation checkpointing and PEFT put into the names of the modules they wrap
WRAPPERS = (
    ("module",),
    ("_forward_module",),
    ("_orig_mod",),
    ("_fsdp_wrapped_module",),
    ("_checkpoint_wrapped_module",),
    ("base_model", "model"),
)


def natural(name: str) -> tuple[object, ...]:
    """Return a sort key that puts layers.2 before layers.10.

    Args:
        name: a tensor's name.

    Example:
        >>> sorted(["layers.10.w", "layers.2.w"], key=natural)
        ['layers.2.w', 'layers.10.w']
    """
    return tuple(_part(p) for p in re.split(r"(\d+)|\.", name) if p)


@lru_cache(1 << 12)
def _part(text: str) -> tuple[int, int, str]:
    # by length and then by digits is by value, for numbers of any length
    digits = text.lstrip("0") if text.isdecimal() else None
    return (1, 0, text) if digits is None else (0, len(digits), digits)


def unwrap(name: str) -> tuple[str, tuple[str, ...]]:
    """Take the segments of wrappers (DDP, FSDP, torch.compile, PEFT) out of a name.

    `module` counts only in front (a model may have a child of that name), the others anywhere.

    Args:
        name: a parameter's name.

    Returns:
        The name without them, and the wrappers that were there, each with its dot.

    Example:
        >>> unwrap("module._orig_mod.layers.0._checkpoint_wrapped_module.w")
        ('layers.0.w', ('module.', '_orig_mod.', '_checkpoint_wrapped_module.'))
    """
    if "module" not in name and "_orig_mod" not in name and "base_model" not in name:
        return name, ()  # nearly all names: a checkpoint has thousands
    segments, found = name.split("."), []
    at = 0
    while at < len(segments):
        for wrapper in WRAPPERS:
            here = tuple(segments[at : at + len(wrapper)])
            in_front = at == 0 or wrapper[0].startswith("_")
            if here == wrapper and in_front and len(segments) > at + len(wrapper):
                found.append(".".join(wrapper) + ".")
                del segments[at : at + len(wrapper)]
                break
        else:
            at += 1
    return ".".join(segments), tuple(found)


def strip_root(name: str, root: str) -> str | None:
    """Return `name` without the leading segments of `root`, or None where it lies elsewhere.

    Args:
        name: a tensor's name.
        root: leading segments without the last dot; empty or None-like for names that have no root.

    Example:
        >>> strip_root("model.layers.0.w", "model"), strip_root("modelx.w", "model")
        ('layers.0.w', None)
    """
    return name[len(root) + 1 :] if root and name.startswith(root + ".") else (None if root else name)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns fits the name: the one rule for patterns (docs/concepts/patterns.md).

    A pattern fits where it covers whole dotted segments, anywhere in the name. `*` stands for any characters, dots
    included, `?` for one character, `[abc]` for one of these. `^` in front binds the pattern to the beginning of the
    name, `$` behind it to the end. Case matters.

    Args:
        name: A dotted name, of a tensor, a module or a recipe's field.
        patterns: Patterns; without any, nothing fits.

    Returns:
        Whether at least one pattern fits.

    >>> matches("model.layers.0.self_attn.q_proj.weight", ["q_proj"]), matches("layers.10.w", ["layers.1"])
    (True, False)
    >>> matches("model.lm_head.weight", ["lm_head"]), matches("model.lm_head.weight", ["^lm_head"])
    (True, False)
    """
    return _compiled(tuple(patterns)).match(f".{name}.") is not None


@lru_cache(maxsize=1024)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for names with a dot at both ends, so that every segment has one on either side."""
    if not patterns:
        return re.compile(r"(?!)")
    return re.compile("|".join(fnmatch.translate(_with_borders(pattern)) for pattern in patterns))


def _with_borders(pattern: str) -> str:
    front = "." if pattern.startswith("^") else "*."
    back = "." if pattern.endswith("$") else ".*"
    return front + pattern.removeprefix("^").removesuffix("$") + back


def exactly(name: str) -> str:
    """Return the pattern that fits this one name and no other.

    Args:
        name: A dotted name, which may itself contain `*`, `?` or `[`.

    Returns:
        A pattern for `matches`.

    >>> exactly("lm_head.weight"), exactly("odd[0]")
    ('^lm_head.weight$', '^odd[[]0]$')
    """
    return "^" + re.sub(r"[*?[]", r"[\g<0>]", name) + "$"


def few_patterns(names: Sequence[str], kept: Iterable[str]) -> list[str]:
    """Return as few patterns as say it: they fit all of these names and none of the kept ones.

    Args:
        names: Those to fit.
        kept: Those not to fit.

    >>> few_patterns(["layers.0.rope.freq", "layers.1.rope.freq"], ["layers.0.rope.weight"])
    ['layers.*.rope.freq']
    >>> few_patterns(["eye.a.weight", "eye.b.bias"], ["layers.0.weight"]), few_patterns(["a.b"], ["a.b.c"])
    (['^eye'], ['^a.b$'])
    """
    kept = [k for k in dict.fromkeys(kept) if k not in set(names)]
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        literal = re.sub(r"[*?[]", r"[\g<0>]", name)
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", literal), []).append(name)
    if len(groups) > 1:
        split = [name.split(".") for name in names]
        shared = ["^" + ".".join(_leading(split)), ".".join(_leading([s[::-1] for s in split])[::-1]) + "$"]
        shared += [s for s in split[0] if not s.isdigit() and not re.search(r"[*?[]", s)]
        for pattern in (p for p in shared if p not in ("^", "$")):
            if all(matches(n, [pattern]) for n in names) and not any(matches(k, [pattern]) for k in kept):
                return [pattern]
    out: list[str] = []
    for pattern, own in groups.items():
        fitting = (p for p in (pattern, f"^{pattern}$") if not any(matches(k, [p]) for k in kept))
        found = next(fitting, None)
        out += [found] if found is not None else [exactly(name) for name in own]
    return out


def _leading(split: Sequence[list[str]]) -> list[str]:
    """Return the segments that all names begin with."""
    first = min(split)
    return first[: next((i for i, s in enumerate(first) if any(o[i : i + 1] != [s] for o in split)), len(first))]


def drops(names: Sequence[str], kept: Iterable[str]) -> str:
    """Return the `--drop` options that leave out these names and none that is kept; '...' stands for more than eight.

    Args:
        names: Stored names to leave out.
        kept: Stored names that stay.

    >>> drops(["a.0.bias", "a.1.bias"], ["a.0.weight"])
    "--drop 'a.*.bias'"
    """
    words = few_patterns(names, kept)
    return " ".join(f"--drop '{w}'" for w in words[:8]) + (" ..." if len(words) > 8 else "")


def near_pattern(pattern: str, names: Iterable[str]) -> str:
    """Return a hint for a pattern that fits nothing: segments or names that are spelt like it.

    Args:
        pattern: The pattern as the user wrote it.
        names: The names that were there to fit.

    Returns:
        The hint, e.g. `did you mean q_proj?`; empty where nothing is near.
    """
    names = list(names)
    segments = {segment for name in names for segment in name.split(".")}
    wanted = pattern.strip("^$*.")
    return near_misses(wanted, {*segments, *names} if "." in wanted else segments)


def grouped(names: Iterable[str]) -> list[str]:
    """Shorten a list of names for people by gathering their numbers.

    Args:
        names: tensor names, in any order.

    Returns:
        Patterns such as `layers.{0..15}.self_attn.q_proj` that stand for exactly these names.

    Example:
        >>> grouped(["l.0.a", "l.1.a", "l.2.a", "l.1.b"])
        ['l.{0..2}.a', 'l.1.b']
    """
    groups: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for name in names:
        parts = re.split(r"(?<=\.)(\d{1,18})(?=\.|$)", name)
        groups.setdefault(tuple(parts[::2]), set()).add(tuple(int(p) for p in parts[1::2]))
    return [text for texts, numbers in groups.items() for text in _gathered(texts, numbers)]


def _gathered(texts: tuple[str, ...], numbers: Iterable[tuple[int, ...]]) -> list[str]:
    """Spell numbers as ranges that multiply out to exactly these; first numbers with the same rest share a range."""
    if len(texts) == 1:
        return [texts[0]]
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, set()).add(tuple(rest))
    alike: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(rests):
        alike.setdefault(frozenset(rests[first]), []).append(first)
    return [texts[0] + ranges(firsts) + tail for rest, firsts in alike.items() for tail in _gathered(texts[1:], rest)]


def ranges(values: Sequence[int]) -> str:
    """Spell sorted numbers as `{0..3,7}`, or a single one as itself.

    Args:
        values: whole numbers in rising order, at least one.

    Example:
        >>> ranges([0, 1, 2, 7])
        '{0..2,7}'
    """
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs) + "}"
