"""Recipes: frozen dataclasses read from YAML, one file a task; `build(recipe)` makes the job of a run."""
