"""The conformance suite of coupling rules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vfsurgery.discovery.finding import find_groups
from vfsurgery.discovery.verification import verify
from vfsurgery.testing.watching import expect, untouched


def check_rule(model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, groups: int | None = None) -> None:
    """Check the coupling rules of all ops in a model that shows what the rule is about.

    Every op has a rule; there is something to permute; and permuting every group, alone and together with all others,
    leaves the function as it is in float64, while a group with a member left out changes it.

    Args:
        model: For example a layer, your op, and another layer: the units between them are what the rule speaks of.
        example_inputs: One tensor per argument.
        groups: How many groups there are, if you know.

    Raises:
        AssertionError: something does not hold; the message says what.
        UnknownOpError: an op has no rule.

    >>> import torch
    >>> check_rule(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4), groups=1)
    """
    with untouched("the rule", [model]):
        found = find_groups(model, example_inputs, strict=True)
        expect(len(found) > 0, "nothing in the model may be permuted", pinned="; ".join(map(str, found.pinned[:4])))
        expect(groups in (None, len(found)), f"the model has {len(found)} groups and not {groups}", groups=found)
        proof = verify(model, found, example_inputs)
        expect(
            bool(proof),
            "permuting the groups changes the function, or breaking one does not",
            verification=proof,
            groups=found,
            remedy="see docs/write_a_rule.md: a dim that no constraint mentions is pinned, which is always safe",
        )
