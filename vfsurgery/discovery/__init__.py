"""From a model to its permutation groups: recording, ties and pins by rules, their solution, nested groups, parts."""

from vfsurgery.discovery.components import discover as discover
from vfsurgery.discovery.partial import find_partly as find_partly
from vfsurgery.discovery.recording import hidden_norms as hidden_norms
from vfsurgery.discovery.recording import record as record
from vfsurgery.discovery.recording import record_or_export as record_or_export
from vfsurgery.discovery.unification import INPUT as INPUT
from vfsurgery.discovery.unification import OUTPUT as OUTPUT
