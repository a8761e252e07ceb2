"""Repair of compressed networks after the network that each was made from."""

from vfsurgery.renormalizing.repair import Choice as Choice
from vfsurgery.renormalizing.repair import passes_named as passes_named
from vfsurgery.renormalizing.repair import renormalize as renormalize
from vfsurgery.renormalizing.report import RenormalizeReport as RenormalizeReport
