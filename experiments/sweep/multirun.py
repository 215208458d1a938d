"""What a multirun does with its jobs: all at its end, or each where a launcher puts it; then what they come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from flashcp.experiments.cli.compose import Job, at_refusal, carried, plain
from flashcp.experiments.folders import check_file, leave_no_trace
from flashcp.experiments.sweep.results import RESULTS


def is_multirun() -> bool:
    """Whether the job that runs is one of several."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def waits(config: DictConfig) -> bool:
    """Whether this job waits for the end of its multirun: Hydra's own launcher and sweeper are at work."""
    choices = config.hydra.runtime.choices
    plugins = choices["hydra/launcher"], choices["hydra/sweeper"]
    return bool(config.hydra.mode == RunMode.MULTIRUN and plugins == ("basic", "basic"))


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
        """Note what there was."""
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
        """Check a job that waits."""
        Multirun._current = self
        if waits(config):
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
