"""What a release rests on: one version everywhere, the workflow that publishes, the forms that ask for `doctor`."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import yaml

import tensorkeep
from tests.tools import ROOT

KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def test_the_version_is_one(project: dict[str, Any]) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = next(x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x.startswith("## ")).split()[1]
    assert project["version"] == tensorkeep.__version__ == cited["version"] == newest


def test_the_changes_are_of_six_kinds_and_none_is_told_twice() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for version in (part for part in versions if not part.startswith("0.1.0")):  # the first is one list
        before, *sections = re.split(r"^### ", version, flags=re.MULTILINE)
        kinds = [section.partition("\n")[0] for section in sections]
        assert not before.partition("\n")[2].strip(), "a change outside of a kind"
        assert all(a < b for a, b in pairwise(KINDS.index(kind) for kind in kinds)), kinds
        assert all(section.partition("\n")[2].strip().startswith("- ") for section in sections)
    entries = [" ".join(entry.split()) for entry in re.split(r"^- |^#.*$", text, flags=re.MULTILINE)]
    beginnings = [entry[:60] for entry in entries if entry]
    assert len(set(beginnings)) == len(beginnings), sorted({x for x in beginnings if beginnings.count(x) > 1})


def test_the_citation_has_what_its_format_asks_for(project: dict[str, Any]) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        cited["cff-version"] == "1.2.0"
        and cited["message"]
        and cited["authors"] == [{"name": cited["authors"][0]["name"]}]
    )
    assert cited["license"] == project["license"] and cited["repository-code"] == project["urls"]["Homepage"]
    assert set(cited["keywords"]) <= set(project["keywords"])


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_a_form_asks_for_the_doctor_in_fields_that_the_site_knows(form: Any) -> None:
    document = yaml.safe_load(form.read_text())
    assert set(document) == {"name", "description", "labels", "body"}
    fields = [part for part in document["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({part["id"] for part in fields}) == len(fields) and all(part["attributes"]["label"] for part in fields)
    (asked,) = (part for part in fields if part["id"] == "doctor")
    assert "`tensorkeep doctor`" in asked["attributes"]["label"]
    assert form.name != "bug.yml" or asked["validations"] == {"required": True}


def test_only_the_job_that_publishes_may_and_it_holds_no_secret() -> None:
    assert len(FORMS) == 2
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    document = yaml.safe_load(text)
    jobs = document["jobs"]
    assert document[True] == {"push": {"tags": ["v*"]}} and document["permissions"] == {}  # YAML 1.1 reads `on` as True
    assert jobs["build"]["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == ["build", "sbom", "newest"]
    assert jobs["publish"]["environment"] == "pypi" and "secrets." not in text and "://" not in text
    assert jobs["sbom"]["permissions"] == {"contents": "read"}
    used = [step["uses"].partition("@")[0] for job in jobs.values() for step in job.get("steps", ()) if "uses" in step]
    assert {name.partition("/")[0] for name in used} == {"actions", "pypa"}


def test_nothing_is_published_whose_wheel_fails_beside_the_newest_of_everything(project: dict[str, Any]) -> None:
    called = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["newest"]
    document = yaml.safe_load((ROOT / called["uses"]).read_text())
    assert {"workflow_call", "schedule"} <= set(document[True]) and document["permissions"] == {}
    (job,) = document["jobs"].values()
    assert job["steps"][-1]["run"] == "python -m benchmarks.wheel ${{ matrix.python }}"
    pythons = [x.rpartition(" ")[2] for x in project["classifiers"] if re.search(r":: 3\.\d+$", x)]
    assert job["strategy"]["matrix"]["python"] == pythons, "every Python that pyproject.toml names"


def test_the_list_of_parts_is_made_by_the_release_and_is_no_file_that_pypi_gets() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert any("make sbom" in step.get("run", "") for step in jobs["sbom"]["steps"])
    kept = [step["with"]["path"] for step in jobs["sbom"]["steps"] if "upload-artifact" in step.get("uses", "")]
    published = [step["with"]["path"] for step in jobs["publish"]["steps"] if "download-artifact" in step["uses"]]
    assert published == ["dist/"] and kept == ["build/sbom/tensorkeep.cdx.json"]
    rule = (ROOT / "Makefile").read_text().partition("\nsbom:")[2].partition("\n\n")[0]
    assert "cyclonedx-py environment" in rule and "--output-reproducible" in rule and kept[0].rpartition("/")[2] in rule


def test_the_list_of_parts_covers_every_extra_that_a_user_installs(project: dict[str, Any]) -> None:
    rule = (ROOT / "Makefile").read_text().partition("\nsbom:")[2]
    covered = set(re.search(r"'\.\[([\w,]+)\]'", rule)[1].split(","))  # type: ignore[index]
    everything = set(project["optional-dependencies"])
    assert everything - covered == {
        "torch",
        "demo",
        "dev",
        "docs",
        "track",
    }  # in language; data; ours; a choice of three
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "cyclonedx-bom" in pinned
