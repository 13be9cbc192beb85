"""OpenTAD configs are read as data: as Python would compute them, nothing executed, nothing silently left out."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep import cli
from tensorkeep.detection.opentad._config_file import read_config
from tensorkeep.detection.opentad._literals import Section, Unknown
from tensorkeep.detection.opentad.recipe import Imported, import_config
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.errors import TensorkeepError
from tests.tools import ROOT

CONFIGS = Path(__file__).parent / "data" / "opentad_configs"
RECIPES = ROOT / "src" / "tensorkeep" / "recipes" / "detection"
ADATAD = (CONFIGS / "adatad_s.py").as_posix()


def values(tmp_path: Path, text: str) -> Section:
    (tmp_path / "c.py").write_text(text, encoding="utf-8")
    return read_config(tmp_path / "c.py").values


def child(tmp_path: Path, text: str, base: str = ADATAD) -> Imported:
    (tmp_path / "c.py").write_text(f"_base_ = [{base!r}]\n{text}\n", encoding="utf-8")
    return import_config(tmp_path / "c.py")


def held(section: Section, name: str) -> Any:
    return dict.__getitem__(section, name)


# -- expressions ------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-99, 99).map(repr), st.floats(-1e3, 1e3, allow_nan=False).map(repr))
texts = st.text(st.characters(codec="utf-8", exclude_characters="{}%"), max_size=6).map(repr)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
            lambda x: f"({x[0]} {x[1]} {x[2]})"
        ),
        inner.map(lambda x: f"-({x})"),
        st.lists(inner, max_size=3).map(lambda x: f"[{', '.join(x)}]"),
        two.map(lambda x: f"({x[0]}, *[{x[1]}])"),
        two.map(lambda x: f"dict(a={x[0]}, **dict(b={x[1]}))"),
        two.map(lambda x: f"{{'a': {x[0]}, 3: {x[1]}}}"),
        inner.map(lambda x: f"[{x}, 1][0]"),
        inner.map(lambda x: f"list(range({x}))"),
        inner.map(lambda x: f'f"<{{{x}}}>"' if '"' not in x and "\\" not in x and "{" not in x else x),
    )


@settings(deadline=None, max_examples=250)
@given(st.recursive(st.one_of(numbers, texts), larger, max_leaves=6))
def test_what_is_evaluated_is_what_python_would_compute(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    try:
        theirs = eval(text, {"__builtins__": {"dict": dict, "list": list, "range": range}})
    except (TypeError, ValueError, ZeroDivisionError, KeyError, IndexError, OverflowError):
        theirs = Unknown
    found = held(values(tmp_path_factory.mktemp("c"), f"x = {text}"), "x")
    if not _holds_unknown(found):  # strictness is allowed here; the next test says what must be known
        assert theirs is not Unknown
        assert (found, repr(_plain(found))) == (theirs, repr(theirs))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in dict.items(value)}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def _holds_unknown(value: Any) -> bool:
    if isinstance(value, Unknown):
        return True
    parts = dict.values(value) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_holds_unknown, parts))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("768 * 4 // 16", 192),
        ("48 / 11 * 1408", 6144.0),
        ("list(range(20, 40))", list(range(20, 40))),
        ("'a' + 'b' * 3", "abbb"),
        ("[1] + [2] * 2", [1, 2, 2]),
        ("(1,) + (2,)", (1, 2)),
        ("-1e-4", -1e-4),
        ("f'exps/{n}_{n:04d}_{r:.2f}'", "exps/7_0007_0.50"),
        ("'%s-%d' % ('a', 3)", "a-3"),
        ("not True", False),
        ("dict(dict(a=1, b=2), b=3)", {"a": 1, "b": 3}),
        ("{'a': 1}['a']", 1),
        ("tuple([1, 2])", (1, 2)),
        ("None", None),
    ],
)
def test_the_forms_that_configs_use_are_known(tmp_path: Path, text: str, expected: object) -> None:
    assert values(tmp_path, f"n, r = 7, 0.5\nx = {text}")["x"] == expected


BOMBS = [
    "a = [1] * 1000\nb = [a] * 1000\nx = [b] * 1000",
    "x = 'x' * 10 ** 9",
    "x = 'x' * 999999999",
    "x = '%999999999d' % 5",
    "x = f'{5:999999999d}'",
    "x = list(range(10 ** 9))",
    "x = list(range(1000000000))",
    "x = 9999999999\n" + "x = x * x\n" * 60,
    "x = [0]\n" + "x = [x, x, x, x]\n" * 40,
    "x = " + "-" * 200 + "1",
    "x = " + "[" * 150 + "]" * 150,
    "x = " + "1+" * 3000 + "1",
    "x = '" + "{{ x }}" + "'",
]


@pytest.mark.parametrize("text", BOMBS)
def test_small_files_cannot_ask_for_much_memory(tmp_path: Path, text: str) -> None:
    try:
        found = held(values(tmp_path, text), "x")
    except TensorkeepError as error:
        assert "c.py" in str(error)
    else:
        assert isinstance(found, Unknown) or len(repr(found)) < 1_000_000


CODE = [
    "x = open({m!r}, 'w').write('run')",
    "x = __import__('pathlib').Path({m!r}).touch()",
    "import pathlib as x",
    "def x():\n    return 1",
    "class x:\n    open({m!r}, 'w')",
    "for x in [1]:\n    open({m!r}, 'w')",
    "x = [open({m!r}, 'w') for _ in [1]]",
    "x = (lambda: 1)()",
    "x = 1 if True else 2",
    "x = (y := 1)",
    "x = 2 ** 3",
    "x = {{1, 2}}",
    "with open({m!r}, 'w') as x:\n    pass",
    "try:\n    x = 1\nexcept Exception:\n    pass",
    "x = 'a'.upper()",
    "x = eval('1')",
    "x = 1\ndel x",
    "x = dict(a=1)\nx.update(a=2)",
    "x = [1]\nx[0] = 2",
    "x = 1\nx += 1",
    "x = dict(a=1)\nx['a'] = 2",
    "x = undefined",
    "dict = 1\nx = dict(a=2)",
    "x = f'{{1!r}}'",
    "x = f'{{2:>{{3}}}}'",
]


@pytest.mark.parametrize("text", CODE)
def test_nothing_is_executed_and_what_code_touches_is_unknown(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "marker"
    config = text.format(m=str(marker))
    (tmp_path / "c.py").write_text(config)
    found = read_config(tmp_path / "c.py")
    unknown = held(found.values, "x")
    assert isinstance(unknown, Unknown) and unknown in found.unknown and unknown.why
    assert unknown.where.startswith(f"{tmp_path / 'c.py'}:")
    assert not marker.exists()


# -- bases ------------------------------------------------------------------------------------------------------------


def test_dictionaries_merge_and_everything_else_replaces(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("d = dict(k=1, l=[1, 2], s=dict(p=1, q=2), t=dict(p=1))\nn = 5")
    text = "_base_ = 'a.py'\nd = dict(l=[3], s=dict(q=[0], r=3), t=dict(_delete_=True, u=1), v=dict(_delete_=True))"
    found = values(tmp_path, f"{text}\nm = _base_.n * 2\nw = {{{{_base_.d.s}}}}")
    assert found["d"] == {"k": 1, "l": [3], "s": {"p": 1, "q": [0], "r": 3}, "t": {"u": 1}, "v": {}}
    assert (found["n"], found["m"], found["w"]) == (5, 10, {"p": 1, "q": 2})
    assert found["d"].lines["k"].endswith("a.py:1") and found["d"].lines["l"].endswith("c.py:2")


@pytest.mark.parametrize(
    "files, what",
    [
        ({"c": "_base_ = 'c.py'"}, "back to itself"),
        ({"c": "_base_ = ['a.py']", "a": "_base_ = ['./b.py']", "b": "_base_ = ['../{d}/c.py']"}, "back to itself"),
        ({"c": "_base_ = ['a.py', 'b.py']", "a": "x = 1", "b": "x = 1"}, "two of its bases set x"),
        ({"c": "_base_ = 'a.py'\nx = dict(a=1)", "a": "x = [1]"}, "a dict here and list in its base"),
        ({"c": "_base_ = 'gone.py'"}, "no such file"),
        ({"c": "_base_ = '.'"}, "not a Python file"),
        ({"c": "_base_ = 'c.yaml'"}, "not a Python file"),
        ({"c": "_base_ = name()"}, "no list of files"),
        ({"c": "_base_ = [1]"}, "no list of files"),
        ({"c": "x = = 1"}, "is not Python"),
        ({"c": "x = 1\0"}, "pars|Python"),
        ({"c": f"x = {'9' * 9000}"}, "Python|pars"),
        ({"c": "#" * (1 << 21)}, "no config"),
        ({f"{'c' * (n + 1)}": f"_base_ = '{'c' * (n + 2)}.py'" for n in range(40)}, "16 levels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_bases_are_one_error_that_names_the_file(tmp_path: Path, files: dict[str, str], what: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text.replace("{d}", tmp_path.name))
    with pytest.raises(TensorkeepError, match=what) as caught:
        read_config(tmp_path / "c.py")
    assert str(tmp_path) in str(caught.value.where)


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, recipe",
    [
        ("adatad_s", "adatad_thumos_videomae_s"),
        ("adatad_b", "adatad_thumos_videomae_b"),
        ("adatad_v2_g", "adatad_thumos_videomae_v2_g"),
        ("anet_s", "adatad_anet_videomae_s"),
    ],
)
def test_an_adatad_config_is_the_recipe_of_the_same_system(config: str, recipe: str) -> None:
    imported = import_config(CONFIGS / f"{config}.py")
    assert imported.recipe == read_recipe(RECIPES / f"{recipe}.yaml")
    assert not imported.lost


def test_features_of_several_folders_are_put_side_by_side(tmp_path: Path) -> None:
    """Shorter files are stretched there, which the recipe says; training may ask for several subsets."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    lines = "_base_ = ['features.py']\ndata_path = ['a/rgb', 'a/flow']\n"
    lines += "dataset = dict(train=dict(subset_name=['training', 'more'], data_path=data_path), "
    lines += "val=dict(data_path=data_path), test=dict(data_path=data_path))\n"
    (tmp_path / "configs" / "several.py").write_text(lines)
    data = import_config(tmp_path / "configs" / "several.py").recipe.data
    assert data.train.folders == data.test.folders == ("a/rgb", "a/flow") and data.feature_rows == "resized"
    assert data.train.subset == ("training", "more") and data.test.subset == "validation"


def test_lists_of_channels_are_a_convolution_of_its_own_for_each_file(tmp_path: Path) -> None:
    """What several trained models predict together is lost: a recipe is one run."""
    lists = "projection=dict(in_channels=[1024, 1408], out_channels=[192, 320])"
    made = child(tmp_path, f"model = dict({lists})", str(CONFIGS / "features.py"))
    projection = made.recipe.model.projection
    assert (projection.in_channels, projection.channels) == (2432, 512)
    assert projection.per_file == ((1024, 192), (1408, 320)) and not made.lost
    fused = "inference = dict(load_from_raw_predictions=True, fuse_list=['a', 'b'])"
    made = child(tmp_path, fused, str(CONFIGS / "features.py"))
    assert [(row.path, row.value) for row in made.lost] == [("inference.fuse_list", ["a", "b"])]
    for odd in (
        "[1024], out_channels=[192, 320]",
        "[1024, 1408], out_channels=512",
        "[1024, '9'], out_channels=[1, 2]",
    ):
        with pytest.raises(TensorkeepError, match="not one number each, nor one for each feature file"):
            child(tmp_path, f"model = dict(projection=dict(in_channels={odd}))", str(CONFIGS / "features.py"))


def test_features_of_whole_videos_are_carried_over() -> None:
    imported = import_config(CONFIGS / "features.py")
    data, recipe = imported.recipe.data, imported.recipe
    assert not imported.lost and recipe.model.backbone is None and recipe.optimizer.groups == ()
    assert (data.inputs, data.mode, data.window_size, data.trunc_thresh) == ("features", "whole", 2304, 0.5)
    assert (data.file_pattern, data.feature_layout, data.offset_frames) == ("{video}_rgb.npy", "tc", 8)
    assert (data.test.subset, data.test.blocked, data.min_length) == ("validation", "data/own/missing.txt", 0.0)
    nms = recipe.post_processing.nms
    assert (nms.method, nms.iou, nms.limit, recipe.post_processing.pre_nms_topk) == ("greedy", 0.5, 200, 5000)
    assert (recipe.training.precision, recipe.training.ema, recipe.training.clip) == ("fp32", None, None)
    assert recipe.evaluation.recall_at == (1, 5) and recipe.evaluation.subset is None


def test_the_seeds_backbone_keeps_its_names() -> None:
    imported = import_config(CONFIGS / "qlora.py")
    assert imported.recipe.model.backbone is not None
    adapter = imported.recipe.model.backbone.adapter
    assert adapter is not None and adapter.kind == "qlora" and adapter.blocks is None
    assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout, adapter.quantize_bits) == (8, 16, 0.05, 8)
    assert not imported.lost and "custom_imports" in {row.path for row in imported.left}


def test_adapters_in_some_blocks_and_of_another_width_stay_so(tmp_path: Path) -> None:
    text = "model = dict(backbone=dict(backbone=dict(adapter_index=[3, 5], adapter_mlp_ratio=1 / 8)))"
    backbone = child(tmp_path, text).recipe.model.backbone
    assert backbone is not None and backbone.adapter is not None
    assert (backbone.adapter.blocks, backbone.adapter.ratio) == ((3, 5), 0.125)


def test_a_frozen_backbone_without_augmentation_stays_so(tmp_path: Path) -> None:
    text = """
model = dict(backbone=dict(backbone=dict(type='VisionTransformer'), custom=dict(freeze_backbone=True)))
optimizer = dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05, paramwise=True)
dataset = dict(train=dict(pipeline=[
    dict(type='PrepareVideoInfo', format='avi'),
    dict(type='LoadFrames', method='random_trunc', trunc_len=768, trunc_thresh=0.5),
    dict(type='Resize', scale=(-1, 160)), dict(type='CenterCrop', crop_size=160),
]), test=dict(pipeline=[dict(type='PrepareVideoInfo', format='avi')] + _base_.dataset.test.pipeline))
"""
    imported = child(tmp_path, text)
    assert imported.recipe.model.backbone is not None and imported.recipe.model.backbone.tuning == "none"
    assert imported.recipe.optimizer.groups == () and imported.recipe.data.augment is None
    assert imported.recipe.data.crop_ratio is None and imported.recipe.data.trunc_thresh == 0.5
    assert [row.value for row in imported.lost] == ["file_pattern"]  # the base's own test videos are mp4


def test_a_rate_of_zero_is_a_frozen_backbone(tmp_path: Path) -> None:
    text = "model = dict(backbone=dict(backbone=dict(type='VisionTransformerCP')))\n"
    for rates, tuning, rules in (("lr=1e-5, weight_decay=0.05", "all", 1), ("lr=0, weight_decay=0", "none", 0)):
        found = child(tmp_path, f"{text}optimizer = dict(backbone=dict(_delete_=True, {rates}))")
        assert found.recipe.model.backbone is not None and found.recipe.model.backbone.adapter is None
        assert (found.recipe.model.backbone.tuning, len(found.recipe.optimizer.groups)) == (tuning, rules)


STEP = "dataset = dict(train=dict(pipeline=_base_.dataset.train.pipeline + [dict(type='{}', p=1)]))"
LOSING = {
    "dataset.train.fps": "dataset = dict(train=dict(fps=30))",
    "dataset.train.pipeline[13].type": STEP.format("mmaction.ThreeCrop"),
    "dataset.train.block_list": "dataset = dict(train=dict(block_list=['a']))",
    "dataset.train.feature_stride": "dataset = dict(train=dict(feature_stride=8))",
    "dataset.train.type": "dataset = dict(train=dict(type='ThumosSlidingDataset'))",
    "dataset.train.pipeline.trunc_len": STEP.format("RandomTrunc").replace("p=1", "trunc_len=384"),
    "dataset.test.pipeline": "dataset = dict(test=dict(pipeline=[dict(type='PrepareVideoInfo'), dict(type='LoadFrames',"
    "method='sliding_window'), dict(type='Resize', scale=(-1, 182)), dict(type='CenterCrop', crop_size=160)]))",
    "model.backbone.backbone.qk_scale": "model = dict(backbone=dict(backbone=dict(qk_scale=0.1)))",
    "model.backbone.backbone.return_feat_map": "model = dict(backbone=dict(backbone=dict(return_feat_map=False)))",
    "model.backbone.custom.pre_processing_pipeline": (
        "model = dict(backbone=dict(custom=dict(pre_processing_pipeline=[])))"
    ),
    "model.rpn_head.surprise": "model = dict(rpn_head=dict(surprise=1))",
    "optimizer.paramwise": "optimizer = dict(paramwise=False)",
    "optimizer.backbone.exclude": "optimizer = dict(backbone=dict(exclude=['norm']))",
    "optimizer.amsgrad": "optimizer = dict(amsgrad=True)",
    "solver.accumulate": "solver = dict(accumulate=4)",
    "scheduler.warmup_start_lr": "scheduler = dict(warmup_start_lr=1e-5)",
    "workflow.val_eval_interval": "workflow = dict(val_eval_interval=-1)",
    "evaluation.type": "evaluation = dict(type='Recall')",
    "post_processing.external_cls.type": "post_processing = dict(external_cls=dict(type='Own', path='p', topk=2))",
    "post_processing.external_cls.apply_softmax": (
        "post_processing = dict(external_cls=dict(type='StandardClassifier', path='p', apply_softmax=True))"
    ),
    "post_processing.nms.sigma": "post_processing = dict(nms=dict(sigma=choose()))",
}


@pytest.mark.parametrize("path", LOSING)
def test_whatever_may_change_the_numbers_is_listed_as_lost(tmp_path: Path, path: str) -> None:
    imported = child(tmp_path, LOSING[path])
    row = next((row for row in imported.lost if row.path == path), None)
    assert row is not None, imported.lost
    assert row.why and path in imported.text()
    assert not child(tmp_path, "").lost


@pytest.mark.parametrize(
    "text, what",
    [
        ("model = dict(type='BMN')", "'BMN' is not one that is built here"),
        ("model = dict(backbone=dict(backbone=dict(type='VisionTransformerTwin')))", "VisionTransformerTwin"),
        ("model = dict(projection=dict(in_channels=width()))", "in_channels = width.. is not evaluated"),
        ("model = dict(projection=dict(max_seq_len='384'))", "expected int"),
        ("model = dict(projection=dict(arch=3))", "not the form"),
        ("dataset = dict(train=dict(type='Mine'))", "'Mine' is not a data set"),
        ("dataset = dict(test=dict(subset_name=['a', 'b']))", "scored on one subset"),
        ("dataset = dict(train=dict(pipeline=[1]))", "not the form"),
        ("optimizer = dict(type='LayerDecayAdamW')", "LayerDecayAdamW"),
        ("optimizer = dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0, paramwise=True)", "lacks 'backbone'"),
        ("solver = dict(_delete_=True)", "lacks 'train'"),
        ("post_processing = dict(nms=dict(sgima=1))", "sgima"),
        ("dataset = dict(train=dict(class_agnostic=True), test=dict(class_agnostic=True))", "head.classes is 20"),
    ],
)
def test_what_cannot_be_a_recipe_is_one_error(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(TensorkeepError, match=what) as caught:
        child(tmp_path, text)
    assert caught.value.exit_code == 2 and ".py" in str(caught.value.where)


def test_damaged_configs_give_a_recipe_or_one_error(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path, dirs_exist_ok=True)
    text = (CONFIGS / "adatad_s.py").read_text()
    draw = random.Random(7)
    words = ["0", "None", "-1", "'x'", "[]", "dict()", "1e400", "{}", "10 ** 9", "f()", "True", ""]
    starts = [place for place, c in enumerate(text) if c in "=(["]
    outcomes = set()
    for _ in range(120):
        at = draw.choice(starts)
        end = min(place for place in (text.find(c, at + 1) for c in ",)]\n") if place > 0)
        (tmp_path / "damaged.py").write_text(text[: at + 1] + draw.choice(words) + text[end:])
        try:
            import_config(tmp_path / "damaged.py").text()
        except TensorkeepError:
            outcomes.add("error")
        else:
            outcomes.add("recipe")
    assert outcomes == {"recipe", "error"}


# -- command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_recipe_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.yaml"
    command = ["recipe", "import", str(CONFIGS / "adatad_s.py"), "-o", str(out)]
    assert cli.main(command) == 0
    text = capsys.readouterr()
    assert "0 settings lost" in text.out and "work_dir" in text.err and "training.seed" in text.err
    assert read_recipe(out) == import_config(CONFIGS / "adatad_s.py").recipe
    assert out.read_text().splitlines()[0].startswith("# From the OpenTAD config adatad_s.py")
    assert cli.main(command) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--quiet"]) == 0 and not capsys.readouterr().err


def test_a_loss_is_exit_code_1_and_is_named_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.yaml"
    assert cli.main(["recipe", "import", str(CONFIGS / "code.py"), "-o", str(out), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    lost = {row["path"]: row for row in document["lost"]}
    assert set(lost) == {"post_processing.nms.sigma", "dataset.train.fps", "dataset.test.window_overlap_ratio"}
    assert lost["post_processing.nms.sigma"]["where"].endswith("code.py:7")
    assert lost["post_processing.nms.sigma"]["value"] == "choose_sigma()"
    assert any(row["where"].endswith("code.py:3") for row in document["left"])  # the import
    recipe = read_recipe(out)
    assert (recipe.post_processing.nms.limit, recipe.post_processing.pre_nms_topk) == (200, 1000)
    assert all("choose_sigma" not in line or line.startswith("#") for line in out.read_text().splitlines())


@pytest.mark.parametrize("config, what", [("bmn", "BMN"), ("branch", "branch.py:2"), ("gone", "no such file")])
def test_bad_input_is_exit_code_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, what: str
) -> None:
    assert cli.main(["recipe", "import", str(CONFIGS / f"{config}.py"), "-o", str(tmp_path / "r.yaml")]) == 2
    assert what in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_text_of_a_config_cannot_leave_its_comment(tmp_path: Path) -> None:
    imported = child(tmp_path, "solver = dict(odd='a\\nmodel: 1\\u2028data: 2\\x85')\nwork_dir = 'x\\r\\ny: 1'")
    (tmp_path / "r.yaml").write_text(imported.text(), encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml") == imported.recipe
    assert set(yaml.safe_load(imported.text())) == {
        "version",
        "model",
        "data",
        "optimizer",
        "schedule",
        "training",
        "post_processing",
        "evaluation",
        "checkpoint",
    }


# -- other backbones --------------------------------------------------------------------------------------------------


def test_side_tuning_is_a_ladder_whose_rule_finds_its_adapters(tmp_path: Path) -> None:
    from tensorkeep.formats.names import matches

    kind = "type='VisionTransformerLadder', adapter_index=list(range(6, 12)), adapter_mlp_ratio=1 / 8"
    made = child(tmp_path, f"model = dict(backbone=dict(backbone=dict({kind})))")
    assert made.lost == [] and made.recipe.model.backbone is not None
    adapter = made.recipe.model.backbone.adapter
    assert adapter is not None and adapter.kind == "ladder"
    assert (adapter.ratio, adapter.blocks) == (0.125, tuple(range(6, 12)))
    (rule,) = made.recipe.optimizer.groups
    assert matches("backbone.ladders.adapters.0.gamma", [rule.pattern])


SWIN = (
    "_delete_=True, type='SwinTransformer3D_inv', patch_size=(2, 4, 4), embed_dim=96, depths=[2, 2, 6, 2], "
    "num_heads=[3, 6, 12, 24], window_size=(8, 7, 7), mlp_ratio=4.0, qkv_bias=True, qk_scale=None, drop_rate=0.0, "
    "attn_drop_rate=0.0, drop_path_rate=0.2, patch_norm=True, inv_mode=['custom_backprop'] * 4"
)
AROUND = (
    "custom=dict(_delete_=True, pretrain='swin.pth', norm_eval=True, freeze_backbone=False, "
    "post_processing_pipeline=[dict(type='Reduce', keys=['feats'], ops='b t c tt h w -> b c tt', reduction='mean'), "
    "dict(type='Interpolate', keys=['feats'], size=768)])"
)


def test_the_reversible_swin_is_read_whole_and_another_one_refused(tmp_path: Path) -> None:
    rest = "projection=dict(in_channels=768)"
    groups = "optimizer = dict(backbone=dict(_delete_=True, lr=1e-5, weight_decay=0.05))"
    made = child(tmp_path, f"model = dict(backbone=dict(backbone=dict({SWIN}), {AROUND}), {rest})\n{groups}")
    backbone = made.recipe.model.backbone
    assert made.lost == [] and backbone is not None and backbone.swin is not None
    assert (backbone.kind, backbone.tuning, backbone.checkpointing) == ("reversible_swin", "all", "reversible")
    assert backbone.freeze_norms and backbone.vit is None and backbone.output_length == 768
    assert (backbone.swin.window, backbone.swin.depths, backbone.swin.drop_path) == ((8, 7, 7), (2, 2, 6, 2), 0.2)
    assert made.recipe.training.pretrained == "swin.pth"
    again = tmp_path / "again.yaml"
    again.write_text(made.text(), encoding="utf-8")
    assert read_recipe(again) == made.recipe
    odd = SWIN.replace("patch_norm=True", "patch_norm=False")
    with pytest.raises(TensorkeepError, match="patch norm"):
        child(tmp_path, f"model = dict(backbone=dict(backbone=dict({odd}), {AROUND}), {rest})\n{groups}")
