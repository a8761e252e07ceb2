"""Packages of others: found by entry point, imported on first need, and left out with a warning if broken."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in tests/plugin, installed into a folder of its own; built from a copy, to leave nothing here."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for path in (ROOT / "tests" / "plugin").rglob("*"):
        if path.is_file() and path.suffix in (".toml", ".py", ".md"):
            target = source / path.relative_to(ROOT / "tests" / "plugin")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    options = ["--disable-pip-version-check", "--target", str(folder), str(source)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(code: str, *paths: Path) -> str:
    """What a program prints that finds packages in these folders."""
    found = os.pathsep.join(map(str, (*paths, ROOT)))
    environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plugin_is_imported_when_first_needed_and_works_everywhere(installed):
    printed = run(
        """
        import sys, torch, vfsurgery as surgery
        from torch import nn
        from vfsurgery.passes import PASSES
        assert "surgery_plugin" not in sys.modules, "imported too early"
        surgery.build_pass("repair")
        assert "surgery_plugin" not in sys.modules, "a name that is known needs no plugin"
        print(surgery.build_pass("move-scale", {"factor": 3}))
        assert "move-scale" in list(PASSES)

        from surgery_plugin import Softsign
        torch.manual_seed(0)
        a, b = (nn.Sequential(nn.Linear(4, 8), Softsign(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
        x = torch.randn(2, 4)
        moved = surgery.run_passes(a, "move-scale", example_inputs=x)
        print(torch.allclose(moved(x), a(x), atol=1e-6), torch.equal(moved[2].weight, 2 * a[2].weight))
        print(len(surgery.find_groups(a, x, strict=True)))
        merged = surgery.merge(a, b, matching="reversed", renormalize=["move-scale"], example_inputs=x)
        print(surgery.report_of(merged).matching, surgery.report_of(merged).renormalize)
        """,
        installed,
    )
    assert printed.splitlines() == ["move_scale(factor=3.0)", "True True", "2", "reversed ('move-scale',)"]


def test_a_plugin_conforms(installed):
    run(
        """
        import torch
        from torch import nn
        from vfsurgery.testing import check_data, check_matcher, check_pass, check_pruner, check_rule
        from surgery_plugin import Last, Reversed, Softsign, move_scale
        check_pass(move_scale(), nets=["chain"])
        check_matcher(Reversed(), nets=["grouped"])
        check_pruner(Last(shift=3), nets=["chain"])
        check_data("stripes", {"count": 24})
        check_rule(nn.Sequential(nn.Linear(4, 8), Softsign(), nn.Linear(8, 2)), torch.randn(2, 4))
        """,
        installed,
    )


NETS = """\
from torch import nn

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8))
"""
RECIPE = """\
name: theirs
threads: 1
data: {name: stripes, test: 10, options: {count: 30}}
sources:
  - {model: "nets:Plain"}
  - {}
stages:
  - prune: {sparsity: 0.5, method: last, options: {shift: 2}}
  - move-scale: {factor: 4.0}
  - merge: {matching: reversed, masks: union}
  - count-zeros: {text: zeros}
  - evaluate
"""


def test_a_recipe_has_everything_of_a_plugin_by_name(installed, tmp_path):
    (tmp_path / "theirs.yaml").write_text(RECIPE)
    (tmp_path / "nets.py").write_text(NETS)
    printed = run(
        f"""
        import json, torch, vfsurgery as surgery
        from safetensors.torch import load_file
        from vfsurgery.training import from_seed
        from nets import Plain
        done = surgery.Recipe.from_yaml("{tmp_path}/theirs.yaml").run("{tmp_path}/out", progress=False)
        last = surgery.pruning.PRUNERS["last"](shift=2)
        models = [surgery.prune(from_seed(Plain, seed), 0.5, method=last) for seed in (0, 1)]
        data = surgery.data.load_data("stripes", {{"count": 30, "test": 10}})
        options = {{"data": data.calibration, "progress": False}}
        moves = surgery.build_pass("move-scale", {{"factor": 4.0}})
        moved = [surgery.run_passes(model, moves, **options) for model in models]
        merged = surgery.merge(moved, matching="reversed", masks="union", **options)
        written = load_file("{tmp_path}/out/theirs.safetensors")
        print(all(torch.equal(written[name], value) for name, value in merged.state_dict().items()))
        scores = done.findings[0].said("evaluate").scores
        print(len(data.test), [score.count for score in scores.values()])
        zeros = sum(int((parameter == 0).sum()) for parameter in merged.parameters())
        print(done.findings[0].said("count-zeros").lines == [f"{{zeros}} zeros"])
        print(surgery.report_of(merged).matching)
        """,
        installed,
        tmp_path,
    )
    assert printed.splitlines() == ["True", "10 [10, 10, 10, 10]", "True", "reversed"]


@pytest.mark.parametrize("there", [True, False])
def test_the_schema_lists_the_passes_and_stages_of_plugins(installed, there):
    printed = run(
        """
        import json, subprocess, sys
        done = subprocess.run([sys.executable, "-m", "vfsurgery", "schema"], capture_output=True, text=True, check=True)
        names, section = json.loads(done.stdout)["$defs"]["Stage"]["anyOf"]
        print("move-scale" in names["enum"], section["properties"].get("move-scale", {}).get("properties"))
        print("count-zeros" in names["enum"], "count-zeros" in section["properties"])
        """,
        *([installed] if there else []),
    )
    expected = "True {'factor': {'type': 'number', 'default': 2.0}}\nTrue True" if there else "False None\nFalse False"
    assert printed.strip() == expected


def test_a_rule_of_a_plugin_is_there_for_the_first_trace(installed):
    """The module itself is reached without importing the plugin: only the entry point brings the rule."""
    printed = run(
        """
        import sys, torch, vfsurgery as surgery
        from torch import nn
        surgery.find_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
        print("surgery_plugin" in sys.modules)
        """,
        installed,
    )
    assert printed == "True\n"


def test_without_the_package_its_names_are_unknown():
    printed = run(
        """
        import vfsurgery as surgery
        try:
            surgery.build_pass("move-scale")
        except surgery.SurgeryError as error:
            print(error)
        """
    )
    assert printed.startswith("unknown pass 'move-scale'\n  remedy  did you mean 'rescale'?")


def distribution(folder: Path, name: str, code: str) -> None:
    """A distribution whose plugin is ``code``, laid down as an installer would."""
    (folder / f"{name}_plugin.py").write_text(code)
    metadata = folder / f"{name}_dist-0.7.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 0.7\n")
    (metadata / "entry_points.txt").write_text(f"[vfsurgery.plugins]\n{name} = {name}_plugin\n")


BROKEN = {
    "absent": ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    "raising": ("raise SystemError('out of order')", "SystemError: out of order"),
    "taking": (
        "import vfsurgery as surgery\n@surgery.register_pass(name='repair')\ndef f(graph_module, context): ...",
        "OptionError: two entries claim the pass name 'repair'",
    ),
}
LOOKING = "from vfsurgery.passes import PASSES\nassert 'nothing' not in PASSES\nassert list(PASSES)\n"
"""Looks things up while it is imported."""


def test_broken_plugins_are_left_out_with_warnings_that_name_their_distributions(installed, tmp_path):
    for name, (code, _) in BROKEN.items():
        distribution(tmp_path, name, code)
    distribution(tmp_path, "looking", LOOKING)
    printed = run(
        """
        import warnings, vfsurgery as surgery
        from vfsurgery.passes import PASSES
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = list(PASSES), list(PASSES)
        print("move-scale" in names[0], "repair" in names[0])
        for warning in caught:
            print(warning.category.__name__, warning.message)
        """,
        installed,
        tmp_path,
    )
    assert printed.startswith("True True\n") and printed.count("PluginWarning") == len(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert f"the plugin '{name}' of {name}-dist 0.7 was left out" in printed and reason in printed
