"""Repair of compressed networks after the network that each was made from."""

from vfsurgery.pruning.renormalizing.repair import Choice as Choice
from vfsurgery.pruning.renormalizing.repair import passes_named as passes_named
from vfsurgery.pruning.renormalizing.repair import renormalize as renormalize
from vfsurgery.pruning.renormalizing.report import RenormalizeReport as RenormalizeReport
