"""Permutation groups as values, the algebra of axes that they are found by, and what an order does to weights."""

from vfsurgery.groups.groupset import Entries as Entries
from vfsurgery.groups.groupset import GroupSet as GroupSet
from vfsurgery.groups.groupset import Member as Member
from vfsurgery.groups.groupset import Permutation as Permutation
from vfsurgery.groups.groupset import PermutationGroup as PermutationGroup
from vfsurgery.groups.groupset import Permutations as Permutations
from vfsurgery.groups.groupset import PinnedAxis as PinnedAxis
from vfsurgery.groups.groupset import gather_index as gather_index
from vfsurgery.groups.groupset import permute_tensor as permute_tensor
from vfsurgery.groups.groupset import random_permutations as random_permutations
