"""Every command line that a page shows is one that the program takes: the command, its flags, its recipe's fields."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.cli import COMMANDS, GROUPS, main
from tensorkeep.commands.train_language import pairs_of
from tensorkeep.training.shipped import shipped
from tests.tools import ROOT

TOP = [ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md")), *TOP]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:torchrun|tensorkeep) [^`]+)`")
FIGURE = re.compile(r"\d(?:[\d,]*\d)?(?:\.\d+)?")


def commands(page: Path) -> list[list[str]]:
    """The words of every command of this program in a page's ```bash blocks, and behind `$` in its ```console ones."""
    found = []
    for language, block in FENCE.findall(page.read_text()):
        start = {"bash": "", "console": "$ "}.get(language)
        if start is not None:
            lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
            found += [
                words for line in lines if line.startswith(start) and (words := words_of(line.removeprefix(start)))
            ]
    return found


def mentioned(page: Path) -> list[list[str]]:
    """The words of the commands that a page's sentences show, whole ones: `...` stands for what is left out."""
    text = " ".join(FENCE.sub("", page.read_text()).split())
    return [words for shown in INLINE.findall(text) if "..." not in shown and (words := words_of(shown))]


def words_of(line: str) -> list[str]:
    """What follows `tensorkeep`, alone or under torchrun; nothing for another program.

    >>> words_of("torchrun --nproc-per-node 8 -m tensorkeep train language RECIPE # eight of them")
    ['train', 'language', 'RECIPE']
    """
    if not line.startswith(("tensorkeep ", "torchrun ")) or "tensorkeep" not in line:
        return []
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    return words[words.index("tensorkeep") + 1 :]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Any]:
    """The command line's own parser, and nothing carried out: what the command would be called with."""
    from cyclopts import App

    bound: list[Any] = []

    def only_parse(app: App, words: list[str], **options: Any) -> int:
        bound.append(app.parse_args(words, **options)[1])
        return 0

    monkeypatch.setattr(App, "__call__", only_parse)
    monkeypatch.chdir(ROOT)

    def parsed(words: list[str]) -> Any:
        code = main(words)
        assert code == 0, f"tensorkeep {shlex.join(words)}: {capsys.readouterr().err}"
        return bound[-1]

    return parsed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page: Path, parse: Callable[[list[str]], Any]) -> None:
    for words in commands(page):
        call = parse(words)
        assert " ".join(words[:2]) in COMMANDS or words[0] in COMMANDS, words
        if words[0] == "train":
            check_recipe(words[1], call)
    for words in mentioned(page):
        if words in [["--version"], *([group] for group in GROUPS)]:
            continue
        names = [command for command in COMMANDS if words[: len(command.split())] == command.split()]
        assert names, words
        if len(words) > len(names[0].split()):  # more than the command's name: all that it needs
            parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_in_a_block_that_nothing_checks(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        assert language in ("bash", "console") or not any(map(words_of, block.splitlines())), block


def test_a_command_is_found_wherever_a_page_shows_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `tensorkeep\nverify runs/a --json` or `tensorkeep train ...`.\n"
        "```bash\ntensorkeep inspect a  # what\ntorchrun -m tensorkeep diff a \\\n  b\nmake demo\n```\n"
        "```console\n$ tensorkeep verify b\ntensorkeep is output\n```\n"
    )
    assert commands(page) == [["inspect", "a"], ["diff", "a", "b"], ["verify", "b"]]
    assert mentioned(page) == [["verify", "runs/a", "--json"]]


def check_recipe(kind: str, call: Any) -> None:
    """The changes of a `train` command, on the recipe it names where that is one of ours."""
    recipe, *changes = call.args
    pairs = [(name.replace("-", "_"), text) for name, text in pairs_of(changes)]
    if str(recipe) not in {known.name for known in shipped()}:
        own = recipe.suffix == ".yaml" or str(recipe).isupper()  # of the reader: own.yaml, RECIPE
        assert own and recipe.parts[0] != "recipes", f"{recipe} is not there"
    elif kind == "detection":
        from tensorkeep.detection.recipe.text import read_recipe

        read_recipe(recipe, pairs)
    else:
        pytest.importorskip("transformers")
        from tensorkeep.language.recipe_text import read_language

        read_language(recipe, pairs)


def test_a_flag_or_field_that_does_not_exist_is_found(parse: Callable[[list[str]], Any]) -> None:
    with pytest.raises(AssertionError, match="--no-such-flag"):
        parse(["verify", "runs/qlora", "--no-such-flag"])
    with pytest.raises(AssertionError):
        parse(["no-such-command"])
    words = ["train", "detection", "own_data", "--training.no_such_field", "1"]
    with pytest.raises(Exception, match="no_such_field"):
        check_recipe("detection", parse(words))


@pytest.mark.parametrize("chinese", sorted((ROOT / "docs/guides").glob("*.zh.md")), ids=lambda page: page.name)
def test_a_guide_has_the_same_blocks_of_code_and_sections_in_both_languages(chinese: Path) -> None:
    english = chinese.with_name(chinese.name.replace(".zh", ""))
    assert commands(english) == commands(chinese)
    pages = [page.read_text() for page in (english, chinese)]
    found = [re.findall(r"^ *```(?!text)\w+\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL) for page in pages]
    code = [
        [re.sub(r" +# .*", "", block) for block in blocks] for blocks in found
    ]  # comments are in the page's language
    assert code[0] == code[1] and code[0]
    heads = [re.findall(r"^#+ ", page, re.MULTILINE) for page in pages]
    assert heads[0] == heads[1]


def test_the_guide_has_a_command_behind_every_trouble_in_both_languages() -> None:
    pages = [ROOT / "docs/guides/qlora.md", ROOT / "docs/guides/qlora.zh.md"]
    english, chinese = (commands(page) for page in pages)
    assert english == chinese and len(english) > 20
    for page in pages:
        troubles = re.split(r"^\*\*", page.read_text(), flags=re.MULTILINE)[1:]
        assert len(troubles) == 8 and all("```bash\ntensorkeep " in trouble for trouble in troubles)
        rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
        assert len(rows) > 25
    lines = [[line for line in page.read_text().splitlines() if line.startswith("|")] for page in pages]
    tables = [[sorted(FIGURE.findall(line)) for line in page] for page in lines]  # words come in another order
    assert tables[0] == tables[1]


def test_the_guides_parameter_table_is_what_the_recipes_build() -> None:
    torch = pytest.importorskip("torch")
    from dataclasses import replace

    from tensorkeep.detection import Detector, count_parameters, read_detector_config
    from tensorkeep.detection.model.config import AdapterConfig, LoraConfig

    text = (ROOT / "docs/guides/qlora.md").read_text()
    for size in ("S", "B", "L", "H", "v2-g"):
        (line,) = re.findall(rf"^\| {size} \| (\d.*) \|$", text, re.MULTILINE)
        shown = [int(figure.replace(",", "")) for figure in FIGURE.findall(line)]
        word = size.lower().replace("-", "_")
        config = read_detector_config(f"adatad_thumos_videomae_{word}")
        counted = []
        for kind in ("tia", "plain", "lora", "qlora"):
            adapter = None if kind == "lora" else AdapterConfig(kind)  # type: ignore[arg-type]
            lora = LoraConfig(lora_r=16) if kind == "lora" else None
            assert config.backbone is not None
            with torch.device("meta"):
                detector = Detector(replace(config, backbone=replace(config.backbone, adapter=adapter, lora=lora)))
            counts = count_parameters(detector)
            counted += [counts["vit"].total] if kind == "tia" else []
            counted += list(counts["adapter"]) if kind == "qlora" else [counts["adapter"].trainable]
        assert shown == counted, size
