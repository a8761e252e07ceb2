"""Methods that combine models of one ancestor, one file each; all are registered here."""

from vfsurgery.combining.adapters import fold_adapter as fold_adapter
from vfsurgery.combining.adapters import read_adapter as read_adapter
from vfsurgery.combining.arithmetic import Mean as Mean
from vfsurgery.combining.arithmetic import TaskArithmetic as TaskArithmetic
from vfsurgery.combining.arithmetic import WiseFT as WiseFT
from vfsurgery.combining.base import COMBINERS as COMBINERS
from vfsurgery.combining.base import Combiner as Combiner
from vfsurgery.combining.base import Entry as Entry
from vfsurgery.combining.base import Kind as Kind
from vfsurgery.combining.base import Problem as Problem
from vfsurgery.combining.base import Trait as Trait
from vfsurgery.combining.base import register_combiner as register_combiner
from vfsurgery.combining.comparing import check_ancestor as check_ancestor
from vfsurgery.combining.comparing import compare as compare
from vfsurgery.combining.comparison import Comparison as Comparison
from vfsurgery.combining.factoring import SavedAdapter as SavedAdapter
from vfsurgery.combining.factoring import save_adapter as save_adapter
from vfsurgery.combining.knots import Knots as Knots
from vfsurgery.combining.running import combine_states as combine_states
from vfsurgery.combining.ties import Ties as Ties
