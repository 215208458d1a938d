"""The columns of a sweep's table, in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flashcp.experiments.sweep.comparison import LOSS_TOLERANCE, Comparison, Line

__all__ = ["Column", "columns"]


class Column(NamedTuple):
    """title: `{baseline}` stands for the comparison's. says: what the number is. single: whether the single-process
    run has one too."""

    title: str
    says: str
    value: Callable[[Line], float | str | None]
    form: str
    single: bool = True

    def cell(self, line: Line) -> str:
        """The number as text; empty where there is none."""
        value = None if line.is_single and not self.single else self.value(line)
        return "" if value is None else format(value, self.form)


ATTENTION = "attention kernels of one step, forward and backward, slowest rank"
STEP = Column(
    "step ms", "whole optimizer step: median over steps after warm-up, with p20 - p80 below", lambda x: x.step_ms, ".0f"
)
RESULT = (
    Column(
        "speedup over {baseline}",
        "step of the baseline / this step: median of the ratios within a turn, in brackets p20 - p80; not told apart: "
        "that range has 1 in it",
        lambda x: x.speedup_text,
        "",
    ),
    Column("final loss", "nats a token at the last step", lambda x: x.final_loss, ".5f"),
    Column(
        "loss difference",
        "largest relative difference at any step from one process on the same packs; "
        f"{LOSS_TOLERANCE:.0e} is the limit in fp32",
        lambda x: x.loss_difference,
        ".1e",
    ),
)
METHODS = (
    Column(
        "imbalance",
        "work of the busiest rank / mean work, mean over windows; 1 is balanced",
        lambda x: x.imbalance,
        ".3f",
        single=False,
    ),
    Column("saving", "1 - KV rows on the critical rank / the all-gather's", lambda x: x.saving, ".3f", single=False),
    Column("attention ms", ATTENTION, lambda x: x.attention_ms, ".0f"),
    Column(
        "exchange ms",
        "packing, sending and waiting for rows that no attention hides, slowest rank",
        lambda x: x.exposed_exchange_ms,
        ".1f",
    ),
    STEP,
    *RESULT,
)
OVERLAPS = (
    Column(
        "exposed ms",
        "what the exchange adds to a step: attention ms, and time in the exchange outside it, beyond the attention ms "
        "of overlap none",
        lambda x: x.exposed_ms,
        ".1f",
        single=False,
    ),
    Column(
        "hidden",
        "1 - exposed ms / that of overlap none; not within 0 and 1 where attention varied too much between the runs",
        lambda x: x.hidden,
        ".2f",
        single=False,
    ),
    Column("wait ms", "waiting for slower ranks, slowest rank", lambda x: x.wait_ms, ".1f", single=False),
    Column("attention ms", f"{ATTENTION}; under fused with the waits inside", lambda x: x.attention_ms, ".0f"),
    STEP,
    *RESULT,
)


def columns(comparison: Comparison) -> list[Column]:
    """What is told of each line beside its name."""
    chosen = OVERLAPS if comparison.of_overlap else METHODS
    return [column._replace(title=column.title.format(baseline=comparison.over)) for column in chosen]
