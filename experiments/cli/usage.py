"""What `flashcp VERB --help` prints: the groups that the verb takes, and its keys as `conf/` explains them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module, resources

from flashcp.experiments.cli.schema import GROUPS, committed
from flashcp.experiments.cli.verbs import VERBS

__all__ = ["groups", "verb_usage"]


HYDRA = """Hydra's own options: -m (several values KEY=a,b, one job each), --cfg job, --info, --config-dir DIR,
--hydra-help; hydra/launcher=NAME, hydra/sweeper=NAME (docs/training.md)"""


def verb_usage(verb: str, arguments: Sequence[str] = ()) -> str:
    """Usage, groups and keys with their defaults."""
    module = import_module(f"flashcp.experiments.{VERBS[verb].module}")
    config = module.keys(arguments) if hasattr(module, "keys") else getattr(module, "CONFIG", "")
    parts = [f"usage: flashcp {verb} {VERBS[verb].arguments} [--json]", VERBS[verb].summary]
    if config:
        if taken := groups(config):
            parts.append("Groups; method= sets sharding= and exchange=, which may follow to replace a part:")
            parts.append("\n".join(_wrapped(f"  {name + '=':<12}", ", ".join(names)) for name, names in taken.items()))
        parts.append(f"Keys and their defaults (conf/{config}.yaml):\n\n{_body(config)}")
        parts += [f"{name} (conf/{file}.yaml):\n\n{body}" for name, file, body in _members(taken)]
    if about := getattr(module, "ABOUT", ""):
        parts.append(_wrapped("", about))
    if config:
        parts.append(HYDRA)
    return "\n\n".join(parts)


def groups(config: str) -> dict[str, tuple[str, ...]]:
    """Every group of a configuration and what it takes."""
    found = {name: names for name, names in GROUPS.items() if f"\n  - {name}: " in _text(config)}
    if config == "train":
        found["experiment"] = (*committed("experiment"), *committed("simulation"))
    return found


def _members(taken: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, str, str]]:
    """The members of groups that bring keys of their own: name, file and keys."""
    for group in ("data", "sharding"):
        for name in taken.get(group, ()):
            body = _body(f"{group}/{name}")
            if "defaults:" not in _text(f"{group}/{name}") and body.count(": ") > 1:
                yield f"Keys of {group}={name}", f"{group}/{name}", body


def _text(file: str) -> str:
    return (resources.files("flashcp.conf") / f"{file}.yaml").read_text("utf-8")


def _body(file: str) -> str:
    """A file's own keys: without its first lines of comment, its defaults list and what it tells Hydra."""
    lines = _text(file).partition("\nhydra:\n")[0].splitlines()
    start = lines.index("", lines.index("defaults:")) if "defaults:" in lines else 0
    return "\n".join(f"  {line}".rstrip() for line in lines[start:] if not line.startswith("# @")).strip("\n")


def _wrapped(head: str, text: str) -> str:
    indent = " " * min(len(head), 14)
    return textwrap.fill(text, 110, initial_indent=head, subsequent_indent=indent)
