"""Proof that permutations preserve a function: the certificate of every merge, and the stronger ``verify``."""

from vfsurgery.discovery.verification.certificate import ROUNDING_FACTOR as ROUNDING_FACTOR
from vfsurgery.discovery.verification.certificate import TOLERANCE as TOLERANCE
from vfsurgery.discovery.verification.certificate import certify as certify
from vfsurgery.discovery.verification.certificate import drift as drift
from vfsurgery.discovery.verification.certificate import outputs_of as outputs_of
from vfsurgery.discovery.verification.certificate import precision_of as precision_of
from vfsurgery.discovery.verification.certificate import relative_error as relative_error
from vfsurgery.discovery.verification.halving import culprits as culprits
from vfsurgery.discovery.verification.lively import keep_signals_alive as keep_signals_alive
from vfsurgery.discovery.verification.lively import randomize as randomize
from vfsurgery.discovery.verification.proof import Verification as Verification
from vfsurgery.discovery.verification.proof import prove as prove
from vfsurgery.discovery.verification.proof import verify as verify
from vfsurgery.tracing.chance import several as several
from vfsurgery.tracing.chance import without_chance as without_chance
