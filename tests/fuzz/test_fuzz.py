"""Random networks hold all laws; and each law finds a fault that was planted on purpose within as many networks."""

from __future__ import annotations

import contextlib
import copy
import functools

import laws
import pytest
import torch
from grammar import draw
from program import Program, shrink
from torch import nn

from vfsurgery.discovery.rules import registry
from vfsurgery.discovery.verification import Verification
from vfsurgery.matching import Matching, WeightMatching
from vfsurgery.merging import aligned as merging
from vfsurgery.passes import Repair
from vfsurgery.tracing.sources import Source, canonical_state

BUNCHES = 10
"""Tests that the networks are spread over, so that a failure leaves the others to run."""


def report(program: Program, wrong: str) -> str:
    """What is wrong, and the smallest network that shows it, as Python."""
    law = wrong.partition(":")[0]
    small = shrink(program, lambda other: (laws.broken_law(other) or "").startswith(f"{law}:"))
    return f"network {program.seed}, {laws.broken_law(small)}\n\n{small.source}"


@pytest.mark.parametrize("bunch", range(BUNCHES))
def test_laws_hold_for_random_networks(bunch, request):
    count = request.config.getoption("--fuzz-networks")
    broken = {seed: wrong for seed in range(bunch, count, BUNCHES) if (wrong := laws.broken_law(draw(seed)))}
    assert not broken, "\n\n".join(report(draw(seed), wrong) for seed, wrong in [*broken.items()][:3])


def forget_running_variance(monkeypatch):
    """A rule without a tie: running variances stay where they are."""
    plain = registry._RULES[nn.BatchNorm2d]
    forgetful = lambda op: (c for c in plain(op) if "running_var" not in str(c))  # noqa: E731
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        monkeypatch.setitem(registry._RULES, kind, forgetful)


def match_by_chance(monkeypatch):
    """A matcher that finds nothing."""
    monkeypatch.setattr(
        WeightMatching, "match", lambda self, problem: [Matching({}) for _ in range(len(problem.states) - 1)]
    )


def refuse_proofs(monkeypatch):
    """A verification that believes nothing."""
    monkeypatch.setattr(Verification, "__bool__", lambda self: False)


def keep_a_tensor(monkeypatch):
    """A result that shares a tensor with a source."""
    clone = Source.clone

    def shares(source: Source) -> Source:
        result = clone(source)
        name = next(reversed([n for n, _ in source.model.named_parameters()]))
        owner, _, leaf = name.rpartition(".")
        result.model.get_submodule(owner)._parameters[leaf] = source.model.get_parameter(name)
        return result

    monkeypatch.setattr(Source, "clone", shares)


def write_into_a_source(monkeypatch):
    """A certificate that leaves a trace in what it certifies."""
    certify = merging.certify

    def careless(number, source, *args, **kwargs):
        with torch.no_grad():
            next(t for t in canonical_state(source.model).values() if t.is_floating_point()).mul_(1.5)
        return certify(number, source, *args, **kwargs)

    monkeypatch.setattr(merging, "certify", functools.wraps(certify)(careless))


def scale_too_much(monkeypatch):
    """A renormalization that is off by two percent."""
    correct = Repair.correct
    monkeypatch.setattr(Repair, "correct", lambda self, *args: tuple(1.02 * t for t in correct(self, *args)))


@pytest.mark.parametrize(
    ("law", "fault"),
    [
        (laws.groups_preserve_the_function, forget_running_variance),
        (laws.verify_agrees, refuse_proofs),
        (laws.planted_orders_are_recovered, match_by_chance),
        (laws.result_is_a_network_of_its_own, keep_a_tensor),
        (laws.sources_stay_as_they_are, write_into_a_source),
        (laws.self_merge_is_the_network, scale_too_much),
    ],
    ids=lambda value: value.__name__,
)
def test_each_law_finds_a_planted_fault(law, fault, monkeypatch):
    fault(monkeypatch)
    assert any((laws.broken_law(draw(seed), (law,)) or "").startswith(law.__name__) for seed in range(200))


def test_batch_sizes_that_a_trace_takes_for_constants_are_found(monkeypatch):
    monkeypatch.setattr("vfsurgery.tracing.tracer.recording_lengths", contextlib.nullcontext)
    monkeypatch.setattr("vfsurgery.stats.together.bound_to", lambda graph_module: None)
    written = (draw(seed) for seed in range(200) if "len(" in draw(seed).source)
    assert any(laws.broken_law(program, (laws.sources_stay_as_they_are,)) for program in written)


def test_every_law_has_its_fault():
    marks = next(m for m in test_each_law_finds_a_planted_fault.pytestmark if m.name == "parametrize")
    assert [law for law, _ in marks.args[1]] == [*laws.LAWS]


def test_networks_are_the_same_every_time_and_run_in_both_modes():
    for seed in range(30):
        program = draw(seed)
        assert program == draw(seed)
        model, other = program.build(), program.build()
        for training in (False, True):
            x = program.images(4)
            assert laws.distance(laws.outputs(model, x, training), laws.outputs(other, x, training)) == 0


def test_all_that_the_grammar_has_is_drawn():
    text = "\n".join(draw(seed).source for seed in range(200))
    for word in (
        *(
            "Conv1d",
            "Conv2d",
            "Conv3d",
            "ConvTranspose",
            "BatchNorm",
            "GroupNorm",
            "InstanceNorm",
            "LayerNorm",
            "RMSNorm",
        ),
        *("MultiheadAttention", "scaled_dot_product", "softmax", "LSTM", "GRU", "torch.cat", "chunk", "split", "relu_"),
        *("where", "masked_fill", "persistent=False", "int64", "int32", "float()", "self.training", "alias", "encoder"),
        *("register_forward_hook", "register_full_backward_hook", "{'logits'", "Result(", "> 0)", "never", "unread"),
        *(".weight = self.", "Dropout", "groups=2", "index_select", "chunk(2", "len(", ".size(0)", ".shape[0]"),
    ):
        assert word in text, word


def test_failures_shrink_to_what_matters(monkeypatch):
    forget_running_variance(monkeypatch)
    law = (laws.groups_preserve_the_function,)
    seed = next(
        s
        for s in range(200)
        if "groups_preserve" in (laws.broken_law(draw(s), law) or "") and len(draw(s).statements) > 6
    )
    small = shrink(draw(seed), lambda program: "groups_preserve" in (laws.broken_law(program, law) or ""))
    assert len(small.statements) < len(draw(seed).statements)
    assert "BatchNorm" in small.source
    compile(small.source, "small", "exec")


def test_a_fingerprint_sees_what_changes():
    model = draw(0).build()
    before = laws._fingerprint(model)
    assert all(laws._same(before[name], value) for name, value in laws._fingerprint(model).items())
    other = copy.deepcopy(model)
    assert not all(laws._same(before.get(name), value) for name, value in laws._fingerprint(other).items())
