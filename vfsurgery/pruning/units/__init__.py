"""Structured pruning: whole units leave all places of their permutation group, and a smaller plain model is left."""

from vfsurgery.pruning.units.prune_units import prune_units as prune_units
from vfsurgery.pruning.units.report import UnitPruneReport as UnitPruneReport
