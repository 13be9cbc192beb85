"""Language models: texts as tokens, recipes, and the jobs that train, evaluate and continue them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.language.evaluation import evaluate_checkpoint as evaluate_checkpoint
    from tensorkeep.language.generation import generate as generate
    from tensorkeep.language.job import build as build
    from tensorkeep.language.job import loop_of as loop_of
    from tensorkeep.language.recipe import LanguageRecipe as LanguageRecipe
    from tensorkeep.language.recipe_text import read_language as read_language

_WHERE = {
    "LanguageRecipe": "recipe",
    "build": "job",
    "evaluate_checkpoint": "evaluation",
    "generate": "generation",
    "loop_of": "job",
    "read_language": "recipe_text",
}
__all__ = ["LanguageRecipe", "build", "evaluate_checkpoint", "generate", "loop_of", "read_language"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
