"""What authors of passes, matchers, combining methods, pruners, rules and data sets run in a test.

It is all that the library expects of them. Three lines are enough::

    from vfsurgery.testing import check_pass

    def test_my_pass():
        check_pass(MyPass())

Failures are ``AssertionError`` with a message that says what is expected and why.
"""

from vfsurgery.testing.combiners import check_combiner as check_combiner
from vfsurgery.testing.data import check_data as check_data
from vfsurgery.testing.matchers import check_matcher as check_matcher
from vfsurgery.testing.nets import NETS as NETS
from vfsurgery.testing.nets import example_images as example_images
from vfsurgery.testing.nets import make_net as make_net
from vfsurgery.testing.passes import check_pass as check_pass
from vfsurgery.testing.pruners import check_pruner as check_pruner
from vfsurgery.testing.rules import check_rule as check_rule
