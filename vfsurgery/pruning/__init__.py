"""Pruning: which weights to set to zero, as values (masks) and by methods that users extend."""

from vfsurgery.pruning.masks import Masks as Masks
