"""Files of `conf/cluster/`: a machine's parameters as YAML, with the line that each of them comes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from flashcp.experiments.simulator.machine import Machine, read_machine

__all__ = ["cluster_text", "read_cluster_file"]


def cluster_text(machine: Machine, about: str) -> str:
    """The file of a machine. about: its first line."""
    values = _rounded(dataclasses.asdict(machine))
    body = OmegaConf.to_yaml(OmegaConf.create(values))
    return f"# {about}\ndefaults:\n  - cluster_schema\n  - _self_\n\n{body}"


def read_cluster_file(path: str) -> Machine:
    """The machine in a file like those of `conf/cluster/`. Raises ValueError for anything else."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(Path(path).expanduser()), resolve=True)
    except OSError as error:
        raise ValueError(f"cluster_file={path!r}: cannot be read ({error.strerror})") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cluster_file={path!r}: not YAML ({' '.join(str(error).split())[:80]})") from error
    if isinstance(values, dict):
        values.pop("defaults", None)
    return read_machine(values, "cluster_file")


def _rounded(value: Any) -> Any:
    """Four digits are more than anything here is known to."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
