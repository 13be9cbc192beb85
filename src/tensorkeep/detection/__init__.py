"""Temporal action detection: videos, the detector, its losses, detections and their evaluation.

Evaluation needs numpy alone, and loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.detection.data.annotation_checks import check_annotations as check_annotations
    from tensorkeep.detection.data.annotations import Annotations as Annotations
    from tensorkeep.detection.data.annotations import read_annotations as read_annotations
    from tensorkeep.detection.job import build as build
    from tensorkeep.detection.model.backbones import VisionTransformerAdapter as VisionTransformerAdapter
    from tensorkeep.detection.model.backbones import VisionTransformerQLoRA as VisionTransformerQLoRA
    from tensorkeep.detection.model.config import DetectorConfig as DetectorConfig
    from tensorkeep.detection.model.detector import Detector as Detector
    from tensorkeep.detection.model.detector import build_detector as build_detector
    from tensorkeep.detection.model.detector import count_parameters as count_parameters
    from tensorkeep.detection.model.detector import read_detector_config as read_detector_config
    from tensorkeep.detection.model.quantization import quantize_backbone as quantize_backbone
    from tensorkeep.detection.model.vit import VisionTransformer as VisionTransformer
    from tensorkeep.detection.model.weights import load_videomae as load_videomae
    from tensorkeep.detection.recipe.schema import DetectionRecipe as DetectionRecipe
    from tensorkeep.detection.recipe.text import read_recipe as read_recipe
    from tensorkeep.detection.results.error_analysis import analyse_errors as analyse_errors
    from tensorkeep.detection.results.evaluation import evaluate as evaluate
    from tensorkeep.detection.results.evaluation import evaluate_files as evaluate_files
    from tensorkeep.detection.results.results import read_detections as read_detections
    from tensorkeep.detection.results.results import write_detections as write_detections
    from tensorkeep.detection.start import load_detector as load_detector
    from tensorkeep.detection.start import open_detector as open_detector

_WHERE = {
    "Annotations": "data.annotations",
    "DetectionRecipe": "recipe.schema",
    "Detector": "model.detector",
    "DetectorConfig": "model.config",
    "VisionTransformer": "model.vit",
    "VisionTransformerAdapter": "model.backbones",
    "VisionTransformerQLoRA": "model.backbones",
    "analyse_errors": "results.error_analysis",
    "build": "job",
    "build_detector": "model.detector",
    "check_annotations": "data.annotation_checks",
    "count_parameters": "model.detector",
    "evaluate": "results.evaluation",
    "evaluate_files": "results.evaluation",
    "load_detector": "start",
    "load_videomae": "model.weights",
    "open_detector": "start",
    "quantize_backbone": "model.quantization",
    "read_annotations": "data.annotations",
    "read_detections": "results.results",
    "read_detector_config": "model.detector",
    "read_recipe": "recipe.text",
    "write_detections": "results.results",
}
__all__ = [
    "Annotations",
    "DetectionRecipe",
    "Detector",
    "DetectorConfig",
    "VisionTransformer",
    "VisionTransformerAdapter",
    "VisionTransformerQLoRA",
    "analyse_errors",
    "build",
    "build_detector",
    "check_annotations",
    "count_parameters",
    "evaluate",
    "evaluate_files",
    "load_detector",
    "load_videomae",
    "open_detector",
    "quantize_backbone",
    "read_annotations",
    "read_detections",
    "read_detector_config",
    "read_recipe",
    "write_detections",
]
__getattr__, __dir__ = lazy(__name__, _WHERE)
