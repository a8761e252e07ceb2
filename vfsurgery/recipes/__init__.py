"""Recipes: surgery written down in YAML, checked, planned and run."""

from vfsurgery.recipes.planning import RecipePlan as RecipePlan
from vfsurgery.recipes.planning import plan as plan
from vfsurgery.recipes.recipe import Recipe as Recipe
from vfsurgery.recipes.recipe import RecipeRun as RecipeRun
