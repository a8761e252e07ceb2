"""The survey of all models of torchvision and timm: what is traced, grouped and proven."""

from vfsurgery.testing.zoo.coverage import page as page
from vfsurgery.testing.zoo.matrix import Cell as Cell
from vfsurgery.testing.zoo.matrix import merge_pair as merge_pair
from vfsurgery.testing.zoo.matrix import merge_zoo as merge_zoo
from vfsurgery.testing.zoo.matrix import read_cells as read_cells
from vfsurgery.testing.zoo.survey import Survey as Survey
from vfsurgery.testing.zoo.survey import model_names as model_names
from vfsurgery.testing.zoo.survey import read_table as read_table
from vfsurgery.testing.zoo.survey import survey_model as survey_model
from vfsurgery.testing.zoo.survey import survey_zoo as survey_zoo
