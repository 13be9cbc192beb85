"""Bills of materials hold by CycloneDX's own schema and are read by its own library, where that is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tests.helpers import to
from tests.tools import ROOT, TINY

pytest.importorskip("cyclonedx", reason="pip install 'cyclonedx-python-lib[json-validation]'")
ADAPTER = ROOT / "examples" / "tiny-adapter"


def made(tmp_path: Path, form: str) -> Path:
    """A model, an adapter, a merge of both, a GGUF of codes, weights without a config, names of all kinds."""
    place = tmp_path / "model"
    if form == "merge":
        assert main(["merge", str(TINY), str(ADAPTER), str(place), "--identify", "--quiet"]) == 0
    elif form == "gguf":
        place = tmp_path / "model.gguf"
        to(TINY, place, "gguf", dtype="Q8_0")
    elif form == "odd names":
        place = tmp_path / 'a "name" <of> \N{SNOWMAN}'
        shutil.copytree(TINY, place)
        (place / "modeling_ü &.py").write_text("1")
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "architectures": [3]}))
    else:
        shutil.copytree(ADAPTER if form == "adapter" else TINY, place)
        if form == "weights alone":
            (place / "config.json").unlink()
    return place


@pytest.mark.parametrize("form", ["model", "adapter", "merge", "gguf", "weights alone", "odd names"])
def test_a_bill_of_materials_holds_by_the_schema_of_cyclonedx_and_its_library_reads_it(
    form: str, tmp_path: Path
) -> None:
    from cyclonedx.model.bom import Bom
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    place = made(tmp_path, form)
    assert main(["identify", str(place), "--bom", str(tmp_path / "bom.json"), "--quiet"]) == 0
    text = (tmp_path / "bom.json").read_text()
    assert list(JsonStrictValidator(SchemaVersion.V1_6).validate_str(text, all_errors=True) or ()) == []
    component = Bom.from_json(json.loads(text)).metadata.component  # type: ignore[attr-defined]
    assert (component.name, component.type.value) == (place.name, "machine-learning-model")
    if form == "merge":
        assert [a.name for a in component.pedigree.ancestors] == ["adapter", "base"]
