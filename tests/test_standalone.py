"""A network with preserved prefixes is an ordinary graph module: it is saved, exported, trained, and run anywhere."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_nets import images, net, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.passes import Preserve

X = images(4, 9)
FORMS = ("grouped", "branches")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def merged(form: str = "branches", *, boundary: int | str = 3, training: bool = False) -> nn.Module:
    a, b = net("residual", 1), net("residual", 2)
    if training:
        a.train()
        a.block1.bn2.eval()
        a.block1.conv1.weight.requires_grad_(False)
        b.block1.conv1.weight.requires_grad_(False)
    kept = Preserve(boundary=boundary, form=form)
    return surgery.merge(a, b, preserve=kept, data=images(32), progress=False)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(X)


@pytest.mark.parametrize("form", FORMS)
def test_it_holds_live_modules_and_nothing_of_this_library(form: str) -> None:
    model = merged(form)
    assert isinstance(model, fx.GraphModule)
    reached = {str(node.target) for node in model.graph.nodes if node.op in ("call_module", "get_attr")}
    leaves = {path for path, module in model.named_modules() if not any(True for _ in module.children())}
    assert leaves == {path for path in reached if isinstance(model.get_submodule(path), nn.Module)}
    assert not any(type(module).__module__.startswith("vfsurgery") for module in model.modules())
    assert model.meta == {} and all(node.meta == {} for node in model.graph.nodes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model._tracer_cls in (None, fx.Tracer)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_and_loaded_and_copied_whole(form: str, tmp_path: Path) -> None:
    model = merged(form)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for twin in (loaded, copy.deepcopy(model)):
        assert torch.equal(logits(twin), logits(model))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.allclose(logits(twin), logits(model), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_exported_by_torch_for_any_batch_size(form: str) -> None:
    model = merged(form)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model.eval(), (X,), dynamic_shapes=({0: batch},))
    more = images(7, 5)
    with torch.no_grad():
        assert torch.allclose(program.module()(more), model(more), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_exported_to_onnx_and_computes_the_same_there(form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path, more = merged(form).eval(), tmp_path / "model.onnx", images(7, 5)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    torch.onnx.export(model, (X,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(more), **CLOSE)
        assert not torch.allclose(torch.from_numpy(found), net("residual", 1).eval()(more), **CLOSE)


def test_it_runs_where_this_library_is_not_installed(tmp_path: Path) -> None:
    models = [merged(form) for form in FORMS]
    torch.save({"models": models, "x": X, "logits": [logits(model) for model in models]}, tmp_path / "saved.pt")
    script = textwrap.dedent("""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "vfsurgery":
                    raise ImportError("vfsurgery is not installed")
        sys.meta_path.insert(0, Blocked())
        try:
            import vfsurgery
        except ImportError:
            pass
        else:
            raise SystemExit("the block does not work")
        import torch
        saved = torch.load(sys.argv[1], weights_only=False)
        for model, logits in zip(saved["models"], saved["logits"]):
            with torch.no_grad():
                assert torch.allclose(model(saved["x"]), logits, rtol=1e-4, atol=1e-5)
        print("the same")
    """)
    arguments = [sys.executable, "-c", script, str(tmp_path / "saved.pt")]
    found = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.stdout == "the same\n", found.stderr


@pytest.mark.parametrize("form", FORMS)
def test_it_is_trained_further(form: str) -> None:
    model = merged(form, training=True)
    assert model.training
    before = state_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(images(16)), torch.arange(16) % 5).backward()
    optimizer.step()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.removeprefix("source_0.").removeprefix("source_1.") for name in frozen} == {"block1.conv1.weight"}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name, _ in model.named_parameters()} - changed == frozen
    assert any("running_mean" in name for name in changed)


@pytest.mark.parametrize("form", FORMS)
def test_modules_are_in_the_mode_that_the_reference_has_them_in(form: str) -> None:
    model = merged(form, boundary=4, training=True)
    norms = {path: module.training for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {path for path, training in norms.items() if not training} == {
        path for path in norms if path.endswith("block1.bn2")
    }
    assert all(module.training for module in model.eval().train().modules())
    assert not any(module.training for module in model.eval().modules())
