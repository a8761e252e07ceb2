"""Soups: averages of networks that were fine-tuned from one, at once or in phases with pruning."""

from vfsurgery.scoring.soups.averaging import SoupReport as SoupReport
from vfsurgery.scoring.soups.averaging import soup as soup
from vfsurgery.scoring.soups.phases import Retraining as Retraining
from vfsurgery.scoring.soups.phases import SparseSoup as SparseSoup
from vfsurgery.scoring.soups.phases import sparse_soup as sparse_soup
