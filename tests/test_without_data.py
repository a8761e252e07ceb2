"""Merges of networks with BatchNorm without data: warned of, and their variances corrected in closed form."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_nets import images, net
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.checkpoints import save_state_dict
from vfsurgery.cli import main
from vfsurgery.data import digits
from vfsurgery.errors import OptionError, SurgeryWarning
from vfsurgery.networks.demo import TinyResNet
from vfsurgery.training import from_seed, train

WARNING = r"a merge of networks with BatchNorm \(\d+ layers\) loses most of its accuracy without data: .* pass data="


def residuals() -> tuple[nn.Module, nn.Module]:
    return net("residual", 1).double(), net("residual", 2).double()


def blind(a: nn.Module, b: nn.Module, **options: object) -> nn.Module:
    given = {"matching": "weights", "example_inputs": images(2).double(), **options}
    return surgery.merge(a, b, imagine=False, progress=False, **given)


def test_without_data_batch_norm_is_warned_of_at_the_line_of_the_user():
    with pytest.warns(SurgeryWarning, match=WARNING) as seen:
        blind(*residuals())
    assert [Path(warning.filename).name for warning in seen] == [Path(__file__).name]
    assert isinstance(seen[0].message, UserWarning)


@pytest.mark.parametrize(
    "options",
    [
        {"data": [images(16).double()]},
        {"renormalize": None},  # what is said in so many words is meant
        {"renormalize": "closed-form-reset"},
        {"alpha": 0.0},  # nothing is averaged
    ],
)
def test_nothing_is_warned_of_where_there_is_data_or_the_choice_is_the_users(options):
    blind(*residuals(), **options)  # a warning would be an error here


def test_networks_without_batch_norm_are_not_warned_of():
    blind(net("chain", 1).double(), net("chain", 2).double())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        save_state_dict(from_seed(TinyResNet, seed).state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def call(*arguments: str) -> tuple[str, str]:
    command = [
        "merge",
        "a.safetensors",
        "b.safetensors",
        "--model",
        "vfsurgery.networks.demo:TinyResNet",
        "-o",
        "ab.safetensors",
    ]
    result = CliRunner().invoke(main, [*command, "--input-size", "1x8x8", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_the_command_line_warns_in_one_line_with_its_own_option(files):
    out, err = call("--no-imagine")
    (line,) = err.splitlines()
    assert line.startswith("warning: a merge of networks with BatchNorm") and "pass --data, some" in line
    assert "warning" not in out and "written to" in out
    out, err = call("--data", "digits", "--limit", "64", "--matching", "weights", "--renormalize", "reset")
    assert "warning" not in out + err


def test_quiet_prints_neither_the_report_nor_the_warning_but_errors(files):
    assert call("--quiet", "--no-imagine") == ("", "")
    result = CliRunner().invoke(
        main, ["merge", "no.pt", "b.safetensors", "--model", "x:y", "--quiet", "-o", "c.safetensors"]
    )
    assert result.exit_code != 0 and result.stderr.startswith("error: ")


def test_the_table_of_what_was_tried_stands_at_the_end(files):
    out, _ = call("--data", "digits", "--limit", "120", "--matching", "identity")
    lines = [line for line in out.splitlines() if line]
    table, written = lines[-4:-1], lines[-1]
    assert written.startswith("written to ")
    assert table[0].split() == ["agreement", "cross-entropy", "seconds"]
    assert [line.split()[:3] for line in table[1:]] == [["identity", "+", "reset"], ["identity", "+", "regress"]]
    assert sum(line.endswith("  kept") for line in table) == 1


def variances(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("running_var")}


def test_variances_shrink_with_the_squares_of_the_weights():
    a, b = (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1)).double() for _ in "ab")
    torch.manual_seed(3)
    for model in (a, b):
        model[1].running_var.uniform_(0.5, 2.0)
    options = {"matching": "identity", "example_inputs": torch.randn(2, 3, 6, 6, dtype=torch.float64), "alpha": 0.3}
    merged = surgery.merge(a, b, renormalize="closed-form-reset", progress=False, **options)
    rows = [model[0].weight.detach().flatten(1) for model in (a, b)]
    short = (0.7 * rows[0] + 0.3 * rows[1]).square().sum(1)
    ratio = short / (0.7 * rows[0].square().sum(1) + 0.3 * rows[1].square().sum(1))
    expected = (0.7 * a[1].running_var + 0.3 * b[1].running_var) * ratio
    assert torch.allclose(merged[1].running_var, expected, rtol=1e-12)
    assert bool((ratio < 0.9).any())
    (note,) = [note for note in surgery.report_of(merged).notes if "closed-form" in note]
    assert note == "closed-form-reset: 1 of 1 BatchNorm layers, no data"


def test_on_inputs_that_vary_alike_in_all_directions_it_is_exact():
    """A first layer on white noise, with sources that have measured their statistics on it."""
    torch.manual_seed(4)
    x = torch.randn(20_000, 12, dtype=torch.float64)
    models = [nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double() for _ in "ab"]
    with torch.no_grad():
        for model in models:
            model[1].running_var.copy_(model[0](x).var(0))
    merged = blind(*models, renormalize="closed-form-reset", example_inputs=x[:2])
    with torch.no_grad():
        measured = merged[0](x).var(0)
    plain = blind(*models, renormalize=None, example_inputs=x[:2])
    assert torch.allclose(merged[1].running_var, measured, rtol=0.1)
    assert not torch.allclose(plain[1].running_var, measured, rtol=0.1)  # negative control


def test_a_merge_with_itself_keeps_every_variance_and_the_function():
    a = net("residual", 1).double()
    b = copy.deepcopy(a)
    merged = blind(a, b, renormalize="closed-form-reset")
    x = images(8).double()
    with torch.no_grad():
        assert torch.allclose(merged(x), a(x), rtol=1e-9)


class Twice(nn.Module):
    """One norm layer behind two convolutions, and one behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.shared, self.summed, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.shared(self.convs[0](x)).relu()
        second = self.shared(self.convs[1](first)).relu()
        return self.head(self.summed(first + second).mean((2, 3), keepdim=True)).flatten(1)


def test_a_norm_that_is_called_twice_shrinks_once_and_one_behind_a_sum_is_averaged():
    a, b = (from_seed(Twice, seed).double().eval() for seed in (1, 2))
    options = {"matching": "identity", "example_inputs": torch.randn(2, 3, 5, 5, dtype=torch.float64)}
    plain, merged = (variances(blind(a, b, renormalize=step, **options)) for step in (None, "closed-form-reset"))
    assert torch.equal(plain["summed.running_var"], merged["summed.running_var"])
    ratios = [
        (first + second).square().flatten(1).sum(1) / 2 / (first.square() + second.square()).flatten(1).sum(1)
        for first, second in zip((c.weight for c in a.convs), (c.weight for c in b.convs), strict=True)
    ]
    expected = plain["shared.running_var"] * (ratios[0] + ratios[1]) / 2
    assert torch.allclose(merged["shared.running_var"], expected, rtol=1e-12)


def test_networks_without_batch_norm_are_refused():
    with pytest.raises(OptionError, match="closed-form-reset needs BatchNorm layers with running statistics"):
        blind(net("chain", 1).double(), net("chain", 2).double(), renormalize="closed-form-reset")


@pytest.mark.slow
def test_it_brings_much_back_of_a_trained_pair():
    splits = digits(seed=0)
    a, b = (train(from_seed(TinyResNet, s), splits.train, seed=s, epochs=12, lr=0.1, progress=False) for s in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        default = surgery.merge(a, b, example_inputs=torch.randn(2, 1, 8, 8), progress=False)
    plain = surgery.merge(a, b, example_inputs=torch.randn(2, 1, 8, 8), renormalize=None, progress=False)
    scores = [surgery.evaluate(model, splits.test, progress=False).accuracy for model in (plain, default)]
    assert scores[1] > max(scores[0] + 0.3, 0.6)


class ByKeyword(nn.Module):
    """A norm layer that is given its input by name, and one behind a layer whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.second, self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(input=self.first(x)).relu())).mean((2, 3))


def test_odd_networks_are_no_reason_to_fail():
    a, b = (from_seed(ByKeyword, seed).bfloat16().eval() for seed in (1, 2))
    inputs = torch.randn(2, 3, 5, 5).bfloat16()
    merged = blind(a, b, renormalize="closed-form-reset", matching="identity", example_inputs=inputs)
    assert any("closed-form-reset: " in note for note in surgery.report_of(merged).notes)
    assert all(bool(tensor.isfinite().all()) for tensor in merged.state_dict().values())
