"""Installing: links, pins, and the same imports from a checkout, an editable install, a wheel and an sdist's wheel."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from setuptools import find_packages

import flashcp
from tests.checkout import ROOT, checkout_files, checkout_links, python_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BESIDE = {"flashcp", "docs", "examples", "tests"}
ROOMS = sorted({name.split("/")[0] for name in python_files() if "/" in name} - BESIDE)
IMPORT_ALL = f"import {', '.join(f'flashcp.{room}' for room in ROOMS)}, flashcp; print(flashcp.__file__)"
PLAN = "import sys, flashcp; flashcp.plan([100, 28], 4); assert 'torch' not in sys.modules"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output; a failure shows both streams."""
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def names_in(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line).group().lower() for line in requirements} - {"flashcp"}  # type: ignore[union-attr]


# --- what pyproject.toml says


def test_the_package_links_to_every_room_and_to_nothing_else() -> None:
    assert ROOMS
    links = {name: str((ROOT / name).readlink()) for name in checkout_links()}
    assert links == {f"flashcp/{room}": f"../{room}" for room in ROOMS}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {str(Path(name).parent) for name in python_files() if name.split("/")[0] in {*ROOMS, "flashcp"}}
    packages = {f"flashcp/{folder.removeprefix('flashcp')}".replace("//", "/").strip("/") for folder in folders}
    packages = {package.replace("/", ".") for package in packages}
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert found == {"include": ["flashcp*"], "namespaces": False}
    assert sorted(find_packages(str(ROOT), include=found["include"])) == sorted(packages)


def test_every_requirement_is_pinned_and_every_pin_is_portable() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())  # no +cpu, markers, addresses
    extras = PROJECT["project"]["optional-dependencies"]
    extras = [line for extra in ("dev", "parquet", "tokenizers", "zstd") for line in extras[extra]]
    assert names_in(PROJECT["project"]["dependencies"] + extras) - {name.lower() for name in pins} == set()
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
    assert f"rev: v{pins['ruff']}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_version_is_the_same_everywhere() -> None:
    assert flashcp.__version__ == PROJECT["project"]["version"]
    assert f"## [{flashcp.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names() -> None:
    assert set(flashcp.__all__) <= set(dir(flashcp))
    for name in flashcp.__all__:
        assert getattr(flashcp, name).__name__ == name
        assert find_spec(f"flashcp.{name}") is None  # importing a module of that name would hide it
    with pytest.raises(AttributeError, match="'flashcp' has no attribute 'plans'"):
        flashcp.plans  # noqa: B018


# --- the five ways to import


def scratch(folder: Path) -> Path:
    """The interpreter of an empty environment which sees this one's libraries, but not its flashcp.

    A path in a .pth file is searched last and its own .pth files (an editable flashcp) are not read.
    """
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib*/python*/site-packages"))
    libraries = {str(Path(module.__path__[0]).parent) for module in (numpy, pytest)}
    (site / "libraries.pth").write_text("\n".join(sorted(libraries)))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files and links that git would keep: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in [*checkout_files(), *checkout_links()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def pip(python: Path, *arguments: str | Path, cwd: Path) -> None:
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, *arguments, *offline, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(Path(sys.executable), "wheel", source, "-w", folder, cwd=folder)
    return next(folder.glob("flashcp-*.whl"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=source)
    return next(folder.glob("flashcp-*.tar.gz"))


def install(wheel: Path, folder: Path) -> Path:
    """The bin folder of an environment with the wheel in it."""
    python = scratch(folder / "env")
    pip(python, "install", wheel, cwd=folder)
    return python.parent


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def installed_from_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed_from_sdist")
    pip(Path(sys.executable), "wheel", sdist, "-w", folder, cwd=folder)
    return install(next(folder.glob("flashcp-*.whl")), folder)


def test_import_from_the_checkout(tmp_path: Path) -> None:
    python = scratch(tmp_path / "env")
    assert run(python, "-c", IMPORT_ALL, cwd=ROOT).strip() == str(ROOT / "flashcp/__init__.py")


def test_import_from_another_directory(tmp_path: Path) -> None:
    python = scratch(tmp_path / "env")
    found = run(python, "-c", IMPORT_ALL, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert found.strip() == str(ROOT / "flashcp/__init__.py")


def test_import_from_an_editable_install(source: Path, tmp_path: Path) -> None:
    python = scratch(tmp_path / "env")
    pip(python, "install", "-e", source, cwd=tmp_path)
    assert run(python, "-c", IMPORT_ALL, cwd=tmp_path).strip() == str(source / "flashcp/__init__.py")
    assert run(python, "-c", IMPORT_ALL, cwd=source).strip() == str(source / "flashcp/__init__.py")


@pytest.mark.parametrize("environment", ["installed", "installed_from_sdist"])
def test_import_from_a_wheel(environment: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bin_folder: Path = request.getfixturevalue(environment)
    found = run(bin_folder / "python", "-c", IMPORT_ALL, cwd=tmp_path).strip()
    assert found.startswith(str(bin_folder.parent)), found
    run(bin_folder / "python", "-c", PLAN, cwd=tmp_path)


def packaged() -> dict[str, bytes]:
    """What of the checkout is installed: code, configurations and templates, by their path below site-packages."""
    data = r"(?:conf|experiments/paper)/.*\.yaml|experiments/.*\.(?:j2|mplstyle|txt)|flashcp/py\.typed"
    data += r"|experiments/(?:bench|sweep)/.*\.csv"
    kept = re.compile(rf"(?:flashcp|{'|'.join(ROOMS)})/.*\.py|{data}")
    names = [name for name in checkout_files() if kept.fullmatch(name)]
    return {f"flashcp/{name.removeprefix('flashcp/')}": (ROOT / name).read_bytes() for name in names}


def test_wheel_holds_the_code_and_the_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
        assert [entry.filename for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)] == []
        held = {entry.filename: archive.read(entry) for entry in entries}
    assert sorted(held) == sorted(packaged())
    assert held == packaged()


def test_sdist_holds_the_same_as_real_files_and_what_builds_them(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if not member.isdir()]
        assert [member.name for member in members if not member.isreg()] == []
        files = {member.name.partition("/")[2]: archive.extractfile(member) for member in members}
        held = {name: file.read() for name, file in files.items() if file}
    beside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    held = {name: data for name, data in held.items() if "flashcp.egg-info/" not in name and name not in beside}
    assert sorted(held) == sorted(packaged())
    assert held == packaged()


# --- the command, from a wheel


@pytest.mark.parametrize("environment", ["installed", "installed_from_sdist"])
def test_command_from_a_wheel(environment: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    command = request.getfixturevalue(environment) / "flashcp"
    assert "sweep" in run(command, "--help", cwd=tmp_path)
    plans = run(command, "plan", "--json", "world_size=2", "context=1024", cwd=tmp_path)
    assert "llama3" in {method["name"] for method in json.loads(plans)["methods"]}


# --- planning is light


def fastest(action: Callable[[], object], tries: int = 5) -> float:
    """Seconds of the best of a few tries: other processes on the machine can only make it slower."""
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_planning_is_quick_and_leaves_torch_alone() -> None:
    assert fastest(lambda: run(sys.executable, "-c", PLAN, cwd=ROOT)) < 0.5
