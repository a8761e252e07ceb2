"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens/ instead of comparing")
    parser.addoption("--fuzz-networks", type=int, default=60, help="networks that tests/fuzz tries (default: 60)")
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        left = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_collectstart() -> None:
    """Seed what a test file draws while it is imported, whichever files were imported before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what fixtures of whole files draw, whichever test is the first to use them."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Seed torch, and use no more threads than the machines of CI have cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))  # OMP_NUM_THREADS=1 where other work shares the cores
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name under tests/goldens; with --update-goldens, write it."""
    update = request.config.getoption("--update-goldens")

    def check(name: str, text: str) -> None:
        path = GOLDENS / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run pytest --update-goldens, and review what it wrote"
        assert text == path.read_text(encoding="utf-8"), "on purpose? then run pytest --update-goldens and review"

    return check


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained pairs and images that may lie beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("there is no folder ../shared with trained pairs")
    return path
