"""Coupling rules, one file per family of ops; importing this package registers them all."""

from vfsurgery.discovery.rules import attention as attention
from vfsurgery.discovery.rules import combine as combine
from vfsurgery.discovery.rules import contraction as contraction
from vfsurgery.discovery.rules import conv as conv
from vfsurgery.discovery.rules import linear as linear
from vfsurgery.discovery.rules import movement as movement
from vfsurgery.discovery.rules import norm as norm
from vfsurgery.discovery.rules import pointwise as pointwise
from vfsurgery.discovery.rules import pool as pool
from vfsurgery.discovery.rules import recurrent as recurrent
from vfsurgery.discovery.rules import weights as weights
from vfsurgery.discovery.rules.registry import rule as rule
from vfsurgery.discovery.rules.registry import rule_for as rule_for
from vfsurgery.discovery.rules.registry import ruled_modules as ruled_modules
