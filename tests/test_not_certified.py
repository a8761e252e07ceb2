"""What maps of units change is not certified, wherever a certificate is shown."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from tiny_nets import groups_of, images, net, planted
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.checkpoints import provenance
from vfsurgery.errors import CertificateError
from vfsurgery.hub.cards import Card, Network, Summary
from vfsurgery.hub.loading import Written
from vfsurgery.records.report import Certificate, MergeReport
from vfsurgery.records.results import merge_report_of

DATA = [images(200)]


def merged(matching: str, **options: object) -> tuple[nn.Module, MergeReport]:
    models = net("chain", 1).double(), net("chain", 2).double()
    data = [part.double() for part in DATA]
    found = surgery.merge(*models, data=data, matching=matching, renormalize="repair", progress=False, **options)
    return found, merge_report_of(found)


@pytest.mark.parametrize(("matching", "sources"), [("cca", [1]), ("zipit", [0, 1])])
def test_no_source_that_was_mapped_holds(matching, sources):
    _, report = merged(matching)
    assert [certificate.source for certificate in report.certificates] == sources
    for certificate in report.certificates:
        assert not certificate
        assert certificate.mapped == 4 and certificate.drift > 0.01
        assert f"source {certificate.source}: not certified: 4 groups are mapped" in str(certificate)
        assert f"{certificate.drift:.1%} of the largest" in str(certificate)


def test_text_html_page_card_json_and_header_say_it(tmp_path):
    found, report = merged("cca")
    models = net("chain", 1).double(), net("chain", 2).double()
    page = surgery.diagnose(found, models, [part.double() for part in DATA], progress=False).page(
        tmp_path / "page.html", report=report
    )
    (tmp_path / "chain.safetensors").write_bytes(b"")
    network = Network(name="chain", written=Written(("chain.safetensors",), "mine:chain"), summary=Summary.of(report))
    card = Card(title="chain", summary="One.", networks=[network]).write(tmp_path)
    texts = {
        "text": str(report),
        "notebook": report._repr_html_(),
        "page": page.read_text(),
        "card": card.read_text(),
    }
    drift = f"{report.certificates[0].drift:.1%} of the largest"
    for where, text in texts.items():
        assert "not certified: 4 groups are mapped by matrices" in text, where
        assert drift in text, where
        assert "holds, relative error" not in text, where
    for where in ("notebook", "page"):
        assert re.search(r"–(</span>)? source 1: not certified", texts[where]), where
    (plain,) = json.loads(report.to_json())["certificates"]
    assert plain["holds"] is False and plain["mapped"] == 4
    assert plain["drift"] == pytest.approx(report.certificates[0].drift)
    assert json.loads(provenance(report, "recipe")["certificate"])[0]["holds"] is False


def test_permutations_are_certified_as_ever():
    a = net("chain").double()
    found = surgery.merge(
        a,
        planted(a, groups_of(net("chain"))),
        data=[part.double() for part in DATA],
        matching="activations",
        progress=False,
    )
    report = merge_report_of(found)
    assert all(report.certificates) and len(report.certificates) == 1
    assert "== source 1: holds, relative error" in str(report) and "not certified" not in str(report)
    assert json.loads(report.to_json())["certificates"][0]["holds"] is True


@pytest.mark.parametrize(
    ("certificate", "mark", "words"),
    [
        (Certificate(1, 1e-7, 1e-4, "float32"), "✓", "holds"),
        (Certificate(1, 1.0, 1e-4, "float32"), "✗", "FAILS"),
        (Certificate(1, 0.0, 1e-4, "float32", mapped=2, drift=0.1), "–", "not certified"),
        (Certificate(1, 0.0, 1e-4, "float32", mapped=2, drift=1e-6), "✓", "holds, relative error 1.0e-06"),
        (Certificate(1, 0.0, 1e-4, "float32", mapped=2, drift=math.inf), "–", "mapped, its output is not finite"),
    ],
)
def test_the_verdict_follows_from_what_was_measured(certificate, mark, words):
    assert (certificate.mark, bool(certificate)) == (mark, mark == "✓")
    assert words in str(certificate)
    assert json.loads(json.dumps(certificate.to_dict()))["holds"] is (mark == "✓")


def test_a_report_without_the_newer_fields_is_as_before():
    assert dataclasses.asdict(Certificate(1, 0.0, 1e-4, "float32"))["mapped"] == 0


class Enlarge(surgery.Pass):
    """Overflows: what a chain of maps may do to a deep network."""

    name = "enlarge"
    preserves_function = False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def run(self, graph_module, context):
        for weight in graph_module.parameters():
            if weight.ndim > 1:
                weight.mul_(self.factor)
        return graph_module


@pytest.mark.parametrize("inplace", [False, True])
def test_a_result_that_is_not_finite_is_refused_before_anything_is_written(inplace):
    a, b = net("chain", 1), net("chain", 2)
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    with pytest.raises(CertificateError, match=r"outputs that are not finite\n +renormalization +enlarge"):
        surgery.merge(a, b, data=DATA, matching="weights", renormalize=Enlarge(1e20), inplace=inplace, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in a.state_dict().items())
    large = surgery.merge(a, b, data=DATA, matching="weights", renormalize=Enlarge(2.0), progress=False)
    assert large(DATA[0]).isfinite().all()  # the negative control: the pass is not to blame, the overflow is


class Cancelling(nn.Module):
    """Pairs of equal units whose large weights nearly cancel: what rounding does to them depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 64), nn.Linear(64, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            rows = torch.randn(32, 6, generator=generator)
            self.hidden.weight.copy_(torch.cat([rows, rows]))
            self.hidden.bias.zero_()
            large = 1e5 * torch.randn(3, 32, generator=generator)
            self.out.weight.copy_(torch.cat([large, torch.randn(3, 32, generator=generator) - large], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu())


def test_what_rounding_alone_does_is_decided_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    a, b = Cancelling().eval(), Cancelling().eval()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    given = surgery.Given({"g0": surgery.Permutation(tuple(order.tolist()))})
    options = {"example_inputs": x, "matching": given, "renormalize": None, "progress": False}
    (certificate,) = surgery.report_of(surgery.merge(a, b, **options)).certificates
    assert certificate.dtype == "float64" and certificate.error < 1e-9
    (exact,) = surgery.report_of(
        surgery.merge(a.double(), b.double(), **options | {"example_inputs": x.double()})
    ).certificates
    assert exact.error == certificate.error
