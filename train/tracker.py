"""What a run writes down: metrics.jsonl always, Weights & Biases beside it when it can."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from flashcp.limits import one_of
from flashcp.sharding.values import first_line, read_whole
from flashcp.train.checksums import parse_json

LONGEST_ROW = 1 << 20  # bytes; a step's have some hundreds
WANDB_MODES = ("offline", "online", "disabled")


@dataclass
class TrackerConfig:
    """How a run shows in Weights & Biases. Offline runs need no key; `wandb sync` uploads them later."""

    wandb: Annotated[str, one_of(WANDB_MODES)] = "offline"
    project: str = "flashcp"
    group: str = ""
    job_type: str = "train"
    name: str = ""
    tags: list[str] = field(default_factory=list)


class Tracker:
    """One row a step, in `rows` and in out/metrics.jsonl, which is the record; wandb never stops a run.

    first_step: the first step this run will log. Rows of an interrupted run before it stay, later ones go.
    Raises ValueError when they cannot be read.
    """

    def __init__(self, config: TrackerConfig, out: Path, run_config: dict[str, Any], first_step: int = 1) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []
        if first_step > 1 and path.is_file():
            self.rows = [row for row in _earlier_rows(path) if row["step"] < first_step]
        self._file = path.open("w", encoding="utf-8")
        for row in self.rows:
            self._write(row)
        self._run = _start_wandb(config, out, run_config)

    def log(self, row: dict[str, Any]) -> None:
        """Write one step's row."""
        self.rows.append(row)
        self._write(row)
        self._tell_wandb(lambda run: run.log(row, step=row["step"]))

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Finish both records."""
        self._file.close()
        if summary:
            self._tell_wandb(lambda run: run.summary.update(summary))
        self._tell_wandb(lambda run: run.finish(exit_code=0 if summary else 1))

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:  # the system does not say which file
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def _tell_wandb(self, action: Callable[[Any], None]) -> None:
        run, self._run = self._run, None
        if run is not None:
            with _wandb_or_not():
                action(run)
                self._run = run


def _earlier_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an interrupted run; a last line that was cut off is left out."""
    with path.open("rb") as lines:
        for number, line in enumerate(iter(partial(lines.readline, LONGEST_ROW + 1), b""), start=1):
            try:
                if len(line) > LONGEST_ROW:
                    raise ValueError(f"more than {LONGEST_ROW} bytes")
                if not line.endswith(b"\n"):
                    return
                row = parse_json(line)
                read_whole("step", row["step"], least=0)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not a row of metrics ({error}); move the file away") from error
            yield row


def track_comparison(
    config: TrackerConfig,
    out: Path,
    columns: list[str],
    rows: list[list[Any]],
    chart: tuple[str, str],
    summary: dict[str, Any],
) -> None:
    """One wandb run that compares others: a table, a bar chart of two of its columns (label, number), a summary."""
    run, (label, number) = _start_wandb(config, out, {}), chart
    if run is not None:
        with _wandb_or_not():
            import wandb

            compared = wandb.Table(columns=list(columns), data=rows)
            run.log({"comparison": compared, number: wandb.plot.bar(compared, label, number, title=number)})
            run.summary.update(summary)
            run.finish()


def _start_wandb(config: TrackerConfig, out: Path, run_config: dict[str, Any]) -> Any:
    run = None
    if config.wandb != "disabled":
        with _wandb_or_not():
            import wandb

            run = wandb.init(
                mode=cast(Any, config.wandb),
                dir=out,
                project=config.project,
                group=config.group or None,
                job_type=config.job_type,
                name=config.name or None,
                tags=config.tags or None,
                config=run_config,
                reinit="create_new",  # runs that take turns are open at the same time
                settings=wandb.Settings(silent=True, console="off"),
            )
    return run


@contextmanager
def _wandb_or_not() -> Iterator[None]:
    """A run goes on when wandb is not installed, has no key, no network, no disk, or died."""
    try:
        yield
    except Exception as error:
        print(f"wandb is off for the rest of this run ({first_line(error)}); metrics.jsonl goes on", file=sys.stderr)
