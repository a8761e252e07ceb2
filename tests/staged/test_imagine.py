"""The stage imagine: images for the stages behind it, files of them, and runs that go on."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from small import assert_same, small, staged

import vfsurgery as surgery
from vfsurgery.checkpoints import load_state_dict
from vfsurgery.errors import RecipeError

SOURCES = [
    {"model": "vfsurgery.networks.demo:TinyConvNet", "options": {"width": 4}, "input_size": [1, 8, 8]},
    {"seed": 7},
]
IMAGINE = {"imagine": {"images": 40, "files": ["images.safetensors", "grid.png"]}}
MERGE = {"merge": {"matching": "activations", "renormalize": ["rescale"]}}


def run(tmp_path, *stages, resume=False, **keys):
    recipe = surgery.Recipe.from_yaml(staged(*stages, data=None, sources=SOURCES, **keys))
    return recipe.run(tmp_path / "out", progress=False, resume=resume)


def test_stages_behind_it_calibrate_on_its_images(tmp_path):
    found = run(tmp_path, IMAGINE, MERGE, "export")
    a, b = small(0, 0), small(7, 0)
    images = surgery.imagine([a, b], 40, example_inputs=load_file(found.output / "images.safetensors")["images"][:2])
    assert (load_file(found.output / "images.safetensors")["images"] == images.images).all()
    options = {"matching": "activations", "renormalize": ["rescale"], "progress": False}
    written = load_state_dict(found.output / "small.safetensors")
    assert_same(written, surgery.merge(a, b, data=images, **options).state_dict())
    assert (found.output / "grid.png").stat().st_size > 1000
    assert "40 imagined images; no real image was used" in (found.output / "README.md").read_text()


def test_the_page_shows_them(tmp_path):
    found = run(tmp_path, IMAGINE, MERGE, "diagnose")
    page = (found.output / "small.html").read_text()
    assert "<h2>Imagined images</h2>" in page and "on 40 images that were made from its sources" in page
    with pytest.raises(RecipeError, match="diagnose needs data, or the stage imagine before it"):
        surgery.Recipe.from_yaml(staged(MERGE, "diagnose", data=None, sources=SOURCES))
    with pytest.raises(RecipeError, match="evaluate needs data"):
        surgery.Recipe.from_yaml(staged(IMAGINE, MERGE, "evaluate", data=None, sources=SOURCES))


def test_a_run_goes_on_behind_it_and_other_images_are_another_run(tmp_path):
    first = run(tmp_path, IMAGINE, MERGE)
    again = run(tmp_path, IMAGINE, MERGE, resume=True)
    assert [step.taken_over for step in again.findings[0].all_steps[:2]] == [False, True]
    written = load_state_dict(first.output / "small.safetensors")
    other = run(tmp_path, {"imagine": {"images": 30}}, MERGE, resume=True)
    assert [step.taken_over for step in other.findings[0].all_steps[:2]] == [False, False]
    found = load_state_dict(other.output / "small.safetensors")
    assert any(not (found[name] == written[name]).all() for name in written)


def test_a_merge_and_a_repair_imagine_by_themselves(tmp_path):
    found = run(tmp_path, {"imagine": {"images": 30}}, {"prune": {"sparsity": 0.5}}, "renormalize", "export")
    assert found.output.exists()
    with pytest.raises(RecipeError, match="merge needs data, or the stage imagine before it"):
        surgery.Recipe.from_yaml(
            staged({"merge": {"matching": "activations", "imagine": False}}, data=None, sources=SOURCES)
        )


@pytest.mark.parametrize("file", ["images.jpg", "../images.png"])
def test_files_that_hold_no_images_are_refused(file):
    with pytest.raises(RecipeError, match="can hold no images"):
        surgery.Recipe.from_yaml(staged({"imagine": {"files": [file]}}, MERGE, data=None, sources=SOURCES))
