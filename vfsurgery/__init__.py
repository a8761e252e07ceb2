"""Model surgery on ``torch.fx`` graphs: align, merge and renormalize separately trained networks.

>>> import torch, vfsurgery as surgery
>>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2))
>>> merged = surgery.merge(a, b, example_inputs=torch.randn(2, 4))
"""

from vfsurgery import rendering as rendering  # registers how values look
from vfsurgery.combining.files import FileReport as FileReport
from vfsurgery.combining.files import combine_files as combine_files
from vfsurgery.combining.soups import SoupReport as SoupReport
from vfsurgery.combining.soups import soup as soup
from vfsurgery.combining.soups.phases import Retraining as Retraining
from vfsurgery.combining.soups.phases import SparseSoup as SparseSoup
from vfsurgery.combining.soups.phases import sparse_soup as sparse_soup
from vfsurgery.discovery.finding import find_groups as find_groups
from vfsurgery.discovery.finding import trace as trace
from vfsurgery.discovery.maps import UnitMap as UnitMap
from vfsurgery.discovery.rules import rule as rule
from vfsurgery.discovery.verification import verify as verify
from vfsurgery.errors import SurgeryError as SurgeryError
from vfsurgery.errors import SurgeryWarning as SurgeryWarning
from vfsurgery.groups import GroupSet as GroupSet
from vfsurgery.groups import Permutation as Permutation
from vfsurgery.groups import PermutationGroup as PermutationGroup
from vfsurgery.hub import push_to_hub as push_to_hub
from vfsurgery.hub import save_folder as save_folder
from vfsurgery.matching import ActivationMatching as ActivationMatching
from vfsurgery.matching import CCAMatching as CCAMatching
from vfsurgery.matching import Given as Given
from vfsurgery.matching import Identity as Identity
from vfsurgery.matching import Matcher as Matcher
from vfsurgery.matching import WeightMatching as WeightMatching
from vfsurgery.matching import ZipMatching as ZipMatching
from vfsurgery.merging.merge import match as match
from vfsurgery.merging.merge import merge as merge
from vfsurgery.passes import ClosedFormRepair as ClosedFormRepair
from vfsurgery.passes import ClosedFormReset as ClosedFormReset
from vfsurgery.passes import Context as Context
from vfsurgery.passes import Pass as Pass
from vfsurgery.passes import Preserve as Preserve
from vfsurgery.passes import Regress as Regress
from vfsurgery.passes import RemoveBiases as RemoveBiases
from vfsurgery.passes import Repair as Repair
from vfsurgery.passes import Rescale as Rescale
from vfsurgery.passes import Reset as Reset
from vfsurgery.passes import Reshift as Reshift
from vfsurgery.passes import build_pass as build_pass
from vfsurgery.passes import pass_as_mapping as pass_as_mapping
from vfsurgery.passes import pass_options as pass_options
from vfsurgery.passes import register_pass as register_pass
from vfsurgery.passes.differences import Difference as Difference
from vfsurgery.passes.differences import diff as diff
from vfsurgery.passes.running import PassReport as PassReport
from vfsurgery.passes.running import run_passes as run_passes
from vfsurgery.passes.toolbox import Editor as Editor
from vfsurgery.passes.toolbox import edit as edit
from vfsurgery.passes.toolbox import measure as measure
from vfsurgery.passes.toolbox import select as select
from vfsurgery.pruning import Masks as Masks
from vfsurgery.pruning import Pruner as Pruner
from vfsurgery.pruning import PruneReport as PruneReport
from vfsurgery.pruning import prune as prune
from vfsurgery.pruning.renormalizing import RenormalizeReport as RenormalizeReport
from vfsurgery.pruning.renormalizing import renormalize as renormalize
from vfsurgery.pruning.units import UnitPruneReport as UnitPruneReport
from vfsurgery.pruning.units import prune_units as prune_units
from vfsurgery.recipes import stages as stages  # registers the stages that recipes have
from vfsurgery.recipes.planning import RecipePlan as RecipePlan
from vfsurgery.recipes.planning import plan as plan
from vfsurgery.recipes.recipe import Recipe as Recipe
from vfsurgery.records.report import MergeReport as MergeReport
from vfsurgery.records.report import Report as Report
from vfsurgery.records.results import report_of as report_of
from vfsurgery.scoring.barriers import barrier as barrier
from vfsurgery.scoring.diagnosis import Diagnosis as Diagnosis
from vfsurgery.scoring.diagnosis import diagnose as diagnose
from vfsurgery.scoring.evaluation import evaluate as evaluate
from vfsurgery.scoring.flip_rates import Flips as Flips
from vfsurgery.scoring.flip_rates import flips as flips
from vfsurgery.scoring.preserving import PreserveCurve as PreserveCurve
from vfsurgery.scoring.preserving import preserve_curve as preserve_curve
from vfsurgery.stats.imagined import Imagined as Imagined
from vfsurgery.stats.imagined import ImagineReport as ImagineReport
from vfsurgery.stats.imagined import imagine as imagine
