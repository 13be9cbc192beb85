"""Temporal action detection: annotations, model, assignment and losses, decoding, suppression, evaluation.

The names below are resolved when first used: evaluation needs numpy alone, and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Annotations": "annotations",
    "read_annotations": "annotations",
    "check_annotations": "annotation_checks",
    "read_detections": "results",
    "write_detections": "results",
    "evaluate": "evaluation",
    "evaluate_files": "evaluation",
    "analyse_errors": "error_analysis",
    "Detector": "detector",
    "DetectorConfig": "detector",
    "build_detector": "detector",
    "count_parameters": "detector",
    "read_detector_config": "detector",
    "VisionTransformer": "vit",
    "VisionTransformerAdapter": "adapters",
    "VisionTransformerQLoRA": "adapters",
    "load_detector": "weights",
    "load_videomae": "weights",
    "quantize_backbone": "quantization",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from tensorkeep.detection.model.adapters import VisionTransformerAdapter as VisionTransformerAdapter
    from tensorkeep.detection.model.adapters import VisionTransformerQLoRA as VisionTransformerQLoRA
    from tensorkeep.detection.data.annotation_checks import check_annotations as check_annotations
    from tensorkeep.detection.data.annotations import Annotations as Annotations
    from tensorkeep.detection.data.annotations import read_annotations as read_annotations
    from tensorkeep.detection.model.detector import Detector as Detector
    from tensorkeep.detection.model.detector import DetectorConfig as DetectorConfig
    from tensorkeep.detection.model.detector import build_detector as build_detector
    from tensorkeep.detection.model.detector import count_parameters as count_parameters
    from tensorkeep.detection.model.detector import read_detector_config as read_detector_config
    from tensorkeep.detection.results.error_analysis import analyse_errors as analyse_errors
    from tensorkeep.detection.results.evaluation import evaluate as evaluate
    from tensorkeep.detection.results.evaluation import evaluate_files as evaluate_files
    from tensorkeep.detection.model.quantization import quantize_backbone as quantize_backbone
    from tensorkeep.detection.results.results import read_detections as read_detections
    from tensorkeep.detection.results.results import write_detections as write_detections
    from tensorkeep.detection.model.vit import VisionTransformer as VisionTransformer
    from tensorkeep.detection.model.weights import load_detector as load_detector
    from tensorkeep.detection.model.weights import load_videomae as load_videomae


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"tensorkeep.detection.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'tensorkeep.detection' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
