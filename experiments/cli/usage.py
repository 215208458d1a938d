"""What `flashcp VERB --help` prints: the groups that the verb takes, and its keys as `conf/` explains them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib import import_module, resources

from flashcp.experiments.cli import USAGE, VERBS
from flashcp.experiments.cli.schema import GROUPS, committed

HYDRA = """Hydra's own options: -m (several values KEY=a,b, one job each), --cfg job, --info, --config-dir DIR,
--hydra-help; hydra/launcher=NAME, hydra/sweeper=NAME (docs/training.md)"""


def verb_usage(verb: str, arguments: Sequence[str] = ()) -> str:
    """Usage, groups and keys with their defaults, those of the groups' members that bring keys of their own too."""
    module = import_module(f"flashcp.experiments.{VERBS[verb]}")
    config = module.keys(arguments) if hasattr(module, "keys") else getattr(module, "CONFIG", "")
    summary = next(line for line in USAGE.read_text("utf-8").splitlines() if line.startswith(f"  {verb} "))
    words = getattr(module, "WORDS", "[KEY=VALUE ...]")
    parts = [f"usage: flashcp {verb} {words} [--json]", summary.removeprefix(f"  {verb}").strip()]
    if config:
        if taken := groups(config):
            parts.append("Groups; method= sets sharding= and exchange=, which may follow to replace a part:")
            parts.append("\n".join(_wrapped(f"  {name + '=':<12}", ", ".join(names)) for name, names in taken.items()))
        parts.append(f"Keys and their defaults (conf/{config}.yaml):\n\n{_body(config)}")
        for member in (f"{group}/{name}" for group in ("data", "sharding") for name in taken.get(group, ())):
            if "defaults:" not in _text(member) and _body(member).count(": ") > 1:
                parts.append(f"Keys of {member.replace('/', '=')} (conf/{member}.yaml):\n\n{_body(member)}")
    if about := getattr(module, "ABOUT", ""):
        parts.append(_wrapped("", about))
    return "\n\n".join([*parts, *([HYDRA] if config else [])])


def groups(config: str) -> dict[str, tuple[str, ...]]:
    """Every group of a configuration and what it takes."""
    found = {name: names for name, names in GROUPS.items() if f"\n  - {name}: " in _text(config)}
    if config == "train":
        found["experiment"] = (*committed("experiment"), *committed("simulation"))
    return found


def _text(file: str) -> str:
    return (resources.files("flashcp.conf") / f"{file}.yaml").read_text("utf-8")


def _body(file: str) -> str:
    """A file's own keys: without its first lines of comment, its defaults list and what it tells Hydra."""
    lines = _text(file).partition("\nhydra:\n")[0].splitlines()
    start = lines.index("", lines.index("defaults:")) if "defaults:" in lines else 0
    return "\n".join(f"  {line}".rstrip() for line in lines[start:] if not line.startswith("# @")).strip("\n")


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=head, subsequent_indent=" " * min(len(head), 14))
