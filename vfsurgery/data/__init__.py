"""Data: what it may be and what is held out; data sets by name, from folders, and as models expect images."""

from vfsurgery.data.datasets import DATA as DATA
from vfsurgery.data.datasets import load_data as load_data
from vfsurgery.data.folders import Transform as Transform
from vfsurgery.data.images import Splits as Splits
from vfsurgery.data.images import digits as digits
from vfsurgery.data.images import image_folder as image_folder
from vfsurgery.data.images import loader as loader
from vfsurgery.data.images import preprocessing as preprocessing
from vfsurgery.data.images import subset as subset
