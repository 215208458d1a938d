"""Fixtures and settings for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.checkout import ROOT

with suppress(ModuleNotFoundError):  # a machine with a GPU may lack it, and tests of kernels do without
    from hypothesis import HealthCheck, settings

    # A slow example says nothing on a busy machine; how long a test may take is pytest-timeout's business.
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    settings.register_profile("flashcp", patient, max_examples=250)
    settings.register_profile("thorough", patient, max_examples=3000)
    settings.load_profile("flashcp")


LIBRARIES = (
    "hydra",
    "hypothesis",
    "matplotlib",
    "numba",
    "omegaconf",
    "pyarrow",
    "tokenizers",
    "torchtitan",
    "tqdm",
    "transformers",
    "trl",
    "wandb",
    "yaml",
)
"""What a machine with a GPU may lack."""


class Module(pytest.Module):
    """A test file, skipped whole where what it imports asks for one of LIBRARIES and that is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except Exception as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, ModuleNotFoundError):
                cause = cause.__cause__
            library = ((cause and cause.name) or "").partition(".")[0]
            if library not in LIBRARIES or find_spec(library):
                raise
            # What was imported of it stays behind otherwise, and another file would find half of it.
            for name in [
                name for name, known in sys.modules.items() if getattr(known, "__file__", "") == str(self.path)
            ]:
                del sys.modules[name]
            pytest.skip(f"needs {library}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Test files are collected as `Module`."""
    return Module.from_parent(parent, path=module_path)


@pytest.fixture(scope="session", autouse=True)
def every_file_is_one_module() -> Iterator[None]:
    """A file that is reached by two paths must not become two modules, each with classes and registries of its own."""
    yield
    names: dict[Path, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        inside = Path(file).relative_to(ROOT).parts if file and Path(file).is_relative_to(ROOT) else ()
        if inside and not inside[0].startswith(".venv"):
            names.setdefault(Path(file).resolve(), []).append(name)
    assert {str(file): known for file, known in names.items() if len(known) > 1} == {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` skip themselves where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
