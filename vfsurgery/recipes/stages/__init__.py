"""The stages that recipes have: each is one class, entered by one decorator."""

from vfsurgery.recipes.stages import combining as combining
from vfsurgery.recipes.stages import comparing as comparing
from vfsurgery.recipes.stages import looking as looking
from vfsurgery.recipes.stages import surgery as surgery
