"""Methods that combine models of one ancestor, one file each; all are registered here."""

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
from vfsurgery.combining.fisher import Fisher as Fisher
from vfsurgery.combining.regmean import RegMean as RegMean
from vfsurgery.combining.regmean import RegMeanPlusPlus as RegMeanPlusPlus
from vfsurgery.combining.running import combine_states as combine_states
from vfsurgery.combining.ties import Ties as Ties
