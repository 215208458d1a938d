"""The law of imports: which room may import which, no circles, and which libraries stay behind one door.

Read from the syntax trees, so it also sees imports inside functions and under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.checkout import ROOT, python_files

# room -> the rooms it may import, itself included
MAY_IMPORT = {
    "sharding": {"sharding"},
    "simulator": {"sharding", "simulator"},
    "kernels": {"sharding", "kernels"},
    "comm": {"sharding", "kernels", "comm"},
    "flashcp": {"sharding", "simulator", "kernels", "comm", "flashcp"},
    "train": {"sharding", "simulator", "kernels", "comm", "flashcp", "train"},
    "experiments": {"sharding", "simulator", "kernels", "comm", "flashcp", "train", "experiments", "conf"},
    "conf": set(),
}
# library -> the only places (folders or files) that may import it
BEHIND_ONE_DOOR = {
    "hydra": ("experiments/",),
    "omegaconf": ("experiments/",),
    "safetensors": ("train/export.py",),
    "accelerate": ("flashcp/integrations/",),
    "torchtitan": ("flashcp/integrations/",),
    "transformers": ("flashcp/integrations/",),
    "wandb": ("train/tracker.py",),
    "yaml": ("flashcp/clusters.py",),
}
# room -> what it may use besides the standard library: at import time, and inside functions
FEW_LIBRARIES = {
    "sharding": ({"numpy"}, {"numpy", "numba", "ortools"}),
    "simulator": ({"numpy"}, {"numpy", "numba"}),
}
# file, module: what torch and Triton offer under a private name alone
NO_PUBLIC_NAME = {
    ("comm/choice.py", "torch.distributed"),  # symmetric memory
    ("comm/nvshmem.py", "torch.distributed"),
    ("kernels/ahead.py", "triton.experimental.gluon._runtime"),  # compiling ahead of time
    ("train/trace.py", "torch._C._profiler"),  # every rank's clock in one trace
}
READS_FILES = {"fileinput", "glob", "io", "mmap", "pathlib", "pkgutil", "shutil", "tempfile"}


class Import(NamedTuple):
    file: str  # relative to the root
    line: int
    module: str  # absolute, as written: flashcp.sharding.plan
    late: bool  # inside a function
    names: tuple[str, ...] = ()  # what is taken from it: modules, or things in it

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def room_of_module(module: str) -> str | None:
    """flashcp.kernels.x -> kernels, flashcp.attention -> flashcp, a library -> None."""
    head, *rest = module.split(".")
    if head in MAY_IMPORT and head != "flashcp":
        return head  # the folder's bare name: only right by accident, and forbidden below
    if head != "flashcp":
        return None
    return rest[0] if rest and rest[0] in MAY_IMPORT else "flashcp"


def find_imports(file: str, tree: ast.AST, late: bool = False) -> Iterator[Import]:
    """Every import below `tree`; `from flashcp import comm` is flashcp.comm, import_module("x") is x."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["flashcp", *Path(file.removeprefix("flashcp/")).parts[:-1]]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            if base == "flashcp":
                yield from (Import(file, node.lineno, f"flashcp.{alias.name}", late) for alias in node.names)
            else:
                yield Import(file, node.lineno, base, late, tuple(alias.name for alias in node.names))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(file, node.lineno, str(node.args[0].value), late)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from find_imports(file, node, late or inside)


def syntax(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


@cache
def all_imports() -> tuple[Import, ...]:
    files = [name for name in python_files() if name.split("/")[0] in MAY_IMPORT]
    return tuple(imp for name in files for imp in find_imports(name, syntax(name)))


def test_rooms_import_only_the_rooms_below() -> None:
    broken = [
        str(imp)
        for imp in all_imports()
        if (room := room_of_module(imp.module)) and room not in MAY_IMPORT[imp.file.split("/")[0]]
    ]
    assert not broken


def test_rooms_are_imported_through_flashcp() -> None:
    bare = [str(imp) for imp in all_imports() if imp.module.split(".")[0] in MAY_IMPORT.keys() - {"flashcp"}]
    assert not bare


def module_name(file: str) -> str:
    """sharding/plan.py -> flashcp.sharding.plan, flashcp/__init__.py -> flashcp."""
    parts = Path(file.removeprefix("flashcp/")).with_suffix("").parts
    return ".".join(["flashcp", *(part for part in parts if part != "__init__")])


def arrows(files: Iterable[str], imports: Iterable[Import]) -> dict[str, set[str]]:
    """The modules that each module names in an import, wherever it stands.

    A package's `__init__.py` runs before its modules without being named, and makes no arrow by that.
    """
    found: dict[str, set[str]] = {module_name(file): set() for file in files}
    for imp in imports:
        taken = [f"{imp.module}.{name}" for name in imp.names] or [imp.module]
        found[module_name(imp.file)] |= {name if name in found else imp.module for name in taken} & found.keys()
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other, the first one again at the end; empty where there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    files = [name for name in python_files() if name.split("/")[0] in MAY_IMPORT]
    assert circle(arrows(files, all_imports())) == []


@pytest.mark.parametrize(
    "closing",
    [
        "from flashcp.sharding.plan import Shard",
        "from flashcp.sharding import plan",
        "from flashcp.sharding import METHODS, plan",
        "import flashcp.sharding.plan",
        "from .. import plan",
        "from ..plan import Shard",
        "def f():\n    from flashcp.sharding.plan import Shard",
        "if TYPE_CHECKING:\n    from flashcp.sharding.plan import Shard",
        "importlib.import_module('flashcp.sharding.plan')",
    ],
)
def test_a_circle_is_found(closing: str) -> None:
    sources = {
        "sharding/plan.py": "from flashcp.sharding.route import Route",
        "sharding/route.py": "from flashcp.sharding.exchanges import ring",
        "sharding/exchanges/__init__.py": "from flashcp.sharding.exchanges import ring",
        "sharding/exchanges/ring.py": "import numpy",
    }

    def found() -> list[str]:
        return circle(
            arrows(sources, (imp for name in sources for imp in find_imports(name, ast.parse(sources[name]))))
        )

    assert found() == []
    sources["sharding/exchanges/ring.py"] = closing
    assert set(found()) == {f"flashcp.sharding.{name}" for name in ("plan", "route", "exchanges.ring")}


@pytest.mark.parametrize("library", BEHIND_ONE_DOOR)
def test_library_stays_behind_its_door(library: str) -> None:
    doors = BEHIND_ONE_DOOR[library]
    broken = [
        str(imp) for imp in all_imports() if imp.module.split(".")[0] == library and not imp.file.startswith(doors)
    ]
    assert not broken


def private(imports: Iterable[Import]) -> list[str]:
    """Imports of what its owner marks as private by a leading underscore."""
    names = ((imp, [*imp.module.split("."), *imp.names]) for imp in imports)
    return [str(imp) for imp, parts in names if any(re.match(r"_(?!_)", part) for part in parts)]


def test_nothing_private_is_imported() -> None:
    assert private(imp for imp in all_imports() if (imp.file, imp.module) not in NO_PUBLIC_NAME) == []
    assert {(imp.file, imp.module) for imp in all_imports()} >= NO_PUBLIC_NAME
    source = """from hydra._internal.hydra import Hydra
from hydra.core import _private
import hydra._internal as h
from __future__ import annotations"""
    assert len(private(find_imports("train/x.py", ast.parse(source)))) == 3


@pytest.mark.parametrize("room", FEW_LIBRARIES)
def test_a_room_that_needs_few_libraries(room: str) -> None:
    at_import, late = FEW_LIBRARIES[room]
    found = [imp for imp in all_imports() if imp.file.startswith(f"{room}/")]
    assert found
    for imp in found:
        library = imp.module.split(".")[0]
        if library in sys.stdlib_module_names or library == "flashcp":
            continue
        assert library in (late if imp.late else at_import), imp


@pytest.mark.parametrize("room", FEW_LIBRARIES)
def test_a_room_that_reads_no_files(room: str) -> None:
    for name in (name for name in python_files() if name.startswith(f"{room}/")):
        calls = [node for node in ast.walk(syntax(name)) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if ast.unparse(call.func) == "open"], name
    broken = [
        str(imp) for imp in all_imports() if imp.file.startswith(f"{room}/") and imp.module.split(".")[0] in READS_FILES
    ]
    assert not broken


def test_triton_functions_live_in_kernels() -> None:
    for name in (name for name in python_files() if not name.startswith(("kernels/", "tests/kernels/"))):
        functions = [node for node in ast.walk(syntax(name)) if isinstance(node, ast.FunctionDef)]
        decorators = [ast.unparse(decorator) for node in functions for decorator in node.decorator_list]
        assert not [decorator for decorator in decorators if "triton.jit" in decorator], name


@pytest.mark.parametrize(
    ("file", "source", "modules"),
    [
        ("comm/ring.py", "import flashcp.train as t", ["flashcp.train"]),
        ("comm/ring.py", "from flashcp import train, plan", ["flashcp.train", "flashcp.plan"]),
        ("comm/ring.py", "from ..train import loop", ["flashcp.train"]),
        ("comm/exchanges/ring.py", "from ..heap import Heap", ["flashcp.comm.heap"]),
        ("flashcp/attention.py", "from .kernels import cpu", ["flashcp.kernels"]),
        ("comm/ring.py", "importlib.import_module('wandb.sdk')", ["wandb.sdk"]),
    ],
)
def test_the_reader_of_imports(file: str, source: str, modules: list[str]) -> None:
    assert [imp.module for imp in find_imports(file, ast.parse(source))] == modules
    inside = f"def function():\n    {source}"
    assert [imp.late for imp in find_imports(file, ast.parse(inside))] == [True] * len(modules)
