"""What `flashcp VERB --help` prints: the keys of the verb's configuration, and the legal values of its groups."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.schema import GROUPS, committed, group_members
from flashcp.experiments.cli.verbs import VERBS

__all__ = ["config_keys", "group_values", "verb_usage"]

EXPLAINED = {
    "world_size": "ranks",
    "context": "tokens of a window over all ranks",
    "windows": "packs that the numbers are means over",
    "seed": "of sampled lengths (plan, simulate), of the weights (train, sweep)",
    "figure": "FILE to draw the first window to: its plan (plan, one method), its timelines (simulate)",
    "overlap": "of our kernel and the best efforts: none, staged, fused; auto is staged",
    "gradient_bytes": "of a number of a KV gradient on our wire: 4 as it is, or 2",
    "cluster_file": "FILE like those of conf/cluster, instead of one of them",
    "kernel": "modelled, or measured: every rank's attention is run on the one device at hand",
    "workers": "processes",
    "methods": "names to simulate, such as [llama3,llama3_best_effort,flashcp]; empty: all",
    "model.layers": "that step_ms counts",
    "model.ffn_dim": "of the MLP; 0: 8/3 of the model's width, rounded up to a multiple of 64",
    "threads": "of each rank",
    "profile": "leave a trace of a few steps in out/trace (train: and a picture of it)",
    "out": "directory to write to; empty: below outputs/",
    "data.path": "file, directory or glob; data=lengths: one length a line",
    "data.overflow": "truncate or carry: a document's tail that does not fit a window",
    "parallel.tuning.forward": "Triton block shape, such as 128x64x8x3; empty: the table's",
    "sweep.name": "of the directory below outputs/ and of the wandb group",
    "sweep.baseline": "method that speedups are over; none: compare levels of overlap",
    "sweep.reference": "also train on one process, and compare the losses",
    "sweep.rerun": "run again what results.csv holds already",
    "checkpoint.resume": "never, latest or the path of a step_* folder",
    "tracker.wandb": "offline, online or disabled",
}
"""What keys say beyond their names; the dataclasses of the sections say the rest."""


def verb_usage(verb: str, arguments: Sequence[str] = ()) -> str:
    """Usage, groups and keys with their defaults."""
    module = import_module(f"flashcp.experiments.{VERBS[verb].module}")
    config = module.keys(arguments) if hasattr(module, "keys") else getattr(module, "CONFIG", "")
    parts = [f"usage: flashcp {verb} {VERBS[verb].arguments} [--json]", VERBS[verb].summary]
    if config:
        groups = [_wrapped(f"  {name + '=':<12}", ", ".join(values)) for name, values in group_values(config).items()]
        said = EXPLAINED if groups else {}
        keys = [f"  {f'{key}={default}':<38} {said.get(key, '')}".rstrip() for key, default in config_keys(config)]
        if groups:
            parts.append("Groups; method= sets sharding= and exchange=, which may follow to replace a part:")
            parts.append("\n".join(groups))
            parts.append("Keys that come with a member of a group:")
            parts.append("\n".join(_wrapped(f"  {members}  ", ", ".join(keys)) for members, keys in member_keys()))
            parts.append("Keys and their defaults:")
        else:
            parts.append("Keys and their defaults:")
        parts.append("\n".join(keys))
    if about := getattr(module, "ABOUT", ""):
        parts.append(_wrapped("", about))
    return "\n\n".join(parts)


def group_values(config: str) -> dict[str, tuple[str, ...]]:
    """Every group of a configuration and what it takes."""
    if config.startswith("bench_"):
        return {}
    keys = _composed(config)
    groups = {name: values for name, values in GROUPS.items() if name in keys}
    if config == "config":
        groups["experiment"] = (*committed("experiment"), *committed("simulation"))
    return groups


def member_keys() -> list[tuple[str, list[str]]]:
    """Members of groups that share their keys, as `data=wlb_llm|pile`, and those keys."""
    found: dict[tuple[str, ...], list[str]] = {}
    for group, members in group_members().items():
        for name, node in members.items():
            if keys := tuple(f"{group}.{key}" for key in vars(node) if key not in ("name", "source")):
                found[keys] = [*found.get(keys, []), name if keys in found else f"{group}={name}"]
    return [("|".join(names), list(keys)) for keys, names in found.items()]


def config_keys(config: str) -> list[tuple[str, str]]:
    """Every key of a configuration with its default; what groups set is left out."""
    set_by_groups = (*GROUPS, "sharding.name", "exchange.name", "data.source")
    leaves = _leaves(_composed(config))
    return [(key, value) for key, value in leaves if key not in set_by_groups and ".provenance." not in key]


def _composed(config: str) -> dict[str, Any]:
    if config == "config":
        from flashcp.experiments.cli.settings import register_run

        register_run()
    return compose(config, [])


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(head: str, text: str) -> str:
    indent = " " * min(len(head), 14)
    return textwrap.fill(text, 110, initial_indent=head, subsequent_indent=indent)
