"""What simulated numbers say to do, on numbers that are made up."""

from __future__ import annotations

import pytest

from flashcp.clusters import read_machine
from flashcp.experiments.cli.compose import compose
from flashcp.simulator.planned import Setting
from flashcp.simulator.summary import Summary, overlap_of, recommendation
from flashcp.simulator.variants import VARIANTS, Variant


def summary(name: str, module_ms: float, implementation: str = "published") -> Summary:
    numbers = dict.fromkeys(Summary._fields, 1.0)
    names = {"name": name, "sharding": "s", "exchange": "e", "implementation": implementation, "overlap": "fused"}
    return Summary(**{**numbers, **names, "module_ms": module_ms, "speedup": 100 / module_ms})  # type: ignore[arg-type]


def test_the_fastest_that_runs_and_what_comes_next() -> None:
    text = recommendation([summary("llama3", 100), summary("per_document", 90), summary("flashcp", 50, "ours")])
    assert text.startswith("fastest: flashcp (sharding=s exchange=e overlap=fused), 2.00x over llama3 as published")
    assert text.endswith("; 1.80x over per_document as published, which comes next")


def test_less_than_two_percent_is_as_fast() -> None:
    text = recommendation([summary("ulysses", 50.9), summary("flashcp", 50, "ours"), summary("ring", 52)])
    assert "; as fast within 2%: ulysses as published; 1.04x over ring as published, which comes next" in text


def test_a_best_effort_is_no_advice() -> None:
    best = summary("x_best_effort", 40, "best effort")
    text = recommendation([best, summary("ring", 60), summary("llama3", 100)])
    assert text.startswith("fastest: ring as published, 1.67x")
    assert text.endswith("; x_best_effort would be 1.50x faster, if somebody's code did it")
    assert "would be" not in recommendation([summary("x_best_effort", 59.5, "best effort"), summary("ring", 60)])
    assert recommendation([best]).startswith("fastest: x_best_effort, 2.50x")


def test_the_baseline_alone_is_no_rival() -> None:
    assert "comes next" not in recommendation([summary("llama3", 100), summary("flashcp", 50, "ours")])


@pytest.mark.parametrize(
    ("variant", "overlap"),
    [
        (VARIANTS["llama3"], "none"),
        (VARIANTS["ring"], "ring"),
        (VARIANTS["ring_best_effort"], "fused"),
        (Variant("", "contiguous", "ring"), "staged"),
        (Variant("", "contiguous", "ulysses"), "none"),
        (VARIANTS["flashcp"], "fused"),
    ],
)
def test_what_hides_transfers(variant: Variant, overlap: str) -> None:
    setting = Setting(read_machine(compose("simulate", [])["cluster"]), overlap="fused")
    assert overlap_of(variant, setting) == overlap
