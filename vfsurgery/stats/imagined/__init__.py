"""Calibration images made from the networks themselves, without one real image."""

from vfsurgery.stats.imagined.images import Imagined as Imagined
from vfsurgery.stats.imagined.imagining import imagine as imagine
from vfsurgery.stats.imagined.report import NO_REAL_IMAGE as NO_REAL_IMAGE
from vfsurgery.stats.imagined.report import ImagineReport as ImagineReport
from vfsurgery.stats.imagined.report import NormReport as NormReport
from vfsurgery.stats.imagined.standing_in import IMAGINED as IMAGINED
from vfsurgery.stats.imagined.standing_in import stand_in as stand_in
