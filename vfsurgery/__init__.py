"""Model surgery on ``torch.fx`` graphs: align, merge and renormalize separately trained networks.

>>> import torch, vfsurgery as surgery
>>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2))
>>> merged = surgery.merge(a, b, example_inputs=torch.randn(2, 4))
"""

from vfsurgery.api import find_groups as find_groups
from vfsurgery.api import match as match
from vfsurgery.api import merge as merge
from vfsurgery.api import trace as trace
from vfsurgery.api import verify as verify
from vfsurgery.diagnosis import Diagnosis as Diagnosis
from vfsurgery.diagnosis import diagnose as diagnose
from vfsurgery.differences import Difference as Difference
from vfsurgery.differences import diff as diff
from vfsurgery.errors import SurgeryError as SurgeryError
from vfsurgery.evaluation import barrier as barrier
from vfsurgery.evaluation import evaluate as evaluate
from vfsurgery.flip_rates import Flips as Flips
from vfsurgery.flip_rates import flips as flips
from vfsurgery.groups import GroupSet as GroupSet
from vfsurgery.groups import Permutation as Permutation
from vfsurgery.groups import PermutationGroup as PermutationGroup
from vfsurgery.maps import UnitMap as UnitMap
from vfsurgery.matching import ActivationMatching as ActivationMatching
from vfsurgery.matching import CCAMatching as CCAMatching
from vfsurgery.matching import Given as Given
from vfsurgery.matching import Identity as Identity
from vfsurgery.matching import Matcher as Matcher
from vfsurgery.matching import WeightMatching as WeightMatching
from vfsurgery.matching import ZipMatching as ZipMatching
from vfsurgery.passes import ClosedFormRepair as ClosedFormRepair
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
from vfsurgery.preserving import PreserveCurve as PreserveCurve
from vfsurgery.preserving import preserve_curve as preserve_curve
from vfsurgery.pruning import Masks as Masks
from vfsurgery.recipe import Recipe as Recipe
from vfsurgery.report import MergeReport as MergeReport
from vfsurgery.report import Report as Report
from vfsurgery.results import report_of as report_of
from vfsurgery.rules import rule as rule
from vfsurgery.running import PassReport as PassReport
from vfsurgery.running import run_passes as run_passes
from vfsurgery.toolbox import Editor as Editor
from vfsurgery.toolbox import edit as edit
from vfsurgery.toolbox import measure as measure
from vfsurgery.toolbox import select as select
