"""The door to Hydra: a verb is an application of `hydra.main`; every complaint is one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import env_override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashcp.experiments.cli.schema import GROUPS, SETTINGS, committed, typed

__all__ = ["Job", "at_refusal", "carried", "compose", "plain", "run", "run_app"]

CONFIGS = "flashcp.conf"
VALUED = ("-c", "--cfg", "-p", "--package", "-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path")
"""Hydra's options that a value follows."""
at_refusal: list[Callable[[], Any]] = []
"""What to do when the application that runs turns out to have bad input."""
OmegaConf.register_new_resolver("out_or", lambda out, name: out or f"outputs/{name}", replace=True)


class Job(NamedTuple):
    """One job: its configuration as plain values, and the overrides that made it."""

    settings: dict[str, Any]
    overrides: list[str]


Task = Callable[[Job], Any]


class Carried(BaseException):
    """Takes its cause, an error of ours, through Hydra, which tells of every Exception in its own words."""


def run(task: Task, name: str, words: Sequence[str]) -> int:
    """As `run_app`, for a verb that takes a second: plain overrides are composed once, and Hydra's application, which
    composes twice, starts for its options and keys alone."""
    if any(word.startswith(("-", "hydra", "+hydra", "~hydra")) for word in words):
        return run_app(task, name, words)
    task(Job(compose(name, words), list(words)))
    return 0


def run_app(task: Task, name: str, words: Sequence[str]) -> int:
    """Run `task(job)` as the application of `conf/NAME.yaml`. words: overrides, and Hydra's own options.

    Returns exit code 0. Raises ValueError in one line for bad input, and SystemExit where the task, a callback or Hydra
    ends with it.
    """
    job = update_wrapper(partial(_job, task, name), task)
    given = _overrides(words)
    before, sys.argv = sys.argv, ["flashcp", *given, *(word for word in words if word not in given)]  # in one piece
    at_refusal.clear()
    try:
        with _one_line(name, given), env_override({"HYDRA_FULL_ERROR": "1"}):  # errors reach us as they are
            _check(given)
            hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=name)(job)()
    except ValueError:
        for undo in at_refusal:
            undo()
        raise
    finally:
        sys.argv = before
    return 0


def _overrides(words: Sequence[str]) -> list[str]:
    """The words that are neither options nor their values; --info may have none."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before in VALUED or (before in ("-i", "--info") and "=" not in word)
        if not word.startswith("-") and not is_value:
            found.append(word)
    return found


def _job(task: Task, name: str, config: DictConfig) -> Any:
    own = HydraConfig.get()
    here = own.mode == RunMode.RUN or own.runtime.choices["hydra/launcher"] == "basic"
    with carried() if here else nullcontext():
        return task(Job(plain(name, config), list(own.overrides.task)))


@contextmanager
def carried() -> Iterator[None]:
    """In a job or a callback of this process: errors go through Hydra to `run_app`."""
    try:
        yield
    except Exception as error:
        raise Carried from error


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration `conf/NAME.yaml` with overrides, as plain values. Raises ValueError in one line."""
    with _one_line(name, overrides), hydra.initialize_config_module(config_module=CONFIGS, version_base="1.3"):
        _check(overrides)
        return plain(name, hydra.compose(name, list(overrides)))


def _check(overrides: Sequence[str]) -> None:
    """Hydra would let `+key=1` and `~key` change which keys there are; a configuration's keys are fixed, but for
    Hydra's own."""
    for override in overrides:
        if override.startswith(("+", "~")) and not override.lstrip("+~").startswith("hydra"):
            raise ValueError(f"{override!r} is not an override: expected KEY=VALUE")


def plain(name: str, config: DictConfig) -> dict[str, Any]:
    """The values of `conf/NAME.yaml`, without Hydra's own. Raises ValueError naming key, value and what is legal."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    values: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    return typed(name, values) if name in SETTINGS else values


@contextmanager
def _one_line(name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Hydra's and OmegaConf's errors as a ValueError that names the override and what is legal."""
    try:
        yield
    except Carried as carrier:
        raise carrier.__cause__ or carrier from None
    except MissingConfigException as error:
        if error.options is None:
            raise ValueError(_first_line(error)) from error
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        if group == "experiment" and value in committed("simulation"):
            expected = f"flashcp sweep {group}={value}, one sweep that simulates at a time"
            raise ValueError(f"{group}={value}: expected {expected}") from error
        simulated = committed("simulation") if group == "experiment" else ()
        legal = dict.fromkeys((*GROUPS.get(group, ()), *sorted(error.options), *simulated))
        raise ValueError(f"{group}={value}: expected one of {', '.join(legal)}") from error
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} is not an override: expected KEY=VALUE") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_complaint(name, overrides, error)) from error
    except ValueError as error:  # Hydra's own about a group that is given a number or null, which it does not name
        given = next((override for override in overrides if _names_nothing(override)), "")
        if not given or not str(error).startswith("Config group override must be"):
            raise
        legal_here = GROUPS.get(given.split("=")[0], ["the sweeps that --help lists"])
        raise ValueError(f"{given}: expected one of {', '.join(legal_here)}") from error


def _complaint(name: str, overrides: Sequence[str], error: Exception) -> str:
    message, cause = str(error), _first_line(error.__cause__) if error.__cause__ else ""
    if unknown := re.match(r"Could not override '(.+?)'", message):
        key = unknown[1]
        if (full := getattr(error.__cause__, "full_key", None)) and str(full).startswith(f"{key}."):
            key = str(full)  # parallel={zz:1}: the key that is unknown is below the one given
        if having := _having(name, key, overrides):
            return f"{key}: of what is swept only {', '.join(having)} has this key; expected one that all have"
        legal = _siblings(name, key, overrides)
        return f"{key}: no such override; expected one of {', '.join(legal)}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)'", message):
        return f"{ambiguous[1]}: expected one value (-m or `flashcp sweep` takes several; a list is written [a,b])"
    if "does not support sweep type" in message:
        endless = [override for override in overrides if "interval(" in override]
        return f"{' '.join(endless)}: expected values to try, as key=a,b, choice() or range()"
    return f"{' '.join(message.splitlines()[:2])}{f' ({cause})' if cause else ''}"


def _having(name: str, key: str, overrides: Sequence[str]) -> list[str]:
    """Which values of the groups that are swept bring this key, where some do and some do not."""
    named = [override for override in overrides if override.startswith("experiment=")]
    with hydra.initialize_config_module(config_module=CONFIGS, version_base="1.3"):
        params = hydra.compose(name, named, return_hydra_config=True).hydra.sweeper.get("params") or {}
    words = [*(f"{group}={values}" for group, values in params.items()), *overrides]
    groups = [word for word in words if word.split("=")[0] in GROUPS]
    found: list[str] = []
    for override in OverridesParser.create().parse_overrides(groups):
        if override.is_discrete_sweep():
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            found += [value for value in values if key.split(".")[-1] in _place(name, key, [value])]
    return found


def _siblings(name: str, key: str, overrides: Sequence[str]) -> list[str]:
    """The keys that stand where an unknown one was given: those of the groups that were chosen."""
    chosen = [override for override in overrides if override.split("=")[0] in GROUPS.keys() - {key}]
    return list(_place(name, key, [override for override in chosen if "," not in override]))


def _place(name: str, key: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The section that a key belongs to, or the innermost that there is."""
    place: Any = compose(name, overrides)
    for part in key.split(".")[:-1]:
        if not isinstance(place.get(part), dict):
            break
        place = place[part]
    return dict(place)


def _names_nothing(override: str) -> bool:
    """Whether a group is given a number, null or the like."""
    value = OverridesParser.create().parse_override(override).value()
    return override.split("=")[0] in (*GROUPS, "experiment") and not isinstance(value, str | list | dict)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
