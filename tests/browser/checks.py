"""What every page must stand up to in a browser: silent, alone, readable, accessible, usable with the keyboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.browser.chromium import Tab

WIDTHS, THEMES = (1200, 375), ("light", "dark")
_FOCUSED = """(() => { const a = document.activeElement; if (!a || a === document.body) return null;
  const all = [...document.querySelectorAll('a[href], button, input, summary, [tabindex]')];
  const style = getComputedStyle(a);
  return [all.indexOf(a), a.tagName, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0]; })()"""
_REACHABLE = """[...document.querySelectorAll('a[href], button, input, summary, [tabindex]')]
  .map((e, n) => [n, e]).filter(([n, e]) => e.tabIndex >= 0 && e.checkVisibility()).map(([n, e]) => n)"""
_WIDER = """(() => { const wide = document.documentElement.clientWidth; return [...document.querySelectorAll('main *')]
  .filter((e) => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > wide + 1).slice(0, 5)
  .map((e) => e.tagName + '.' + e.className); })()"""
_SMALL = """[...document.querySelectorAll('main *, header *')].filter((e) => e.checkVisibility() &&
  [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && parseFloat(getComputedStyle(e).fontSize) < 10)
  .slice(0, 5).map((e) => e.outerHTML.slice(0, 80))"""


def problems(tab: Tab, page: Path, width: int, theme: str, axe: str) -> list[str]:
    """Open a page and return what is wrong with it; nothing where all is well.

    Args:
        tab: of the browser.
        page: the file.
        width: of the window in pixels.
        theme: light or dark.
        axe: the source of axe-core.
    """
    tab.open(page, width, theme)
    found = tab.complaints()
    if wide := tab.run(_WIDER):
        found.append(f"wider than the window: {wide}")
    if tab.run("document.documentElement.scrollWidth > innerWidth"):
        found.append("the page scrolls sideways")
    if small := tab.run(_SMALL):
        found.append(f"text below 10 pixels: {small}")
    if (ran := tab.run("window.ran || null")) is not None:
        found.append(f"a name of the user's ran as a script: {ran}")
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found += _violations(tab, axe)
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = false; })")
    return found


def _violations(tab: Tab, axe: str) -> list[str]:
    """What axe-core finds, every rule that it has."""
    tab.run(axe + "; 0")
    done: dict[str, Any] = tab.run(
        "axe.run(document, {resultTypes: ['violations', 'incomplete']}).then((r) => ({bad: r.violations.map((v) => "
        "[v.id, v.help, v.nodes.length, v.nodes[0].html.slice(0, 200)]), passes: r.passes.length}))"
    )
    if done["passes"] < 10:
        return [f"axe ran {done['passes']} rules only"]
    return [f"axe: {json.dumps(v)}" for v in done["bad"]]


def keyboard(tab: Tab) -> list[str]:
    """Go through the open page with the Tab key: everything is reached, in the page's order, and seen to be."""
    wanted, reached, found = tab.run(_REACHABLE), [], []
    tab.run("document.activeElement.blur(); window.getSelection().removeAllRanges(); scrollTo(0, 0)")
    for _ in range(len(wanted) + 2):
        tab.press("Tab")
        at = tab.run(_FOCUSED)
        if at is None or at[0] in reached:
            break
        reached.append(at[0])
        if not at[2]:
            found.append(f"no outline on {at[1]} number {at[0]}")
    if reached != wanted:
        found.append(f"the Tab key reaches {reached[:40]}, of {wanted[:40]}")
    return found + _figures(tab) + _button(tab)


def _figures(tab: Tab) -> list[str]:
    """Arrow keys read values from curves and maps."""
    found = []
    count = tab.run("document.querySelectorAll('figure[data-lines], figure[data-cells]').length")
    for number in range(min(count, 6)):
        of = f"document.querySelectorAll('figure[data-lines], figure[data-cells]')[{number}]"
        tab.run(f"{of}.querySelector('[tabindex]').focus()")
        said = []
        for key in ("ArrowRight", "End", "Home"):
            tab.press(key)
            said.append(tab.run(f"{of}.querySelector('output').textContent"))
        if not all(said):
            found.append(f"figure {number} says {said} for arrow keys")
    return found


def _button(tab: Tab) -> list[str]:
    """The button turns the colours, and back."""
    tab.run("document.getElementById('theme').focus()")
    seen = [tab.run("getComputedStyle(document.body).backgroundColor")]
    for _ in range(2):
        tab.press("Enter")
        seen.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    return [] if seen[0] == seen[2] != seen[1] else [f"the button for the colours: {seen}"]
