"""The HTML page of a diagnosis is complete, loads nothing, and never takes a name from a file as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.commands.report import report
from tensorkeep.commands.report._heatmap import Cell, cells
from tensorkeep.commands.report._page import page, write_page
from tensorkeep.errors import TensorkeepError

EVIL = "</title><script>alert(1)</script>.layers.0.\x1b[2J\"'><img src=x onerror=alert(2)>.weight"
VOID = {"meta", "rect", "br"}


def document(**own: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "checkpoint": "out",
        "reference": "base",
        "verdict": "ok",
        "causes": [],
        "findings": [],
        "forward": None,
    } | own


def finding(code: str, tensors: list[str], **own: Any) -> dict[str, Any]:
    common = {
        "code": code,
        "severity": "error",
        "tensors": tensors,
        "count": len(tensors),
        "message": f"{code} said",
        "evidence": {},
    }
    return {**common, "explains": [], "fix": None, **own}


class Tags(HTMLParser):
    """All tags of a page with their attributes; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_causes_come_first_and_every_tensor_has_its_square() -> None:
    q = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
    rows = [{"name": n, "status": "values", "relative_difference": 0.5 + i} for i, n in enumerate(q)]
    rows += [{"name": "model.norm.weight", "status": "equal", "relative_difference": 0.0}]
    text = page(
        document(
            verdict="findings",
            causes=["O01"],
            forward={"loss": 5.5, "reference_loss": 2.9, "max_logit_difference": 9.0},
            findings=[
                finding("C03", [], severity="info"),
                finding("O01", q, fix="tensorkeep repair out new --reference base"),
            ],
        ),
        {"tensors": rows},
    )
    assert text.index("O01 said") < text.index("C03 said")
    assert "model.layers.{0..2}.self_attn.q_proj.weight" in text
    assert "tensorkeep repair out new --reference base" in text
    assert "+2.6 against the reference" in text
    squares = [a for t, a in Tags(text).found if t == "rect" and str(a.get("class")).startswith("d")]
    assert [a["class"] for a in squares] == ["d5 bad", "d6 bad", "d6 bad", "d0 "]


def test_nothing_of_a_hostile_name_becomes_markup_and_nothing_is_loaded() -> None:
    rows = [{"name": EVIL, "status": "only_a", "relative_difference": None}]
    findings = [
        finding(EVIL, [EVIL], message=EVIL, evidence={EVIL: {EVIL: EVIL}}, fix=EVIL, explains=[EVIL], severity=EVIL)
    ]
    text = page(
        document(checkpoint=EVIL, reference=EVIL, verdict=EVIL, causes=[EVIL], findings=findings), {"tensors": rows}
    )
    tags = Tags(text).found
    assert not {t for t, _ in tags} & {"script", "img", "link", "iframe", "object", "image", "use", "a"}
    assert not [
        a for _, attrs in tags for a in attrs if a.startswith("on") or a in ("src", "href", "xlink:href", "style")
    ]
    assert "\x1b" not in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_both_colour_schemes_are_there() -> None:
    assert "prefers-color-scheme: dark" in page(document())


def test_evidence_by_tensor_name_gives_the_colour() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for evidence in (
        {"relative_difference": {name: 0.02}},
        {"tensors": [{"name": name, "relative_difference": 0.02}]},
        {name: {"relative_difference": 0.02, "other": 7.0}},
    ):
        found = cells(document(findings=[finding("V06", [name], evidence=evidence)]))
        assert found == {name: Cell(name, 0.02, "", "V06", "error")}
        assert found[name].level == "d4"


def test_many_layers_and_experts_stay_one_square_a_kind() -> None:
    rows = [
        {
            "name": f"model.layers.{n}.mlp.experts.{e}.up_proj.weight",
            "status": "values",
            "relative_difference": 0.3 if (n, e) == (7, 2) else 0.0,
        }
        for n in range(80)
        for e in range(4)
    ]
    squares = [a for t, a in Tags(page(document(), {"tensors": rows})).found if t == "rect"]
    assert [str(a["class"]).strip() for a in squares].count("d5") == 1
    assert len(squares) == 80


def test_figures_that_are_no_numbers_do_not_break_the_page() -> None:
    rows: list[Any] = [
        {"name": "a", "status": "values", "relative_difference": "nan"},
        {"name": "b"},
        {"name": 3},
        "junk",
        None,
    ]
    text = page(
        document(
            forward={"loss": "nan", "reference_loss": 2.0},
            findings=["junk", finding("V01", ["a"], evidence={"x": [1, None]})],
        ),
        {"tensors": rows},
    )
    Tags(text)
    assert "not finite" in text


def test_the_command_writes_the_page_and_keeps_an_older_one(tmp_path: Path) -> None:
    source, out = tmp_path / "findings.json", tmp_path / "page.html"
    source.write_text(json.dumps(document()))
    assert report(str(source), out=out) == 0
    assert "nothing wrong found" in out.read_text()
    with pytest.raises(TensorkeepError, match="exists"):
        report(str(source), out=out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": 3}', '{"schema": 9, "findings": []}'])
def test_what_is_no_diagnosis_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(TensorkeepError):
        write_page(tmp_path / "x.json", tmp_path / "page.html")
    with pytest.raises(TensorkeepError, match="folder"):
        write_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
