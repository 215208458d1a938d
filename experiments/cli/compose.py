"""The door to Hydra: overrides in, composed configurations out, every complaint one line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashcp.experiments.cli.schema import GROUPS, SETTINGS, typed

__all__ = ["Job", "compose", "expand"]

CONFIGS = "flashcp.conf"


class Job(NamedTuple):
    """One job of a multirun: its configuration as plain values, and the overrides that made it."""

    settings: dict[str, Any]
    overrides: list[str]


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration `conf/NAME.yaml` with overrides, as plain values. Raises ValueError in one line."""
    with _composing(name, overrides):
        return _plain(name, hydra_compose(name, list(overrides)))


def expand(name: str, overrides: Sequence[str]) -> list[Job]:
    """The jobs of a multirun, in the order of Hydra's own sweeper: the last key that varies varies fastest.

    `hydra.sweeper.params` and overrides spelled `key=a,b` span the jobs. Raises ValueError for what does not compose.
    """
    parser = OverridesParser.create()
    with _composing(name, overrides):
        given = parser.parse_overrides(list(overrides))
        single = [str(override.input_line) for override in given if not override.is_sweep_override()]
        params = hydra_compose(name, single, return_hydra_config=True).hydra.sweeper.get("params") or {}
        swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        axes = {override.get_key_element(): _choices(override) for override in [*swept, *given]}  # ours over theirs
        combined = [list(chosen) for chosen in itertools.product(*axes.values())]
    jobs = []
    for chosen in combined:
        with _composing(name, chosen):
            jobs.append(Job(_plain(name, hydra_compose(name, chosen)), chosen))
    return jobs


@contextmanager
def _composing(name: str, overrides: Sequence[str]) -> Iterator[None]:
    _check(overrides)
    with _one_line(name, overrides), initialize_config_module(config_module=CONFIGS, version_base="1.3"):
        yield


def _choices(override: Override) -> list[str]:
    """The values that an override spans, each as an override of its own."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ValueError(f"{override.input_line}: expected values to try, as key=a,b, choice() or range()")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _check(overrides: Sequence[str]) -> None:
    """Hydra would let `+key=1` and `~key` change which keys there are; a configuration's keys are fixed."""
    for override in overrides:
        if override.startswith(("+", "~")) or "=" not in override:
            raise ValueError(f"{override!r} is not an override: expected KEY=VALUE")


def _plain(name: str, config: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return typed(name, values) if name in SETTINGS else values


@contextmanager
def _one_line(name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Hydra's and OmegaConf's errors as a ValueError that names the override and what is legal."""
    try:
        yield
    except MissingConfigException as error:
        if error.options is None:
            raise ValueError(_first_line(error)) from error
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        legal = GROUPS.get(group, sorted(error.options))
        raise ValueError(f"{group}={value}: expected one of {', '.join(legal)}") from error
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} is not an override: expected KEY=VALUE") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_complaint(name, overrides, error)) from error
    except ValueError as error:  # Hydra's own about a group that is given a number or null, which it does not name
        given = next((override for override in overrides if _names_nothing(override)), "")
        if not given or not str(error).startswith("Config group override must be"):
            raise
        legal = GROUPS.get(given.split("=")[0], ["the sweeps that --help lists"])
        raise ValueError(f"{given}: expected one of {', '.join(legal)}") from error


def _complaint(name: str, overrides: Sequence[str], error: Exception) -> str:
    message, cause = str(error), _first_line(error.__cause__) if error.__cause__ else ""
    if unknown := re.match(r"Could not override '(.+?)'", message):
        key = unknown[1]
        if (full := getattr(error.__cause__, "full_key", None)) and str(full).startswith(f"{key}."):
            key = str(full)  # parallel={zz:1}: the key that is unknown is below the one given
        legal = _siblings(name, key, overrides)
        return f"{key}: no such override; expected one of {', '.join(legal)}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)'", message):
        return f"{ambiguous[1]}: expected one value (`flashcp sweep` takes several; a list is written [a,b])"
    return f"{' '.join(message.splitlines()[:2])}{f' ({cause})' if cause else ''}"


def _siblings(name: str, key: str, overrides: Sequence[str]) -> list[str]:
    """The keys that stand where an unknown one was given: those of the groups that were chosen."""
    chosen = [override for override in overrides if override.split("=")[0] in GROUPS.keys() - {key}]
    place: Any = compose(name, chosen)
    for part in key.split(".")[:-1]:
        if not isinstance(place, dict) or not isinstance(place.get(part), dict):
            break
        place = place[part]
    return list(place)


def _names_nothing(override: str) -> bool:
    """Whether a group is given a number, null or the like."""
    value = OverridesParser.create().parse_override(override).value()
    return override.split("=")[0] in (*GROUPS, "experiment") and not isinstance(value, str | list | dict)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
