"""Soups: averages of networks that were fine-tuned from one, at once or in phases with pruning."""

from vfsurgery.combining.soups.averaging import SoupReport as SoupReport
from vfsurgery.combining.soups.averaging import soup as soup
from vfsurgery.combining.soups.phases import Retraining as Retraining
from vfsurgery.combining.soups.phases import SparseSoup as SparseSoup
from vfsurgery.combining.soups.phases import sparse_soup as sparse_soup
