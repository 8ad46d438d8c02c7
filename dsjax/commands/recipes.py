"""Recipes from files: a recipe is a function `recipe() -> Run`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dsjax.config import Run

CONFIGS = Path(__file__).parents[2] / "configs"


def load_recipe(path: Path) -> Run:
    """The `Run` that a recipe file's `recipe()` returns; ValueError if it is not such a file."""
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}: give a file such as configs/tiny.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: recipes are functions `recipe() -> Run`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        run = module.recipe() if hasattr(module, "recipe") else None
    except Exception as problem:  # whatever a user's file may raise
        raise ValueError(f"{path} cannot be used: {type(problem).__name__}: {problem}") from problem
    if not isinstance(run, Run):
        raise ValueError(f"{path} has no function recipe() that returns a dsjax.config.Run")
    return run


def take_recipe(arguments: list[str]) -> tuple[Run, list[str]]:
    """The recipe named first (tiny if none is) and the rest of the command line.

    ValueError if the file named is no recipe.
    """
    if arguments and not arguments[0].startswith("-"):
        return load_recipe(Path(arguments[0])), arguments[1:]
    return load_recipe(CONFIGS / "tiny.py"), arguments
