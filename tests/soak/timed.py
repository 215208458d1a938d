"""Random windows of ten kinds: is any member of the portfolio faster than the plan, as predicted?

    python -m tests.soak.timed 2000 FOLDER          (a part of `make plans`)

Each window is simulated on 2 to 16 ranks of one of the committed clusters, by `flashcp.simulate` as people call it. A
window is its number: `check(number)` says what is wrong with it. Exit code 1 where anything is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import flashcp
from flashcp.clusters import clusters
from flashcp.experiments.sweep.results import Number, to_row, write_rows
from tests.sharding.test_flashcp import KINDS, better_members
from tests.soak.plans import workers

RANKS = (2, 3, 4, 8, 16)
KV_HEADS = (8, 32)
MEMBERS = ("contiguous", "per_document", "per_sequence", "flashcp_paper")
MORE = 1.01  # times a member's, that is slower


def check(number: int) -> tuple[float, float, str]:
    """The plan's time over the fastest member's, that of the plan that knows no cluster over it, and what is wrong."""
    draw = np.random.default_rng(number)
    lengths, ranks = list(KINDS.values())[number % len(KINDS)](draw), int(draw.choice(RANKS))
    told = {"cluster": list(clusters())[int(draw.integers(len(clusters())))], "kv_heads": int(draw.choice(KV_HEADS))}
    methods = ["flashcp", "flashcp:h1", *(f"{one}+exact" for one in MEMBERS)]
    table = flashcp.simulate(lengths, ranks, methods=methods, **told)
    auto, ours, *members = (one.module_ms for one in table)
    by_rows = flashcp.simulate(lengths, ranks, methods="flashcp:h1", plan_by="rows", **told).methods[0].module_ms
    fastest = min(members)
    wrong = [f"{number}: {one / fastest:.4f} times a member's time" for one in (auto, ours) if one > MORE * fastest]
    wrong += [f"{number}: a member is better: {other}" for other in better_members(flashcp.plan(lengths, ranks))]
    return max(auto, ours) / fastest, by_rows / fastest, "; ".join(wrong)


def main(count: int, folder: Path) -> int:
    """Exit code: 1 where something is wrong."""
    with workers() as pool:
        found = list(tqdm(pool.map(check, range(count), chunksize=10), total=count, unit="window"))
    ours, by_rows = np.array([one[:2] for one in found]).T
    wrong = [one[2] for one in found if one[2]]
    case = f"windows of {len(KINDS)} kinds, up to 20,000 tokens, {', '.join(clusters())}"
    rows = [
        Number("plans", name, "1", None, float(value), None)
        for name, value in {
            "windows": count,
            "violations": len(wrong),
            "most of a plan's time over a member's": ours.max(),
            "windows where a member is faster by 1% than the plan of rows": (by_rows > MORE).sum(),
            "most of that plan's time over a member's": by_rows.max(),
        }.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, [to_row(case, row, f"CPU, {os.cpu_count()} cores", kind="simulated") for row in rows])
    print(", ".join(f"{row.metric}: {row.median:,.4g}" for row in rows))
    print("\n".join(wrong[:20]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
