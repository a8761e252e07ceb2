"""Soups: averages of networks that were fine-tuned from one, at once or in phases with pruning."""

from vfsurgery.soups.averaging import SoupReport as SoupReport
from vfsurgery.soups.averaging import soup as soup
from vfsurgery.soups.phases import Retraining as Retraining
from vfsurgery.soups.phases import SparseSoup as SparseSoup
from vfsurgery.soups.phases import sparse_soup as sparse_soup
