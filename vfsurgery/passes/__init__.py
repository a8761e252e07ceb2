"""Passes: the steps of surgery, one file each, and the normalizations by name."""

from collections.abc import Callable

from vfsurgery.passes.average import Average as Average
from vfsurgery.passes.base import Context as Context
from vfsurgery.passes.base import Pass as Pass
from vfsurgery.passes.base import Pipeline as Pipeline
from vfsurgery.passes.calibrate_biases import CalibrateBiases as CalibrateBiases
from vfsurgery.passes.closed_form import ClosedFormRepair as ClosedFormRepair
from vfsurgery.passes.fold import Fold as Fold
from vfsurgery.passes.mask import KeepZeros as KeepZeros
from vfsurgery.passes.mask import Mask as Mask
from vfsurgery.passes.preserve import Preserve as Preserve
from vfsurgery.passes.recalibrate import Reset as Reset
from vfsurgery.passes.regress import Regress as Regress
from vfsurgery.passes.remove_biases import RemoveBiases as RemoveBiases
from vfsurgery.passes.renormalize import Repair as Repair
from vfsurgery.passes.renormalize import Rescale as Rescale
from vfsurgery.passes.renormalize import Reshift as Reshift
from vfsurgery.registry import Registry

NORMALIZATIONS: Registry[Callable[[], Pass]] = Registry("renormalization")
"""Normalizations by name; a class or function that makes a pass."""

for _normalization in (Reset, Repair, ClosedFormRepair, Rescale, Reshift, CalibrateBiases, RemoveBiases, Regress):
    NORMALIZATIONS.register(_normalization.name)(_normalization)
