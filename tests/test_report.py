"""The pages of documents are complete, load nothing, stay small, and never take a name from a file as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.cli import main
from tensorkeep.commands.report import differences, merged, report
from tensorkeep.commands.report._heatmap import Cell, cells
from tensorkeep.commands.report.diagnosis import page
from tensorkeep.commands.report.documents import page_of
from tensorkeep.errors import TensorkeepError
from tests.tools import ROOT

EVIL = "</title><script>alert(1)</script>.layers.0.\x1b[2J\"'><img src=x onerror=alert(2)>.weight"
VOID = {"meta", "br", "img", "input", "wbr"}


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


def is_harmless(text: str) -> None:
    """One script, the page's own, which its policy names by digest; nothing that runs or loads anything else."""
    tags = Tags(text).found
    (own,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    (policy,) = [a["content"] for t, a in tags if t == "meta" and "http-equiv" in a]
    assert policy and f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'; ")
    assert [t for t, _ in tags].count("script") == 1
    assert not {t for t, _ in tags} & {"link", "iframe", "object", "image", "use", "base", "form"}
    assert all(str(a.get("src")).startswith("data:image/jpeg;base64,") for t, a in tags if t == "img")
    assert all(str(a["href"]).startswith("#") for _, a in tags if "href" in a)
    assert not [a for _, attrs in tags for a in attrs if a.startswith("on") or a in ("xlink:href", "style")]
    outside = text.replace(own, "")
    assert "\x1b" not in text and not re.search(r"url\(|@import|https?://", outside)


def test_nothing_of_a_hostile_name_becomes_markup_and_nothing_is_loaded() -> None:
    row = {"name": EVIL, "status": "only_a", "relative_difference": None, "a": {"dtype": EVIL, "shape": [EVIL]}}
    findings = [
        finding(EVIL, [EVIL], message=EVIL, evidence={EVIL: {EVIL: EVIL}}, fix=EVIL, explains=[EVIL], severity=EVIL)
    ]
    sick = document(checkpoint=EVIL, reference=EVIL, verdict=EVIL, causes=[EVIL], findings=findings)
    is_harmless(page(sick, {"tensors": [row]}))
    moved = {"name": EVIL, "status": "values", "relative_difference": 1.0, "same_rows_in_another_order": True}
    is_harmless(differences.page({"a": EVIL, "b": EVIL, "tensors": [row, moved], "identities": {"a": EVIL}}))
    made = {"sink": EVIL, "base": {"path": EVIL, "digest": EVIL}, "onto": EVIL, "quantization": EVIL}
    made |= {"adapters": [{"path": EVIL, "kind": EVIL, "weight": EVIL}], "notes": [{"code": EVIL, "message": EVIL}]}
    made |= {"merged": [{"name": EVIL, "change": 0.1, "kept": 0.5, "kind": EVIL}], "proof": {"target": EVIL}}
    layers = [{"name": EVIL, "error": 0.1}]
    is_harmless(merged.page(made | {"rounded": {"kl": {"base": EVIL}, "loss": EVIL, "layers": layers}}))


def test_both_colour_schemes_are_there() -> None:
    assert "color-scheme: light dark" in page(document()) and "light-dark(" in page(document())


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


def test_a_thousand_layers_fit_and_the_worst_of_them_is_seen() -> None:
    rows = [
        {
            "name": f"model.layers.{n}.self_attn.{kind}_proj.weight",
            "status": "equal" if n != 777 else "values",
            "relative_difference": 0.0 if n != 777 else 5.0,
        }
        for n in range(1000)
        for kind in "qkvo"
    ]
    text = differences.page({"a": "x", "b": "y", "tensors": rows})
    squares = [str(a["class"]).strip() for t, a in Tags(text).found if t == "rect"]
    assert len(squares) == 4 * 125 and squares.count("d6") == 4
    assert "layer 776 to 783, the worst: model.layers.777.self_attn.q_proj.weight, relative difference 5" in text
    assert "8 layers share a square" in text and len(text) < 200_000


def test_a_diff_says_what_changed_kind_by_kind_and_layer_by_layer() -> None:
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    rows = [{"name": n, "status": "values", "relative_difference": 0.01 * (i + 1)} for i, n in enumerate(names)]
    rows += [{"name": "lm_head.weight", "status": "shape", "a": {"dtype": "F32", "shape": [3, 2]}, "b": None}]
    rows += [{"name": "model.norm.weight", "status": "equal", "relative_difference": 0.0}]
    text = differences.page({"a": "x", "b": "y", "tensors": rows, "identities": {"a": "ab", "b": None}})
    cells = [plain(row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["model.layers.*.mlp.up_proj.weight", "4", "4 other values", "0.01", "0.04"] in cells
    assert ["model.layers.2", "1", "", "model.layers.2.mlp.up_proj.weight", "0.03"] in cells
    assert ["lm_head.weight", "another shape", "F32 [3, 2]", "-"] in cells
    assert "5 of 6 tensors differ" in text and "identity of A" in text


def test_a_merge_says_how_far_each_kind_moved_and_what_would_be_kept() -> None:
    rows = [
        {"name": f"model.layers.{n}.self_attn.q_proj.weight", "change": 0.01 * (n + 1), "kept": 0.5, "kind": "LoRA r 4"}
        for n in range(3)
    ]
    text = merged.page({"sink": "out", "merged": rows, "overall": {"change": 0.02, "kept": 0.5}, "proven": True})
    cells = [plain(row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    told = ["model.layers.*.self_attn.q_proj.weight", "LoRA r 4", "3", "1 %", "2 %", "3 %", "50 %", "50 %", "50 %"]
    assert told in cells
    assert "computed twice, read back" in text and "computed twice" not in merged.page({"sink": "x", "merged": rows})
    assert [a["class"] for t, a in Tags(text).found if t == "rect"] == ["d1 ", "d4 ", "d6 "]


def plain(row: str) -> list[str]:
    """The cells of a row as text."""
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"findings": 3}',
        '{"schema": 9, "findings": []}',
        '{"dry_run": true, "steps": []}',
        '{"error": {"message": "no such file"}}',
        '{"results": 3}',
    ],
)
def test_what_is_no_document_of_ours_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    for source in (tmp_path / "x.json", tmp_path):
        assert main(["report", str(source), "-o", str(tmp_path / "page.html")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "hint: " in said
    assert not (tmp_path / "page.html").exists()


def test_what_the_commands_print_becomes_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = (str(ROOT / "examples" / name) for name in ("tiny-llama", "tiny-adapter"))
    out = str(tmp_path / "merged")
    commands = [
        (["merge", model, adapter, out], "<h1>Merge</h1>", "model.layers.*.self_attn.q_proj.weight"),
        (["diff", model, out], "<h1>Comparison</h1>", "4 of 20 tensors differ"),
        (["diagnose", out, "--reference", model], "<h1>Diagnosis</h1>", "tiny-llama"),
        (["verify", out], "<h1>Verification</h1>", "nothing wrong found"),
    ]
    for words, title, told in commands:
        main([*words, "--json"])
        (tmp_path / "x.json").write_text(capsys.readouterr().out)
        text = page_of(tmp_path / "x.json")
        is_harmless(text)
        assert title in text and told in text.replace("<wbr>", "")


def test_flags_that_say_nothing_of_a_source_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": "x", "b": "y", "tensors": []}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    x, run = str(tmp_path / "x.json"), str(tmp_path / "run")
    for words in ([x, "--diff", x], [run, "--diff", x], [run, "--annotations", x], [run, x], ["compare", run], []):
        assert main(["report", *words, "-o", str(tmp_path / "page.html")]) == 2
        assert "hint: " in capsys.readouterr().err and not (tmp_path / "page.html").exists()
