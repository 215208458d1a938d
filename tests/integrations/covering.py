"""Few cases in which every pair of choices occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def every_pair(
    choices: Mapping[str, Sequence[Any]],
    allowed: Callable[[Case], bool],
    cost: Callable[[Case], float],
    seed: int = 0,
    tries: int = 200,
) -> list[Case]:
    """Cases with one value for each name, such that every two values that may stand together do in some case.

    Greedy: of some random cases the one with the most new pairs for its cost is taken, until no pair is left or none
    can come.
    """
    draw = random.Random(seed)
    wanted = {
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(choices, 2)
        for a in choices[one]
        for b in choices[other]
    }
    cases: list[Case] = []
    while wanted:
        pair = dict(min(wanted, key=sorted_text))
        drawn = [{name: pair.get(name, draw.choice(values)) for name, values in choices.items()} for _ in range(tries)]
        fitting = [case for case in drawn if allowed(case)]
        if not fitting:
            wanted.discard(frozenset(pair.items()))
            continue
        best = max(fitting, key=lambda case: len(wanted & pairs_of(case)) / cost(case))
        wanted -= pairs_of(best)
        cases.append(best)
    return cases


def pairs_of(case: Case) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def sorted_text(pair: frozenset[tuple[str, Any]]) -> list[str]:
    return sorted(map(str, pair))
