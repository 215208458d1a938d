"""Plain mappings (from JSON, YAML, OmegaConf) to dataclasses; an unknown key or a wrong type is an error."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

from flashcp.sharding.values import MOST_SHOWN, as_float, is_whole, shown

Section = TypeVar("Section")
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, written [a,b]",
}


def read_dataclass(kind: type[Section], values: Any, name: str = "") -> Section:
    """A dataclass from a mapping; fields left out keep their defaults, fields may be dataclasses themselves.

    name: what the mapping is called in messages, e.g. `model`. Raises ValueError naming the key, its value
    and the legal keys or type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or 'config'}={shown(values)}: expected a mapping of fields")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given = {}
    for key, value in values.items():
        label = _dotted(name, key)
        if key not in fields:
            raise ValueError(f"{label}: no such field; expected one of {', '.join(fields)}")
        given[key] = _read(hints[key], value, label)
    return kind(**given)


def read_options(
    function: Callable[..., Any], values: Mapping[str, Any], name: str, but: Container[str] = ()
) -> dict[str, Any]:
    """Keyword options of a function, with the types that it says they have. Raises ValueError as `read_dataclass`.

    Options without a default and those in `but` are the caller's own, and those that take a function are for Python
    alone: no such keys.
    """
    hints = typing.get_type_hints(function)
    options = [item.name for item in inspect.signature(function).parameters.values() if item.default is not item.empty]
    legal = [option for option in options if not _takes_function(hints[option]) and option not in but]
    for key in values:
        if key not in legal:
            raise ValueError(f"{_dotted(name, key)}: no such field; expected one of {', '.join(legal)}")
    return {key: _read(hints[key], value, f"{name}.{key}") for key, value in values.items()}


def _dotted(name: str, key: object) -> str:
    text = " ".join(key.split())[:MOST_SHOWN] if isinstance(key, str) else shown(key)
    return f"{name}.{text}" if name else text


def _takes_function(hint: Any) -> bool:
    return any(part is Callable or typing.get_origin(part) is Callable for part in (hint, *typing.get_args(hint)))


def _read(hint: Any, value: Any, name: str) -> Any:
    if hint is Any:
        return value
    if typing.get_origin(hint) is typing.Annotated:
        read = _read(typing.get_args(hint)[0], value, name)
        for limit in typing.get_args(hint)[1:]:
            if not limit.holds(read):
                raise ValueError(f"{name}={shown(read)}: expected {limit.wanted}")
        return read
    if isinstance(hint, types.UnionType):  # of a type and None
        return None if value is None else _read(typing.get_args(hint)[0], value, name)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, name)  # type: ignore[arg-type]
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # Hydra reads out=2026 as a number
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return as_float(value)
    if hint is int and is_whole(value) and abs(value) >= 2**63:
        raise ValueError(f"{name}={shown(value)}: expected a whole number that 64 bits hold")
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if origin is list and isinstance(value, Sequence) and not isinstance(value, str):
        return [_read(inner[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{name}={shown(value)}: expected {KINDS.get(origin, f'a {origin.__name__}')}")
    return value
