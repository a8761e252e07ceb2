"""Matchers: find the order of units in which the sources correspond. One file each; all are registered here."""

from vfsurgery.matching.activations import ActivationMatching as ActivationMatching
from vfsurgery.matching.base import MATCHERS as MATCHERS
from vfsurgery.matching.base import Gain as Gain
from vfsurgery.matching.base import Matcher as Matcher
from vfsurgery.matching.base import Matching as Matching
from vfsurgery.matching.base import Problem as Problem
from vfsurgery.matching.cca import CCAMatching as CCAMatching
from vfsurgery.matching.identity import Given as Given
from vfsurgery.matching.identity import Identity as Identity
from vfsurgery.matching.identity import Orders as Orders
from vfsurgery.matching.weights import WeightMatching as WeightMatching
from vfsurgery.matching.zipit import ZipMatching as ZipMatching
