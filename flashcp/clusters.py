"""Files of `conf/cluster/`: a machine's parameters as YAML, each with where it comes from.

Hydra composes the same files; here they are read without it.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from flashcp.files import read_bounded, read_path
from flashcp.schema import read_dataclass
from flashcp.sharding.values import check_choice, shown
from flashcp.simulator.machine import Machine, check_machine

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
"""What Hydra takes for a number: PyYAML wants a point in 1e6."""


def clusters() -> tuple[str, ...]:
    """The names that `read_cluster` takes: the files of `conf/cluster/`."""
    return tuple(_files())


def read_cluster(name: str) -> Machine:
    """The machine that `conf/cluster/NAME.yaml` describes. Raises ValueError for a name that there is not."""
    check_choice("cluster", name, clusters())
    return read_machine(_load(_files()[name].read_text("utf-8"), f"cluster={name!r}"))


def read_cluster_file(path: str) -> Machine:
    """The machine in a file like those of `conf/cluster/`. Raises ValueError for anything else."""
    field = f"cluster_file={shown(path)}"
    if not isinstance(path, str | Path):
        raise ValueError(f"{field}: expected the path of a file")
    try:
        values = _load(read_bounded(read_path(path, "cluster_file"), field, most_mib=1).decode(), field)
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: not YAML ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{field}: nested too deeply, or a part holds itself") from error
    return read_machine(values, "cluster_file", path)


def read_machine(values: Mapping[str, Any], name: str = "cluster", file: str = "") -> Machine:
    """A machine from a configuration's section, or from a file's. Raises ValueError naming value, field and what is
    legal."""
    try:
        machine = read_dataclass(Machine, values, name)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{name}{f'={file!r}' if file else ''}: {_missing(Machine, values)} is missing") from error
    check_machine(machine, name)
    return machine


def _missing(section: Any, values: Mapping[str, Any]) -> str:
    """The dotted name of the first field that has neither a value nor a default."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        kind, value = hints[item.name], values.get(item.name)
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            return item.name
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping) and (inner := _missing(kind, value)):
            return f"{item.name}.{inner}"
    return ""


@cache
def _files() -> dict[str, Traversable]:
    """The committed clusters by name, in the order of their names."""
    found = sorted((resources.files("flashcp.conf") / "cluster").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


def _load(text: str, field: str) -> Any:
    """What YAML says, {} where it says nothing; a file's own keys over those of the clusters that its `defaults` name,
    later ones over earlier ones."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: reading it needs PyYAML, which is not installed") from error

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{NUMBER.pattern})$", re.I), "-+.0123456789")
    try:
        found = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # a tag that its text does not fit
        raise ValueError(f"{field}: not YAML ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(found, dict):
        return {} if found is None else found
    names, files = found.pop("defaults", None) or [], _files()
    if not isinstance(names, list):
        raise ValueError(f"{field}: defaults={shown(names)}: expected a list of {', '.join(files)}")
    merged: dict[str, Any] = {}
    for name in names if "_self_" in names else [*names, "_self_"]:
        if name == "_self_":
            merged = _merged(merged, found)
        elif isinstance(name, str) and name in files:
            merged = _merged(merged, _load(files[name].read_text("utf-8"), field))
        elif name != "cluster_schema":  # files of earlier versions name it
            raise ValueError(f"{field}: defaults holds {shown(name)}: expected one of {', '.join(files)}, _self_")
    return merged


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; where both have a value, the second's."""
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name, {}), dict)
        merged[name] = _merged(merged.get(name, {}), value) if both else value
    return merged
