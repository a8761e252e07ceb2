"""SMILE: the experts' task vectors as low-rank experts beside every linear op, chosen by what each op reads.

Published (Tang et al., 2024): beside every ``nn.Linear`` the differences of all fine-tuned weights, cut to their first
``k`` singular directions; a router without training looks at the energy of the input in the first ``k_gate`` right
ones, for each token and layer by itself. All other parameters are those of the base.

The public code replaces modules. Where a network reads a module's weight and never calls it (packed projections,
``nn.MultiheadAttention``), it runs without experts and without a word; convolutions have none; a layer of which the
bias alone was tuned is left out; with ``k_gate`` as large as the input all energies are equal. Here a graph is
rewritten: every linear op and convolution has experts, whoever calls it; by default one choice for each image and
layer, by the mean energy of its tokens, and the mean of the experts elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from vfsurgery.combining.base import check_choice
from vfsurgery.discovery.recording import record
from vfsurgery.discovery.verification import relative_error
from vfsurgery.errors import CertificateError, OptionError, explain
from vfsurgery.merging.multitask.attention import take_apart
from vfsurgery.merging.multitask.linear_ops import Computed
from vfsurgery.merging.multitask.rewriting import Choice, Expertise, Plan, Rewriting
from vfsurgery.merging.multitask.twins import check_trunk
from vfsurgery.passes.costs import Cost, cost_of
from vfsurgery.passes.preserve import standalone
from vfsurgery.stats.together import run_kept
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.values import tensors_of

K, K_GATE = 32, 16
SHARE = 4
"""Without an explicit ``k_gate``, a router looks at no more than one in so many directions of its input."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""What is tried for ``k`` under a budget."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Smile:
    """A network with experts, and what it consists of; print it for a table.

    Attributes:
        network: Takes what the network took, and ``task=``, the number of a task whose experts are to count
            everywhere; -1, the default, lets routers choose. It saves, exports and runs without this library.
        tasks: Their names, in the order of numbers.
        layers: All ops with experts.
        skipped: Tensors in which experts differ from the base and that have no experts, and why; they are ``rest``.
        before: What the network cost.
        after: What it costs with experts.
        rest: What tensors without experts are: ``"mean"``, ``"base"`` or a task.
        notes: What else there is to say.
    """

    network: fx.GraphModule = field(repr=False)
    tasks: tuple[str, ...]
    layers: tuple[Expertise, ...] = field(repr=False)
    skipped: Mapping[str, str] = field(repr=False)
    before: Cost
    after: Cost
    rest: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        wide = max([len(layer.op) for layer in self.layers], default=2)
        lines = [
            f"SMILE of {len(self.tasks)} tasks: experts beside {len(self.layers)} ops, {self.after / self.before}",
            f"  {'op':<{wide}}  units  inputs    k  k_gate  gate",
        ]
        for each in self.layers:
            numbers = f"{each.units:>5}  {each.inputs:>6}  {each.k:>3}  {each.k_gate:>6}"
            lines.append(f"  {each.op:<{wide}}  {numbers}  {each.gate}")
        lines += [f"  {name} is that of the {self.rest}: read by {why}" for name, why in self.skipped.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def smile(
    base: Mapping[str, Tensor],
    experts: Mapping[str, nn.Module],
    trunk: Sequence[str],
    inputs: Tensor,
    *,
    network: nn.Module | None = None,
    k: int | Literal["full"] | None = None,
    k_gate: int | None = None,
    budget: float | None = None,
    gate: Choice = "image",
    top_k: int = 1,
    rest: str = "mean",
) -> Smile:
    """Put the low-rank experts of all tasks beside every linear op of one network.

    Args:
        base: Tensors of the checkpoint that all experts were fine-tuned from, the trunk's at least.
        experts: By task, networks whose trunks have the same names. They stay as they are.
        trunk: Names of the tensors that all have in common, buffers too.
        inputs: Example images, as :func:`~vfsurgery.trace` takes them.
        network: What is rewritten, a copy of it: any network with the trunk's tensors under their names, as one with
            all heads; by default the first expert, with its head.
        k: Singular directions of each expert, or ``"full"`` for all; by default 32, or what the budget allows.
        k_gate: Directions that routers look at, by default 16; at most a fourth of a layer's inputs unless it is given.
        budget: How many times the network's own parameters there may be in all; chooses the largest ``k`` of
            1, 2, 4, ..., with half as many for ``k_gate``.
        gate: One choice for each ``"image"`` and layer, or for each ``"token"`` or pixel (published).
        top_k: Experts that count; their weights sum to one.
        rest: What tensors without experts are: the experts' ``"mean"``, the ``"base"``'s (published), or a task's own.

    Raises:
        OptionError: an option is out of its range; the router would look at all inputs of a layer, where all experts'
            energies are equal; no ``k`` fits the budget.
        IncompatibleModelsError: the trunk differs between experts and base.

    >>> net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    >>> import copy
    >>> a, b = copy.deepcopy(net), copy.deepcopy(net)
    >>> with torch.no_grad():
    ...     _ = a[0].weight.add_(torch.randn(6, 8)), b[0].weight.sub_(torch.randn(6, 8))
    >>> found = smile(net.state_dict(), {"a": a, "b": b}, ["0.weight", "0.bias"], torch.randn(2, 8), k="full")
    >>> x = torch.randn(5, 8)
    >>> torch.allclose(found.network(x, task=1), b(x), atol=1e-5)
    True
    """
    _check(experts, k, k_gate, budget, gate, top_k, rest)
    check_trunk(trunk, base, experts)
    own = copied(next(iter(experts.values())) if network is None else network)
    modes = {path: module.training for path, module in own.named_modules()}
    graph_module = record(own, (inputs,))
    before = cost_of(own, inputs)
    whole = take_apart(graph_module)
    computed = Computed(graph_module)
    work = Rewriting(graph_module, computed, base, experts, trunk, rest)
    largest = K if budget is None else RANKS[-1]
    most = None if k == "full" else max(k or largest, k_gate or K_GATE)
    plans = [*work.plans(work.layouts(inputs), gate, most)]
    ranks = _ranks(plans, len(experts), before.parameters, k, k_gate, budget)
    layers = [work.insert(plan, *rank, top_k) for plan, rank in zip(plans, ranks, strict=True)]
    work.connect()
    skipped = {name: f"{why}: {whole[why.partition(' ')[0]]}" if why.partition(' ')[0] in whole else why
               for name, why in work.skipped.items()}  # fmt: skip
    result = standalone(graph_module, modes, None)
    return Smile(
        result, tuple(experts), tuple(layers), skipped, before, cost_of(result, inputs), rest, tuple(work.notes)
    )


def certify(
    base: Mapping[str, Tensor],
    experts: Mapping[str, nn.Module],
    trunk: Sequence[str],
    inputs: Tensor,
    *,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Prove that every difference is beside some op: each expert comes back at full rank, chosen from outside.

    For each task the network of its expert is rewritten, with ``k="full"`` and that expert's own values elsewhere, and
    compared with the expert on ``inputs``.

    Returns:
        By task the largest difference of outputs, relative to the largest output.

    Raises:
        CertificateError: one is above ``tolerance``; names the task.
    """
    errors: dict[str, float] = {}
    for number, (task, expert) in enumerate(experts.items()):
        made = smile(base, experts, trunk, inputs, network=expert, k="full", rest=task, gate="token")
        with torch.no_grad():
            found = tensors_of(made.network.eval()(inputs, number))
        errors[task] = relative_error(found, run_kept(expert, (inputs,)))
        if not errors[task] <= tolerance:
            raise CertificateError(
                explain(
                    f"at full rank the experts of task {task!r} do not compute what its network computes",
                    error=f"{errors[task]:.1e}, relative to the largest output; allowed {tolerance:.0e}",
                    remedy="report this network; method='task-arithmetic' needs no experts",
                )
            )
    return errors


def _ranks(
    plans: Sequence[Plan],
    experts: int,
    own: float,
    k: int | Literal["full"] | None,
    k_gate: int | None,
    budget: float | None,
) -> list[tuple[int, int]]:
    """For each op how many directions experts have, and how many routers look at."""
    for plan in plans:
        if k_gate is not None and plan.gate != "mean" and k_gate >= plan.columns:
            raise OptionError(
                explain(
                    f"k_gate={k_gate} is no less than the {plan.columns} inputs of {plan.op.node.name}: there all "
                    "experts see the same energy",
                    tensors=", ".join(plan.tensors),
                    remedy=f"a smaller one, or None, which looks at one direction in {SHARE} at most",
                )
            )

    def under(k: int | Literal["full"], most: int) -> list[tuple[int, int]]:
        ranks = (plan.factors.rank if k == "full" else min(k, plan.factors.rank) for plan in plans)
        gates = (min(k_gate or min(most, max(1, plan.columns // SHARE)), max(plan.factors.rank, 1)) for plan in plans)
        return [*zip(ranks, gates, strict=True)]

    if budget is None:
        return under(K if k is None else k, K_GATE)
    totals: list[float] = []
    for tried in reversed(RANKS):
        found = under(tried, max(tried // 2, 1))
        totals.append(own + sum(plan.parameters(*rank, experts) for plan, rank in zip(plans, found, strict=True)))
        if totals[-1] <= budget * own:
            return found
    raise OptionError(
        explain(
            f"no rank fits a budget of {budget:g} times the network's {own:,.0f} parameters",
            least=f"{totals[-1] / own:.2f} times, with k=1",
            remedy="a larger budget, or a k_gate of 1",
        )
    )


def _check(
    experts: Mapping[str, nn.Module],
    k: int | str | None,
    k_gate: int | None,
    budget: float | None,
    gate: str,
    top_k: int,
    rest: str,
) -> None:
    if not experts:
        raise OptionError(explain("there is no expert", remedy='experts={"cars": model, ...}'))
    check_choice("gate", gate, get_args(Choice))
    check_choice("rest", rest, ("mean", "base", *experts))
    if not 1 <= top_k <= len(experts):
        raise OptionError(explain(f"top_k={top_k} of {len(experts)} experts", accepted=f"1 to {len(experts)}"))
    if isinstance(k, str) and k != "full":
        raise OptionError(explain(f"k={k!r}", accepted='a number of singular directions, "full", or None'))
    if (isinstance(k, int) and k < 1) or (k_gate is not None and k_gate < 1):
        raise OptionError(explain(f"k={k} and k_gate={k_gate} must be 1 or more"))
    if budget is not None and (k is not None or budget <= 1):
        raise OptionError(
            explain(
                f"budget={budget:g} with k={k}",
                remedy="a budget above 1 chooses k; give one of both",
            )
        )
