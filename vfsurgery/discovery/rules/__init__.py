"""Coupling rules, one file per family of ops; importing this package registers them all."""

from vfsurgery.rules import attention as attention
from vfsurgery.rules import combine as combine
from vfsurgery.rules import contraction as contraction
from vfsurgery.rules import conv as conv
from vfsurgery.rules import linear as linear
from vfsurgery.rules import movement as movement
from vfsurgery.rules import norm as norm
from vfsurgery.rules import pointwise as pointwise
from vfsurgery.rules import pool as pool
from vfsurgery.rules import recurrent as recurrent
from vfsurgery.rules import weights as weights
from vfsurgery.rules.registry import rule as rule
from vfsurgery.rules.registry import rule_for as rule_for
from vfsurgery.rules.registry import ruled_modules as ruled_modules
