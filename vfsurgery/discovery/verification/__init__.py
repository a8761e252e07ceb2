"""Proof that permutations preserve a function: the certificate of every merge, and the stronger ``verify``."""

from vfsurgery.tracing.chance import several as several
from vfsurgery.tracing.chance import without_chance as without_chance
from vfsurgery.verification.certificate import ROUNDING_FACTOR as ROUNDING_FACTOR
from vfsurgery.verification.certificate import TOLERANCE as TOLERANCE
from vfsurgery.verification.certificate import certify as certify
from vfsurgery.verification.certificate import drift as drift
from vfsurgery.verification.certificate import outputs_of as outputs_of
from vfsurgery.verification.certificate import precision_of as precision_of
from vfsurgery.verification.certificate import relative_error as relative_error
from vfsurgery.verification.halving import culprits as culprits
from vfsurgery.verification.lively import keep_signals_alive as keep_signals_alive
from vfsurgery.verification.lively import randomize as randomize
from vfsurgery.verification.proof import Verification as Verification
from vfsurgery.verification.proof import prove as prove
