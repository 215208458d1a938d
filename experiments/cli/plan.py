"""`flashcp plan`: what each method makes of the same packs, without training anything."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

import flashcp
from flashcp.experiments.cli import show
from flashcp.experiments.cli.compose import Job, run
from flashcp.experiments.cli.packs import described, heading, planned_packs, read_model
from flashcp.experiments.cli.schema import GROUPS
from flashcp.files import read_path
from flashcp.options import naming_options
from flashcp.sharding.methods import METHODS, Method
from flashcp.text import table

CONFIG = "plan"
HEAD = ["method", "sharding", "exchange", "imbalance", "max", "critical rows", "saving", "ms"]
LINE = "{name} {sharding} {exchange} {imbalance:.3f} {imbalance_max:.3f} {critical_rows:.0f} {saving:.3f} {ms:.2f}"


def show_plans(job: Job) -> None:
    """Print the table, or one JSON document."""
    settings = job.settings
    count, head_ranks = settings["batch_windows"], settings["head_ranks"]
    if settings["world_size"] % head_ranks:
        raise ValueError(f"head_ranks={head_ranks}: expected a divisor of world_size={settings['world_size']}")
    holders = settings["world_size"] // head_ranks
    options = strategy_options(settings)
    methods = chosen_methods(settings)
    windows = planned_packs(settings)
    batches = [np.concatenate(windows[i : i + count]) for i in range(0, len(windows) - count + 1, count)]
    if not batches:
        raise ValueError(f"batch_windows={count}: expected at most the {len(windows)} windows of windows= and the data")
    mix = read_mix(settings)
    with naming_options(options):
        first = flashcp.plan(batches[0], holders, methods[0].sharding, **mix, **options)
    planned = [measure(method, batches, holders, head_ranks, {**mix, **options}) for method in methods]
    if settings["figure"]:
        from flashcp.experiments.cli.picture import draw_methods, draw_plan

        file = read_path(settings["figure"], "figure")
        ends = np.cumsum([window.sum() for window in windows[: count - 1]]).tolist()
        if len(methods) == 1:
            file = draw_plan(first, methods[0].exchange, file, head_ranks, ends)
        else:
            each = {m.name: (flashcp.plan(batches[0], holders, m.sharding, **mix), m.exchange) for m in methods}
            file = draw_methods(each, file, head_ranks, ends)
        print(f"wrote {file}", file=sys.stderr)
    used = windows[: count * len(batches)]
    document = {
        **described(settings, used),
        "batch_windows": count,
        "head_ranks": head_ranks,
        "holders": holders,
        "methods": planned,
    }
    head = heading(settings, used) + (f", {holders} holders of {head_ranks}" if head_ranks > 1 else "")
    if settings["model"] is not None:
        document["model"] = settings["model"]
        head += f"; {read_model(settings)}: rows are means over its layers"
    text = f"{head}\n{table(HEAD, [LINE.format(**one).split() for one in planned], text=3)}"
    if len(methods) == 1:
        document["plan"] = json.loads(first.to_json())
        text += f"\n\nfirst {'window' if count == 1 else 'batch'}\n{first}\n\n{first.certificate}"
    show(document, text)


def measure(
    method: Method, packs: Sequence[np.ndarray], holders: int, head_ranks: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Plan every pack: means, but for `imbalance_max`; ms: median time of one plan. options: of `flashcp.plan`.

    Rows are those of a rank, all-to-alls inside its holder counted, where head ranks divide the KV heads; of a mix,
    means over the layers.
    """
    found = []
    for lengths in packs:
        started = time.perf_counter()
        plan = flashcp.plan(lengths, holders, method.sharding, **options)
        ms = 1e3 * (time.perf_counter() - started)
        found.append((*plan.over_layers(method.exchange, head_ranks), ms))
    imbalance, critical, saving, times = np.array(found).T.tolist()
    return {
        **method._asdict(),
        "imbalance": float(np.mean(imbalance)),
        "imbalance_max": max(imbalance),
        "critical_rows": float(np.mean(critical)),
        "saving": float(np.mean(saving)),
        "ms": float(np.median(times)),
    }


def read_mix(settings: Mapping[str, Any]) -> dict[str, Any]:
    """masks and layers of the chosen model, as `flashcp.plan` takes them. Raises ValueError as ModelShape does."""
    if settings["model"] is None:
        return {}
    try:
        mask, layers = read_model(settings).mix()
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    return {"masks": mask, "layers": layers}


def chosen_methods(settings: Mapping[str, Any]) -> list[Method]:
    """The one that was named, or all; a pair that nobody published is named after its parts."""
    sharding, exchange = (_name(settings, group) for group in ("sharding", "exchange"))
    if not sharding and not exchange:
        return list(METHODS.values())
    pair = (sharding or "flashcp", exchange or "exact")
    alike = {method.name: method for method in METHODS.values() if method[1:] == pair}
    return [alike.get(settings["method"]) or next(iter(alike.values()), Method("+".join(pair), *pair))]


def _name(settings: Mapping[str, Any], group: str) -> str:
    name = (settings[group] or {}).get("name", "")
    if name and name not in GROUPS[group]:
        raise ValueError(f"{group}.name={name!r}: expected one of {', '.join(GROUPS[group])}")
    return str(name)


def strategy_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword options of the strategy that was chosen."""
    return {key: value for key, value in (settings["sharding"] or {}).items() if key != "name"}


main = partial(run, show_plans, CONFIG)
