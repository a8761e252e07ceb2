"""The survey of all models of torchvision and timm: what is traced, grouped and proven."""

from vfsurgery.zoo.matrix import Cell as Cell
from vfsurgery.zoo.matrix import merge_pair as merge_pair
from vfsurgery.zoo.matrix import merge_zoo as merge_zoo
from vfsurgery.zoo.matrix import read_cells as read_cells
from vfsurgery.zoo.survey import Survey as Survey
from vfsurgery.zoo.survey import model_names as model_names
from vfsurgery.zoo.survey import page as page
from vfsurgery.zoo.survey import read_table as read_table
from vfsurgery.zoo.survey import survey_model as survey_model
from vfsurgery.zoo.survey import survey_zoo as survey_zoo
