"""The door to Hydra: a verb is an application of `hydra.main`; every complaint is one line."""

from __future__ import annotations

import itertools
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, update_wrapper
from pathlib import Path
from traceback import extract_tb
from typing import Any, ClassVar, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, Sweep
from hydra.core.utils import env_override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashcp.experiments.cli.schema import GROUPS, SETTINGS, committed, typed
from flashcp.experiments.folders import check_file, leave_no_trace
from flashcp.experiments.sweep.results import RESULTS
from flashcp.sharding.values import cut, first_line, shown

CONFIGS = "flashcp.conf"
PATHS = frozenset({"path", "out", "figure", "cluster_file", "replay", "resume", "tokenizer"})
"""Last parts of keys whose values may be paths."""
SEVERAL = ("-m", "--multirun", "hydra.mode=", "experiment=")
"""How a word begins that may make several jobs of one line: a comma then separates values."""
at_refusal: list[Callable[[], Any]] = []
"""What to do when the application that runs turns out to have bad input."""
OmegaConf.register_new_resolver("out_or", lambda out, name: out or f"outputs/{name}", replace=True)
OmegaConf.register_new_resolver("over", lambda whole, part: whole // part, replace=True)
OmegaConf.register_new_resolver("most", max, replace=True)


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
    """Run `task(job)` as the application of `conf/NAME.yaml`. words: overrides, then Hydra's own options.

    Returns exit code 0. Raises ValueError in one line for bad input, and SystemExit where the task, a callback or Hydra
    ends with it.
    """
    job, words = update_wrapper(partial(_job, task, name), task), quoted(words)
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    before, sys.argv = sys.argv, ["flashcp", *words]
    at_refusal.clear()
    try:
        with _one_line(name, given), env_override({"HYDRA_FULL_ERROR": "1"}):  # errors reach us as they are
            hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=name)(job)()
    except ValueError:
        for undo in at_refusal:
            undo()
        raise
    finally:
        sys.argv = before
    return 0


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
    overrides = quoted(overrides)
    with _one_line(name, overrides):
        return plain(name, _composed(name, overrides))


def composed_jobs(name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The configuration of every job of a multirun, in its order. Raises ValueError in one line."""
    overrides = quoted(overrides, several=True)
    with _one_line(name, overrides):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = [_one_each(one) or [word] for word, one in zip(overrides, parsed, strict=True)]
    return [compose(name, job) for job in itertools.product(*values)]


def _composed(name: str, overrides: Sequence[str], **options: bool) -> DictConfig:
    with hydra.initialize_config_module(config_module=CONFIGS, version_base="1.3"):
        return hydra.compose(name, list(overrides), **options)


def plain(name: str, config: DictConfig) -> dict[str, Any]:
    """The values of `conf/NAME.yaml`, without Hydra's own. Raises ValueError naming key, value and what is legal."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    values: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    return typed(name, values) if name in SETTINGS else values


@contextmanager
def _one_line(name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Errors of Hydra, OmegaConf and YAML as a ValueError that names the override and what is legal."""
    for override in overrides:  # a configuration's keys are fixed, but for Hydra's own
        if override.startswith(("+", "~")) and not override.lstrip("+~").startswith("hydra"):
            raise ValueError(f"{shown(override)} is not an override: expected KEY=VALUE")
    try:
        with _read_as_yaml():
            yield
    except Carried as carrier:
        raise carrier.__cause__ or carrier from None
    except MissingConfigException as error:
        if error.options is None:
            raise ValueError(first_line(error)) from error
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        simulated = (*committed("simulation"), "lab") if group == "experiment" else ()
        legal = ", ".join(dict.fromkeys((*GROUPS.get(group, ()), *sorted(error.options), *simulated)))
        one = f"flashcp sweep {group}={value}, one sweep that simulates at a time"
        given = cut(f"{group}={value}")
        raise ValueError(f"{given}: expected {one if value in simulated else f'one of {legal}'}") from error
    except OverrideParseException as error:
        raise ValueError(f"{shown(error.override)} is not an override: expected KEY=VALUE") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_complaint(name, overrides, error)) from error
    except (OSError, RuntimeError) as error:  # of Hydra's own keys: folders that cannot be made, plugins that are none
        if any(frame.name == "return_value" for frame in extract_tb(error.__traceback__)):  # a job's, elsewhere
            raise
        raise ValueError(first_line(error)) from error
    except (TypeError, ValueError) as error:  # Hydra's own about a group that is given no name, which it does not name
        given = next((override for override in overrides if _names_nothing(override)), "")
        if not given or not (isinstance(error, TypeError) or str(error).startswith("Config group override must be")):
            raise
        legal_here = GROUPS.get(given.split("=")[0], ["the sweeps that --help lists"])
        raise ValueError(f"{cut(given)}: expected one of {', '.join(legal_here)}") from error


@contextmanager
def _read_as_yaml() -> Iterator[None]:
    """Whatever YAML's reader raises, of any type where a tag does not fit its text, as a ValueError."""
    try:
        yield
    except Exception as error:
        if not any(Path(frame.filename).parent.name == "yaml" for frame in extract_tb(error.__traceback__)):
            raise
        raise ValueError(f"not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error


def _complaint(name: str, overrides: Sequence[str], error: Exception) -> str:
    message, cause = str(error), first_line(error.__cause__) if error.__cause__ else ""
    if unknown := re.match(r"Could not override '(.+?)'", message):
        key = unknown[1]
        if (full := getattr(error.__cause__, "full_key", None)) and str(full).startswith(f"{key}."):
            key = str(full)  # parallel={zz:1}: the key that is unknown is below the one given
        if having := _having(name, key, overrides):
            return f"{key}: of what is swept only {', '.join(having)} has this key; expected one that all have"
        chosen = [word for word in overrides if word.split("=")[0] in GROUPS.keys() - {key} and "," not in word]
        config, last = compose(name, chosen), key.split(".")[-1]
        meant = [path for path in _paths(config) if path.endswith(f".{key}")]
        if last != key and last in config:  # it stands at the top, not in that section
            meant = [last]
        elsewhere = "".join(f"{path}, or " for path in meant)
        return f"{key}: no such override; expected {elsewhere}one of {', '.join(_place(name, key, chosen))}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)'", message):
        return f"{ambiguous[1]}: expected one value (-m or `flashcp sweep` takes several; a list is written [a,b])"
    if "does not support sweep type" in message:
        endless = [override for override in overrides if "interval(" in override]
        return f"{cut(' '.join(endless))}: expected values to try, as key=a,b, choice() or range()"
    return f"{' '.join(message.splitlines()[:2])}{f' ({cause})' if cause else ''}"


def _having(name: str, key: str, overrides: Sequence[str]) -> list[str]:
    """Which values of the groups that are swept bring this key, where some do and some do not."""
    named = [override for override in overrides if override.startswith("experiment=")]
    params = _composed(name, named, return_hydra_config=True).hydra.sweeper.get("params") or {}
    words = [*(f"{group}={values}" for group, values in params.items()), *overrides]
    swept = OverridesParser.create().parse_overrides([word for word in words if word.split("=")[0] in GROUPS])
    values = itertools.chain.from_iterable(map(_one_each, swept))
    return [value for value in values if key.split(".")[-1] in _place(name, key, [value])]


def _one_each(override: Override) -> list[str]:
    """The overrides, of one value each, that one of several values stands for; none for other overrides."""
    if not override.is_discrete_sweep():
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _place(name: str, key: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The section that a key belongs to, or the innermost that there is."""
    place: Any = compose(name, overrides)
    for part in key.split(".")[:-1]:
        if not isinstance(place.get(part), dict):
            break
        place = place[part]
    return dict(place)


def _paths(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Of all values, as `loop.steps`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _names_nothing(override: str) -> bool:
    """Whether a group is given a number, null or the like, or a list of them."""
    value = OverridesParser.create().parse_override(override).value()
    names = value if isinstance(value, list) else [value]
    wrong = not all(isinstance(name, str | dict) for name in names)
    return override.split("=")[0] in (*GROUPS, "experiment") and wrong


# --- overrides as Hydra's grammar takes them: a value that it cannot parse, or would take a path for more, is text


def quoted(words: Sequence[str], several: bool = False) -> list[str]:
    """The words, with quotes around what is meant as it stands. several: whether they make several jobs, which some
    words (SEVERAL) say too.

    Of any key what the grammar refuses, such as `a(1).txt`; of a key of PATHS also a number, which would be written
    otherwise, and where there is one job a comma.
    """
    several = several or any(word.startswith(SEVERAL) for word in words)
    return [_quoted(word, several) for word in words]


def _quoted(word: str, several: bool) -> str:
    key, is_override, value = word.partition("=")
    more = () if several or key.rpartition(".")[2] not in PATHS else (Sweep, int, float)
    if not is_override or _parses(word, more):
        return word
    values = value.split(",") if several else [value]
    texts = [
        one if several and _parses(f"{key}={one}") else QuotedString(one, Quote.single).with_quotes() for one in values
    ]
    made = f"{key}={','.join(texts)}"
    return made if _parses(made) else word


def _parses(word: str, but: tuple[type[Any], ...] = ()) -> bool:
    """Whether it is an override, of a value of no type in `but`."""
    try:
        return not isinstance(OverridesParser.create().parse_override(word).value(), but)
    except (HydraException, RecursionError):  # Hydra itself will say what is wrong with the key
        return False


# --- several jobs: all at the end, or each where a launcher puts it; then what they come to


def is_multirun() -> bool:
    """Whether the job that runs is one of several."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def swept(config: DictConfig) -> set[str]:
    """The keys that a multirun varies."""
    params = config.hydra.sweeper.get("params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    given = OverridesParser.create().parse_overrides(words)
    last = {override.get_key_element(): override for override in given}  # the command line after what is committed
    return {key for key, override in last.items() if override.is_sweep_override()}


class Tidy(Callback):
    """Of a multirun with bad input nothing stays in the folder that Hydra makes for it (`hydra.sweep.dir`)."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        with carried():
            check_file(file)
        if file.exists():
            at_refusal.append(partial(file.write_bytes, file.read_bytes()))
        else:
            made = [place for place in file.parents if not place.exists()]
            at_refusal.append(partial(leave_no_trace, [file], made))


class Multirun(Callback, ABC):
    """Hydra's callback of an application whose jobs belong together, `config` naming its file in `conf/`.

    Under Hydra's own launcher and sweeper a job is checked and waits: bad input of the last one is found before the
    first one begins, and at the end all are at hand at once. Other launchers run a job where and when they like, other
    sweepers want its result: there each runs by itself. Either way the report is made at the end, in this process.
    """

    config: ClassVar[str]
    _current: ClassVar[Multirun]

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.out = Path()
        self.swept: set[str] = set()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """What holds for all jobs; it travels with the callback to wherever a job runs."""
        self.out, self.swept = Path(config.hydra.sweep.dir), swept(config)
        with carried():
            check_file(self.out / RESULTS)
            self.start(plain(self.config, config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        Multirun._current, choices = self, config.hydra.runtime.choices
        if is_multirun() and choices["hydra/launcher"] == choices["hydra/sweeper"] == "basic":  # it waits
            with carried():
                self.jobs.append(Job(plain(self.config, config), list(config.hydra.overrides.task)))
                self.check(self.jobs[-1])

    @classmethod
    def run_job(cls, job: Job) -> float | None:
        """The job that Hydra runs here and now, where it does not wait. Returns what a sweeper may ask for."""
        current = cls._current
        if current.jobs:
            return None
        current.check(job)
        return current.run([job], alone=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Run what waits, then report."""
        with carried():
            if self.jobs:
                self.run(self.jobs)
            self.report()

    @abstractmethod
    def start(self, settings: dict[str, Any]) -> None:
        """Read what holds for all jobs from the configuration they vary."""

    @abstractmethod
    def check(self, job: Job) -> None:
        """Raise ValueError for a job that cannot run."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], alone: bool = False) -> float | None:
        """Run jobs: all, or one `alone`, beside others that may run at the same time."""

    @abstractmethod
    def report(self) -> None:
        """Show what there is in `out`."""
