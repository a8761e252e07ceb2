"""Draws the pictures of the gallery: runs each recipe, in its reduced form if it has one, and keeps its last plot as
`docs/images/recipes/NAME.png`: `python docs/figures/recipes.py` (CPU minutes; names of files below recipes/ choose)."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from vfsurgery import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES, PICTURES = ROOT / "recipes", ROOT / "docs" / "images" / "recipes"
WIDTH, COLOURS = 900, 64


def small_enough(recipe: Recipe) -> bool:
    """Whether a recipe trains on data that comes along."""
    return recipe.data is not None and recipe.data.name == "digits"


def draw(path: Path) -> None:
    """Run one recipe in a folder that is thrown away, but for a picture."""
    recipe = Recipe.from_yaml(path)
    recipe = Recipe.from_yaml(path, reduced=True) if recipe.reduced else recipe
    if not small_enough(recipe):
        print(path.name, "needs data of yours")
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe.run(folder, progress=False)
        plots = sorted(Path(folder).glob("*.png"))
        if not plots:  # soups
            print(path.name, "draws nothing")
            return
        with Image.open(plots[-1]) as plot:
            height = round(WIDTH * plot.height / plot.width)
            picture = plot.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(COLOURS)
    name = "_".join(path.relative_to(RECIPES).with_suffix("").parts)
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture.save(PICTURES / f"{name}.png", optimize=True)
    print(path.name, "drawn")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=sorted(RECIPES.rglob("*.yaml")))
    for path in parser.parse_args().paths:
        draw(path.resolve())
