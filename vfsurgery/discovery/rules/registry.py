"""How a coupling rule is registered, and found for an op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.groups.axes import Constraint
from vfsurgery.registry import load_plugins
from vfsurgery.tracing.hooks import computes_weights
from vfsurgery.tracing.ops import Key, Op, canonical_key
from vfsurgery.tracing.values import KEPT_WHOLE

Rule: TypeAlias = Callable[[Op], Iterable[Constraint]]

_RULES: dict[Key, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a coupling rule for operations, in whatever spelling.

    A rule is a pure function from one :class:`~vfsurgery.tracing.ops.Op` to the ties and pins of its axes. Dims that
    it does not mention are pinned. A module whose class has a rule is kept as one node in every trace.

    Args:
        targets: Module classes (subclasses do not inherit the rule, except those of BatchNorm), functions, or names
            that torch functions and methods share, such as ``"relu"``.

    Raises:
        OptionError: a target has a rule already.

    >>> from vfsurgery.groups.axes import tie_all
    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> @rule(Twice)
    ... def twice(op):
    ...     yield from tie_all(op.input, op.output)
    """

    def enter(function: Rule) -> Rule:
        for target in targets:
            key = target if isinstance(target, type) else canonical_key(target)
            taken = _RULES.get(key)
            if taken is not None and (taken.__module__, taken.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise OptionError(
                    explain(
                        f"{target!r} has a coupling rule already",
                        first=f"{taken.__module__}.{taken.__qualname__}",
                        second=f"{function.__module__}.{function.__qualname__}",
                    )
                )
            _RULES[key] = function
            KEPT_WHOLE.add(target)
        return function

    return enter


def ruled_modules(model: nn.Module) -> frozenset[str]:
    """Paths of the modules, other than torch's own, whose very class has a rule; those of plugins count."""
    load_plugins()

    def is_ruled(module: nn.Module) -> bool:
        return type(module) in _RULES and not type(module).__module__.startswith("torch.nn.")

    return frozenset(path for path, module in model.named_modules() if path and is_ruled(module))


def rule_for(op: Op) -> Rule | None:
    """The rule of an op, or ``None``.

    A module class is looked up as it is; a BatchNorm subclass (with an activation built in, say) is a BatchNorm. A
    module that computes weights, by hooks or a parametrization, is not what the rule of its class speaks of.
    """
    load_plugins()  # a graph may have been traced elsewhere
    if op.module is not None and any(map(computes_weights, op.module.modules())):
        return None
    found = _RULES.get(op.key)
    if found is None and isinstance(op.module, nn.modules.batchnorm._BatchNorm):
        return next((_RULES[base] for base in type(op.module).__mro__ if base in _RULES), None)
    return found
