from __future__ import annotations

import pytest
import torch

from tensorkeep.detection.model.config import AdapterConfig, LoraConfig
from tensorkeep.detection.model.groups import OptimizerConfig, detector_groups, make_optimizer
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.sections import GroupRule
from tests.detection import tiny


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    detector = tiny.detector()
    groups = detector_groups(detector, OptimizerConfig())
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in detector.named_parameters() if p.requires_grad)
    assert [group["label"] for group in groups] == [
        "adapter",
        "detector weights",
        "detector biases, norms and scales",
    ]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.05, 0.0]
    assert all(p.ndim > 1 for p in groups[1]["params"])


def test_an_empty_rule_is_an_error_that_names_the_rule_before_it() -> None:
    detector = tiny.detector(adapter=AdapterConfig("qlora", lora_r=2))
    config = OptimizerConfig(groups=(GroupRule("adapter", 2e-4), GroupRule("lora_*", 1e-4)))
    with pytest.raises(TensorkeepError, match="'adapter': put 'lora_\\*' before it"):
        detector_groups(detector, config)
    turned = OptimizerConfig(groups=config.groups[::-1])
    assert [group["label"] for group in detector_groups(detector, turned)[:2]] == ["lora_*", "adapter"]
    with pytest.raises(TensorkeepError, match="no trainable parameter has that name"):
        detector_groups(tiny.detector(), OptimizerConfig(groups=(GroupRule("lora_*", 1e-4),)))


def test_trainable_backbone_weights_outside_every_rule_are_an_error() -> None:
    detector = tiny.detector(lora=LoraConfig(lora_r=2))
    with pytest.raises(TensorkeepError, match="in no group"):
        detector_groups(detector, OptimizerConfig())
    everything = OptimizerConfig(groups=(GroupRule("^backbone", 1e-5),))
    assert detector_groups(tiny.detector(adapter=None, tuning="all"), everything)[0]["label"] == "^backbone"


def test_a_new_kind_of_layer_must_say_whether_it_decays() -> None:
    detector = tiny.detector()
    detector.neck.extra = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(TensorkeepError, match="no decay rule"):
        detector_groups(detector, OptimizerConfig())


def test_the_optimizer_keeps_names_beside_parameters() -> None:
    optimizer = make_optimizer(tiny.detector(), OptimizerConfig(lr=3e-4))
    assert all(len(group["names"]) == len(group["params"]) for group in optimizer.param_groups)
    assert [group["base_lr"] for group in optimizer.param_groups] == [2e-4, 3e-4, 3e-4]
