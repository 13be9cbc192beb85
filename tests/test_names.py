"""Names are edited by segment, sorted as people count, and grouped without losing one."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.formats.names import WRAPPERS, grouped, natural, ranges, strip_root, unwrap

segments = st.sampled_from(["model", "layers", "ema", "module_x", "w", "0", "1", "10", "2", "weight", "_ema"])
names = st.lists(segments, min_size=1, max_size=6).map(".".join)
wrappers = st.sampled_from([".".join(w) for w in WRAPPERS if w[0].startswith("_")])


@given(names, st.lists(wrappers, max_size=3), st.integers(0, 5))
def test_wrappers_put_between_segments_are_found_and_taken_out(name: str, found: list[str], at: int) -> None:
    parts = name.split(".")
    at = min(at, len(parts) - 1)
    wrapped = ".".join([*parts[:at], *found, *parts[at:]])
    assert unwrap(wrapped) == (name, tuple(f"{w}." for w in found))


@given(names)
def test_a_module_prefix_is_taken_off_in_front_only(name: str) -> None:
    assert unwrap(f"module.{name}") == (name, ("module.",))
    assert unwrap(f"x.module.{name}") == (f"x.module.{name}", ())
    assert unwrap(f"base_model.model.{name}") == (name, ("base_model.model.",))


@given(names)
def test_a_name_without_wrappers_stays_and_unwrapping_twice_changes_nothing(name: str) -> None:
    assert unwrap(name) == (name, ())
    assert unwrap(unwrap(f"module.{name}")[0]) == (name, ())


def test_a_wrapper_alone_is_a_name() -> None:
    assert unwrap("module") == ("module", ()) and unwrap("_orig_mod") == ("_orig_mod", ())


@given(names, names)
def test_a_root_comes_off_at_segment_borders_only(name: str, root: str) -> None:
    assert strip_root(f"{root}.{name}", root) == name
    assert strip_root(f"{root}x.{name}", root) is None
    assert strip_root(name, "") == name


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True))
def test_numbers_sort_as_numbers(numbers: list[int]) -> None:
    shuffled = [f"layers.{n}.w" for n in numbers]
    assert sorted(shuffled, key=natural) == [f"layers.{n}.w" for n in sorted(numbers)]


@given(st.lists(st.text(max_size=8) | st.sampled_from(["²", "9" * 5000, "a." + "1" * 5000]), max_size=8))
def test_any_names_can_be_sorted(found: list[str]) -> None:
    assert sorted(sorted(found, key=natural)) == sorted(found)
    assert grouped(found) is not None


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranges_name_exactly_these_numbers(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    found: set[int] = set()
    for run in text.strip("{}").split(","):
        low, _, high = run.partition("..")
        found |= set(range(int(low), int(high or low) + 1))
    assert found == numbers


@given(st.lists(names, max_size=12, unique=True))
def test_grouping_covers_every_name(found: list[str]) -> None:
    patterns = [re.sub(r"\\\{[^}]*\\\}", r"\\d+", re.escape(group)) for group in grouped(found)]
    assert all(any(re.fullmatch(p, name) for p in patterns) for name in found)
    assert len(patterns) <= len(found)
