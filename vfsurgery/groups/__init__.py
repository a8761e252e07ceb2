"""Permutation groups as values, the algebra of axes that they are found by, and what an order does to weights."""

from vfsurgery.groups.applying import Entries as Entries
from vfsurgery.groups.applying import gather_index as gather_index
from vfsurgery.groups.applying import permute_tensor as permute_tensor
from vfsurgery.groups.groupset import Centring as Centring
from vfsurgery.groups.groupset import Folding as Folding
from vfsurgery.groups.groupset import GroupSet as GroupSet
from vfsurgery.groups.groupset import Member as Member
from vfsurgery.groups.groupset import PermutationGroup as PermutationGroup
from vfsurgery.groups.groupset import PinnedAxis as PinnedAxis
from vfsurgery.groups.groupset import Reader as Reader
from vfsurgery.groups.groupset import random_permutations as random_permutations
from vfsurgery.groups.permutations import Permutation as Permutation
from vfsurgery.groups.permutations import Permutations as Permutations
from vfsurgery.groups.symmetries import Symmetry as Symmetry
