"""Plain mappings (from JSON, YAML, OmegaConf) to dataclasses; an unknown key or a wrong type is an error."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["read_dataclass"]

Section = TypeVar("Section")


def read_dataclass(kind: type[Section], values: Any, name: str = "") -> Section:
    """A dataclass from a mapping; fields left out keep their defaults, fields may be dataclasses themselves.

    name: what the mapping is called in messages, e.g. `model`. Raises ValueError naming the key, its value
    and the legal keys or type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or 'config'}={values!r}: expected a mapping of fields")
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given = {}
    for key, value in values.items():
        label = f"{name}.{key}" if name else str(key)
        if key not in fields:
            raise ValueError(f"{label}: no such field; expected one of {', '.join(fields)}")
        given[key] = _read(hints[key], value, label)
    return kind(**given)


def _read(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, name)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if origin is list and isinstance(value, Sequence) and not isinstance(value, str):
        return [_read(inner[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"{name}={value!r}: expected {wanted.get(origin, f'a {origin.__name__}')}")
    return value
