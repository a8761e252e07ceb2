"""Pruning: which weights to set to zero, as values (masks) and by methods that users extend."""

from vfsurgery.pruning.base import PRUNERS as PRUNERS
from vfsurgery.pruning.base import Pruner as Pruner
from vfsurgery.pruning.base import Pruning as Pruning
from vfsurgery.pruning.fisher import DiagonalFisher as DiagonalFisher
from vfsurgery.pruning.masks import Masks as Masks
from vfsurgery.pruning.pruning import prune as prune
from vfsurgery.pruning.pruning import prune_each as prune_each
from vfsurgery.pruning.report import PrunedLayer as PrunedLayer
from vfsurgery.pruning.report import PruneReport as PruneReport
from vfsurgery.pruning.sparsegpt import SparseGPT as SparseGPT
from vfsurgery.pruning.unstructured import Magnitude as Magnitude
from vfsurgery.pruning.unstructured import Random as Random
from vfsurgery.pruning.wanda import Wanda as Wanda
from vfsurgery.pruning.woodfisher import WoodFisher as WoodFisher
