"""Passes: the steps of surgery, one file each, and all of them by name."""

from vfsurgery.passes.average import Average as Average
from vfsurgery.passes.base import Context as Context
from vfsurgery.passes.base import Pass as Pass
from vfsurgery.passes.calibrate_biases import CalibrateBiases as CalibrateBiases
from vfsurgery.passes.centre_writers import CentreWriters as CentreWriters
from vfsurgery.passes.closed_form import ClosedFormRepair as ClosedFormRepair
from vfsurgery.passes.closed_form_reset import ClosedFormReset as ClosedFormReset
from vfsurgery.passes.drop_dead_biases import DropDeadBiases as DropDeadBiases
from vfsurgery.passes.fold import Fold as Fold
from vfsurgery.passes.fold_scales import FoldLayerScales as FoldLayerScales
from vfsurgery.passes.fold_scales import FoldNormScales as FoldNormScales
from vfsurgery.passes.mask import KeepZeros as KeepZeros
from vfsurgery.passes.mask import Mask as Mask
from vfsurgery.passes.pipeline import Pipeline as Pipeline
from vfsurgery.passes.preserve import Preserve as Preserve
from vfsurgery.passes.recalibrate import Reset as Reset
from vfsurgery.passes.registry import NORMALIZATIONS as NORMALIZATIONS
from vfsurgery.passes.registry import PASSES as PASSES
from vfsurgery.passes.registry import build_pass as build_pass
from vfsurgery.passes.registry import pass_as_mapping as pass_as_mapping
from vfsurgery.passes.registry import pass_options as pass_options
from vfsurgery.passes.registry import register_pass as register_pass
from vfsurgery.passes.regress import Regress as Regress
from vfsurgery.passes.remove_biases import RemoveBiases as RemoveBiases
from vfsurgery.passes.renormalize import Repair as Repair
from vfsurgery.passes.renormalize import Rescale as Rescale
from vfsurgery.passes.renormalize import Reshift as Reshift
from vfsurgery.records.options import Option as Option

for _step in (Average, Preserve, Fold, Reset, Repair, ClosedFormRepair, Rescale, Reshift):
    register_pass(_step)
for _step in (CalibrateBiases, RemoveBiases, Regress, ClosedFormReset):
    register_pass(_step)
for _step in (FoldNormScales, FoldLayerScales, CentreWriters, DropDeadBiases):
    register_pass(_step)
