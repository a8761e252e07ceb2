"""Models by name: the three forms, helpful misses, and never a download."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from vfsurgery.errors import OptionError
from vfsurgery.networks.architectures import build_model


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of factories, importable as ``mynets``."""
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=3): return nn.Linear(2, num_classes)\n"
        "def fixed(): return nn.Linear(2, 5)\n"
        "def number(): return 3\n"
        "needs = 'text'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mynets", None)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"download of {args}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize(
    ("spec", "head"),
    [
        ("timm:test_resnet", "fc.weight"),
        ("timm:test_resnet.r160_in1k", "fc.weight"),
        ("torchvision:squeezenet1_1", "classifier.1.weight"),
        ("vfsurgery.networks.demo:TinyConvNet", "fc.weight"),
    ],
)
def test_all_forms_take_a_class_count(spec, head):
    assert build_model(spec, num_classes=7).state_dict()[head].shape[0] == 7
    assert isinstance(build_model(spec), nn.Module)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "googlenet"])
def test_neither_backbones_nor_warnings(name):
    assert isinstance(build_model(f"torchvision:{name}"), nn.Module)


def test_factory(nets):
    assert build_model("mynets:small").out_features == 3
    assert build_model("mynets:small", 4).out_features == 4


@pytest.mark.parametrize("name", ["demo:TinyConvNet", "paper_networks:VGG16"])
def test_a_network_that_has_moved(name):
    with pytest.raises(OptionError, match=f"remedy  write vfsurgery.networks.{name}, which is its name now"):
        build_model(f"vfsurgery.{name}")
    assert isinstance(build_model(f"vfsurgery.networks.{name}"), nn.Module)


@pytest.mark.parametrize("spec", ["resnet18", "timm:", ":resnet18", ""])
def test_unreadable_name(spec):
    with pytest.raises(OptionError, match=r"does not name a model\n  remedy  write timm:NAME, torchvision:NAME or"):
        build_model(spec)


def test_unknown_timm_name():
    with pytest.raises(OptionError, match=r"timm has no model 'resnt18'\n  remedy  nearest names: .*resnet18"):
        build_model("timm:resnt18")


def test_name_on_a_hub_is_not_looked_up():
    with pytest.raises(OptionError, match="names published weights\n  remedy  ask for them with pretrained: true"):
        build_model("timm:hf-hub:timm/resnet18.a1_in1k")


def test_published_weights_in_a_folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    found = build_model(f"timm:local-dir:{tmp_path}", pretrained=True)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(OptionError, match="timm cannot build 'local-dir:"):
        build_model(f"timm:local-dir:{tmp_path / 'none'}", pretrained=True)


def test_published_weights_that_cannot_be_had(nets, monkeypatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OptionError, match="torchvision has no weights for 'resnet18'\n  cause  no route to host"):
        build_model("torchvision:resnet18", pretrained=True)
    with pytest.raises(OptionError, match="torchvision has no weights for 'resnet18'"):
        build_model("torchvision:resnet18", num_classes=7, pretrained=True)
    with pytest.raises(OptionError, match="nobody publishes weights of a model of mynets"):
        build_model("mynets:small", pretrained=True)


def test_unknown_timm_tag():
    with pytest.raises(OptionError, match=r"timm cannot build 'resnet18.nonsense'\n  cause  .*nonsense"):
        build_model("timm:resnet18.nonsense")


def test_unknown_torchvision_name():
    with pytest.raises(OptionError, match=r"torchvision has no model 'vgg11bn'\n  remedy  nearest names: vgg11_bn"):
        build_model("torchvision:vgg11bn")
    with pytest.raises(OptionError, match=r"no name is near it; torchvision.models.list_models\(\) names all"):
        build_model("torchvision:§§§§")


def test_module_that_is_not_there():
    with pytest.raises(OptionError, match=r"cannot import the model nowhere\.nets:small\n  cause   No module named"):
        build_model("nowhere.nets:small")


@pytest.mark.parametrize("name", ["smal", "needs"])
def test_factory_that_is_not_there(nets, name):
    with pytest.raises(OptionError, match=rf"mynets has no model factory '{name}'\n  remedy  .*: fixed, number, small"):
        build_model(f"mynets:{name}")


def test_factory_without_class_count(nets):
    with pytest.raises(OptionError, match=r"mynets:fixed cannot be called as fixed\(num_classes=4\)\n  cause  "):
        build_model("mynets:fixed", 4)


def test_factory_that_returns_no_module(nets):
    with pytest.raises(OptionError, match=r"mynets:number returns a int, not a torch\.nn\.Module"):
        build_model("mynets:number")
