"""A seeded training that can be cut off and goes on."""

from vfsurgery.training.loop import OptimizerName as OptimizerName
from vfsurgery.training.loop import from_seed as from_seed
from vfsurgery.training.loop import train as train
from vfsurgery.training.resuming import Progress as Progress
