"""Files of `conf/cluster/`: a machine's parameters as YAML, with the line that each of them comes from."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from flashcp.experiments.schema import GROUPS
from flashcp.experiments.simulator.machine import Machine, read_machine

__all__ = ["cluster_text", "read_cluster_file"]


def cluster_text(machine: Machine, about: str) -> str:
    """The file of a machine. about: its first line."""
    values = _rounded(dataclasses.asdict(machine))
    body = OmegaConf.to_yaml(OmegaConf.create(values))
    return f"# {about}\ndefaults:\n  - cluster_schema\n  - _self_\n\n{body}"


def read_cluster_file(path: str) -> Machine:
    """The machine in a file like those of `conf/cluster/`. Raises ValueError for anything else."""
    field = f"cluster_file={path!r}"
    try:
        loaded = OmegaConf.load(Path(path).expanduser())
        values: Any = OmegaConf.to_container(_with_defaults(loaded, field), resolve=True)
    except OSError as error:
        raise ValueError(f"{field}: cannot be read ({error.strerror or error})") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: not YAML ({' '.join(str(error).split())[:80]})") from error
    except RecursionError as error:
        raise ValueError(f"{field}: nested too deeply, or a part holds itself") from error
    return read_machine(values, "cluster_file", path)


def _with_defaults(config: Any, field: str) -> Any:
    """A file's own keys over those of the clusters that its `defaults` name, later ones over earlier ones."""
    if not isinstance(config, DictConfig):
        return config
    values: Any = OmegaConf.to_container(config)
    names = values.pop("defaults", []) or []
    own = OmegaConf.create(values)
    folder = resources.files("flashcp.conf") / "cluster"
    legal = GROUPS["cluster"]
    if not isinstance(names, list):
        raise ValueError(f"{field}: defaults={names!r}: expected a list of {', '.join(legal)}")
    parts = []
    for name in names if "_self_" in names else [*names, "_self_"]:
        if name == "_self_":
            parts.append(own)
        elif name in legal:
            parts.append(_with_defaults(OmegaConf.create((folder / f"{name}.yaml").read_text("utf-8")), field))
        elif name != "cluster_schema":  # the fields themselves, which `read_machine` knows
            raise ValueError(f"{field}: defaults holds {name!r}: expected one of {', '.join(legal)}, _self_")
    return OmegaConf.merge(*parts)


def _rounded(value: Any) -> Any:
    """Four digits are more than anything here is known to."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
