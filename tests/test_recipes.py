"""Every recipe parses, says what it expects, and stands in the index."""

from pathlib import Path

import pytest
import yaml

from hftl.config.recipe import Recipe

ROOT = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipe_parses(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.arms
    assert path.read_text(encoding="utf-8").startswith("# "), "a header says what it is"
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict(), "the resolved recipe means the same"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipe_stands_in_the_index(path: Path) -> None:
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    assert path.relative_to(ROOT).as_posix() in index


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5
