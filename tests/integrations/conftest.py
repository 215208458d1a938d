"""What tests beside other libraries share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; workers start with this too


@pytest.fixture(scope="session", autouse=True)
def kernels_is_no_package(every_file_is_one_module: None) -> Iterator[None]:
    """Transformers looks for a package `kernels`, and finds our folder of that name where tests run."""
    yield
    sys.modules.pop("kernels", None)
