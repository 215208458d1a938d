"""A machine as a file like those of `conf/cluster/`, written without any library."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flashcp.simulator.machine import Machine

__all__ = ["cluster_text"]


def cluster_text(machine: Machine, about: str) -> str:
    """The file of a machine. about: its first line."""
    return "\n".join([f"# {about}", *_lines(dataclasses.asdict(machine), "")]) + "\n"


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
