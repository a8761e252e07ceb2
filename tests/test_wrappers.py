"""What torch wraps around networks is taken off in one place, and is never a reason to refuse or to differ."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import vfsurgery as surgery
from vfsurgery.checkpoints import load_into, load_state_dict
from vfsurgery.errors import OptionError
from vfsurgery.tracing.wrappers import network


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).flatten(1))


def lively(seed):
    torch.manual_seed(seed)
    net = Net().double()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else -0.3))
    return net.eval()


@pytest.fixture
def group(monkeypatch):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled in DataParallel": lambda net: DataParallel(torch.compile(net, backend="eager")),
    "DataParallel compiled": lambda net: torch.compile(DataParallel(net), backend="eager"),
}
IMAGES = torch.randn(160, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def same(a, b):
    assert type(a) is type(b) and list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_network_is_the_network_in_it(kind, group):
    def wrapped(seed):
        return WRAPPERS[kind](lively(seed)).eval()

    a, b = lively(0), lively(1)
    options = {"progress": False}
    groups = surgery.find_groups(wrapped(0), IMAGES[:2])
    assert groups.listing() == surgery.find_groups(a, IMAGES[:2]).listing()
    assert surgery.verify(wrapped(0), groups, IMAGES[:2])
    assert isinstance(surgery.trace(wrapped(0), IMAGES[:2]).get_submodule("stem.0"), nn.Conv2d)
    merged = surgery.merge(wrapped(0), b, data=IMAGES, **options)
    same(merged, surgery.merge(a, b, data=IMAGES, **options))
    same(merged, surgery.merge([a, wrapped(1)], data=IMAGES, **options))
    assert surgery.match(wrapped(0), wrapped(1), data=IMAGES) == surgery.match(a, b, data=IMAGES)
    sparse = surgery.prune(wrapped(0), 0.5)
    same(sparse, surgery.prune(a, 0.5))
    same(surgery.prune_units(wrapped(0), 0.3, data=IMAGES), surgery.prune_units(a, 0.3, data=IMAGES))
    repaired = surgery.renormalize(WRAPPERS[kind](sparse), reference=wrapped(0), data=IMAGES)
    same(repaired, surgery.renormalize(sparse, reference=a, data=IMAGES))
    same(surgery.run_passes(wrapped(0), "reset", data=IMAGES), surgery.run_passes(a, "reset", data=IMAGES))
    soup = {"greedy": False, "calibration": IMAGES}
    same(surgery.soup([wrapped(0), b], **soup), surgery.soup([a, b], **soup))
    found = surgery.diagnose(wrapped(0), [wrapped(0), wrapped(1)], IMAGES)
    assert found.to_dict() == surgery.diagnose(a, [a, b], IMAGES).to_dict()
    labels = torch.arange(160) % 3
    assert surgery.evaluate(wrapped(0), (IMAGES, labels)) == surgery.evaluate(a, (IMAGES, labels))


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("surgeon", ["merge", "prune", "renormalize", "run_passes"])
def test_in_place_the_inner_network_is_written_and_the_wrapper_comes_back(kind, surgeon, group):
    inner, b = lively(0), lively(1)
    given = WRAPPERS[kind](inner).eval()
    held = network(given)  # AveragedModel copies what it wraps
    before = held.stem[0].weight
    expected = surgery.merge(lively(0), b, data=IMAGES, progress=False)
    if surgeon == "merge":
        result = surgery.merge(given, b, data=IMAGES, inplace=True, progress=False)
        same(held, expected)
    elif surgeon == "prune":
        result = surgery.prune(given, 0.5, inplace=True)
    elif surgeon == "renormalize":
        result = surgery.renormalize(given, reference=lively(0), data=IMAGES, inplace=True, progress=False)
    else:
        result = surgery.run_passes(given, "reset", data=IMAGES, inplace=True, progress=False)
    assert result is given and network(given) is held and held.stem[0].weight is before
    assert surgery.report_of(given) is surgery.report_of(held)


def test_what_is_no_network_is_refused_with_the_way_to_one(tmp_path):
    net = lively(0)
    cases = {
        "a.pt": r"source 0 is no torch\.nn\.Module but str\n  remedy  build the network, and checkpoints\.load_into",
        Path("a.pt"): r"source 0 is no torch\.nn\.Module but PosixPath\n  remedy  build the network, and check",
        "state": r"source 0 is no torch\.nn\.Module but OrderedDict\n  remedy  build the network of these weights",
    }
    for given, message in cases.items():
        with pytest.raises(OptionError, match=message):
            surgery.merge(net.state_dict() if given == "state" else given, net)
    for pair in (("a.pt", "b.pt"), (net, "b.pt"), (net, net.state_dict()), (["a.pt", net], None), (3, net)):
        with pytest.raises(OptionError, match=r"source [01] is no torch\.nn\.Module but"):
            surgery.merge(*pair)
        with pytest.raises(OptionError, match=r"source [01] is no torch\.nn\.Module but"):
            surgery.match(*pair)
    with pytest.raises(OptionError, match="at least two models"):
        surgery.merge(net)
    for surgeon in (surgery.find_groups, surgery.trace, surgery.prune_units):
        with pytest.raises(OptionError, match=r"the model is no torch\.nn\.Module but str"):
            surgeon("a.pt", 0.5)


def test_what_cannot_be_read_is_refused_with_the_way_out():
    net = lively(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        script = torch.jit.trace(net, IMAGES[:2])
    with pytest.raises(OptionError, match=r"the model is a TorchScript program\n  remedy  pass the module"):
        surgery.find_groups(script, IMAGES[:2])
    partly = lively(0)
    partly.body = torch.compile(partly.body, backend="eager")
    with pytest.raises(OptionError, match=r"source 1 is compiled\n  module  body\n  remedy .* model\.body\._orig_mod"):
        surgery.merge(net, partly, data=IMAGES)
    partly.body = partly.body._orig_mod
    assert surgery.merge(net, partly, data=IMAGES, progress=False)
    hooked = DataParallel(net)
    hooked.register_forward_pre_hook(lambda module, inputs: tuple(x * 2 for x in inputs))
    with pytest.raises(OptionError, match="the model has a hook on its DataParallel"):
        surgery.find_groups(hooked, IMAGES[:2])


def test_a_network_compiled_in_place_stays_what_it_is():
    net = lively(0)
    compiled = copy.deepcopy(net)
    compiled.compile(backend="eager")
    same(
        surgery.merge(compiled, lively(1), data=IMAGES, progress=False),
        surgery.merge(net, lively(1), data=IMAGES, progress=False),
    )


def test_a_wrapper_inside_of_a_network_is_a_part_of_it(tmp_path):
    a, b = lively(0), lively(1)
    expected = surgery.merge(a, b, data=IMAGES, progress=False)
    a.stem, b.stem = DataParallel(a.stem), DataParallel(b.stem)
    merged = surgery.merge(a, b, data=IMAGES, progress=False)
    assert torch.equal(merged.stem.module[0].weight, expected.stem[0].weight)
    torch.save(merged.state_dict(), tmp_path / "inner.pt")
    again = Net().double()
    load_into(again, load_state_dict(tmp_path / "inner.pt"), "inner.pt")
    same(again, expected)


def test_a_part_that_is_torchscript_is_refused_by_its_path():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        part = torch.jit.trace(nn.Tanh(), torch.zeros(1, 6))
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Sequential(part), nn.Linear(6, 2)), torch.zeros(2, 5)
    calls = (
        lambda: surgery.find_groups(model, x),
        lambda: surgery.trace(model, x),
        lambda: surgery.merge(model, copy.deepcopy(model), example_inputs=x),
        lambda: surgery.prune_units(model, 0.5, example_inputs=x),
    )
    for call in calls:
        with pytest.raises(
            OptionError, match=r"is a TorchScript program\n  module  1\.0\n  remedy  put the module that"
        ):
            call()
