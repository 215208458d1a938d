"""Files of `conf/cluster/`: a machine's parameters as YAML, with the line that each of them comes from.

Hydra composes the same files; here they are read and written without it, and written without any library.
"""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from flashcp.experiments.simulator.machine import Machine, read_machine

__all__ = ["cluster_text", "read_cluster_file"]

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
"""What Hydra takes for a number: PyYAML wants a point in 1e6."""


def cluster_text(machine: Machine, about: str) -> str:
    """The file of a machine. about: its first line."""
    lines = [f"# {about}", "defaults:", "  - cluster_schema", "  - _self_", ""]
    return "\n".join([*lines, *_lines(dataclasses.asdict(machine), "")]) + "\n"


def read_cluster_file(path: str) -> Machine:
    """The machine in a file like those of `conf/cluster/`. Raises ValueError for anything else."""
    field = f"cluster_file={path!r}"
    try:
        values = _with_defaults(_load(Path(path).expanduser().read_text("utf-8"), field), field)
    except OSError as error:
        raise ValueError(f"{field}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: not YAML ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{field}: nested too deeply, or a part holds itself") from error
    return read_machine(values, "cluster_file", path)


def _load(text: str, field: str) -> Any:
    """What YAML says, {} where it says nothing."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: reading it needs PyYAML, which is not installed") from error

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{NUMBER.pattern})$", re.I), "-+.0123456789")
    try:
        found = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{field}: not YAML ({' '.join(str(error).split())[:80]})") from error
    return {} if found is None else found


def _with_defaults(values: Any, field: str) -> Any:
    """A file's own keys over those of the clusters that its `defaults` name, later ones over earlier ones."""
    if not isinstance(values, dict):
        return values
    own = {name: value for name, value in values.items() if name != "defaults"}
    names = values.get("defaults") or []
    files = {
        file.name.removesuffix(".yaml"): file
        for file in sorted((resources.files("flashcp.conf") / "cluster").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }
    if not isinstance(names, list):
        raise ValueError(f"{field}: defaults={names!r}: expected a list of {', '.join(files)}")
    found: dict[str, Any] = {}
    for name in names if "_self_" in names else [*names, "_self_"]:
        if name == "_self_":
            found = _merged(found, own)
        elif isinstance(name, str) and name in files:
            found = _merged(found, _with_defaults(_load(files[name].read_text("utf-8"), field), field))
        elif name != "cluster_schema":  # the fields themselves, which `read_machine` knows
            raise ValueError(f"{field}: defaults holds {name!r}: expected one of {', '.join(files)}, _self_")
    return found


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; where both have a value, the second's."""
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name, {}), dict)
        merged[name] = _merged(merged.get(name, {}), value) if both else value
    return merged


def _lines(section: dict[str, Any], indent: str) -> list[str]:
    """A section as block YAML. Four digits are more than anything here is known to."""
    lines = []
    for name, value in section.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, f"{indent}  ")] if value else [f"{indent}{name}: {{}}"]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    """A number or a text; JSON's are YAML's."""
    return json.dumps(float(f"{value:.4g}") if isinstance(value, float) else value, ensure_ascii=False)
