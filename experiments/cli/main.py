"""The command `flashcp`: a verb, then Hydra overrides.

Bad input of every kind ends in one line on standard error and exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from flashcp.experiments.cli import AS_JSON, USAGE, VERBS

FLAGS = ("-h --help", "--json", "-m --multirun", "-r --run", "--resolve", "--hydra-help", "--version")
VALUED = ("-p --package", "-cd --config-dir", "-cn --config-name", "-cp --config-path")
HYDRA = """Hydra's own options: -m (several values KEY=a,b, one job each), --cfg job, --info, --config-dir DIR,
--hydra-help; hydra/launcher=NAME, hydra/sweeper=NAME (docs/training.md)"""
MOST_SAID = 2000  # characters of an error: what was given may be longer
INFO = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]


class Stopped(BaseException):
    """A signal asked the command to end; what is under way is stopped on the way out."""


class Options(ArgumentParser):
    """Our options and Hydra's, told from overrides before Hydra, whose own parser would print its usage, sees them."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        for names in FLAGS:
            self.add_argument(*names.split(), action="store_true")
        for names in VALUED:
            self.add_argument(*names.split())
        self.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
        self.add_argument("-i", "--info", nargs="?", choices=INFO)
        self.add_argument("words", nargs="*")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 when something failed on the way; 2 for bad input; 128 + its number after a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _signals_raise():
            return _run(given)
    except ValueError as error:
        said = " ".join(str(error).split())
        print(f"flashcp: error: {said[:MOST_SAID]}{'...' * (len(said) > MOST_SAID)}", file=sys.stderr)
        return 2
    except SystemExit as end:  # of a verb, or of Hydra
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("flashcp: interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(f"flashcp: stopped by {signal.Signals(stopped.args[0]).name}", file=sys.stderr)
        return 128 + int(stopped.args[0])
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP as an exception: by default Python would end without stopping the ranks it started."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    ours = threading.current_thread() is threading.main_thread()  # only there does Python take handlers
    # nohup ignores SIGHUP, and a caller may have handlers of its own: those stay
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(n) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _run(given: list[str]) -> int:
    if {"-sc", "--shell-completion"} & set(given):
        return _complete(given)
    pairs = zip(given, [*given[1:], ""], strict=True)  # --info may have no value: an override is none
    given = ["--info=all" if word in ("-i", "--info") and "=" in after else word for word, after in pairs]
    told, unknown = Options().parse_known_intermixed_args(given)
    if unknown:
        raise ValueError(f"{unknown[0]}: no such option; expected --help, --json or one of Hydra's (--hydra-help)")
    if not told.words:
        print(USAGE.read_text("utf-8"), end="")
        return 0 if told.help else 2
    verb, *words = told.words
    if verb not in VERBS:
        raise ValueError(f"{verb!r}: no such verb; expected one of {', '.join(VERBS)}")
    if told.help:
        print(verb_usage(verb, words))
        return 0
    options = [word for word in given if word != "--json"]
    for word in told.words:
        options.remove(word)
    before = AS_JSON.set(told.json)
    try:
        return int(_module(verb).main([*words, *options]))
    finally:
        AS_JSON.reset(before)


def _module(verb: str) -> ModuleType:
    """The module of a verb. Signals wait until it is there: one amid a native import would abort the process."""
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        return import_module(f"flashcp.experiments.{VERBS[verb]}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)


def _complete(given: list[str]) -> int:
    """`-sc install=SHELL`: what the shell evaluates; `-sc query=SHELL`: words that may end COMP_LINE.

    Hydra completes the line of an application: ours without the verb.
    """
    verb, *rest = os.environ.get("COMP_LINE", "flashcp train ").split(" ")[1:] or [""]
    if not rest:
        print(" ".join(VERBS))
    elif verb in VERBS:
        from flashcp.experiments.cli.compose import run_app

        module = _module(verb)
        if verb == "bench" and len(rest) == 1:
            print(" ".join(module.BENCHES))
        elif config := module.keys(rest) if hasattr(module, "keys") else getattr(module, "CONFIG", ""):
            os.environ["COMP_LINE"] = " ".join(["flashcp", *rest[verb == "bench" :]])
            return run_app(print, config, [word for word in given if word not in VERBS])
    return 0


def verb_usage(verb: str, arguments: Sequence[str] = ()) -> str:
    """Usage, groups and keys with their defaults, those of the groups' members that bring keys of their own too."""
    module = _module(verb)
    config = module.keys(arguments) if hasattr(module, "keys") else getattr(module, "CONFIG", "")
    summary = next(line for line in USAGE.read_text("utf-8").splitlines() if line.startswith(f"  {verb} "))
    words = getattr(module, "WORDS", "[KEY=VALUE ...]")
    parts = [f"usage: flashcp {verb} {words} [--json]", summary.removeprefix(f"  {verb}").strip()]
    if config:
        if taken := groups(config):
            parts.append("Groups; method= sets sharding= and exchange=, which may follow to replace a part:")
            parts.append("\n".join(_wrapped(f"  {name + '=':<12}", ", ".join(names)) for name, names in taken.items()))
        parts.append(f"Keys and their defaults (conf/{config}.yaml):\n\n{_body(config)}")
        members = [f"{group}/{name}" for group in ("data", "sharding") for name in taken.get(group, ())]
        if "model" in taken:
            members.append("model/mha-7b")  # all of them have the same keys
        for member in members:
            if "defaults:" not in _text(member) and _body(member).count(": ") > 1:
                parts.append(f"Keys of {member.replace('/', '=')} (conf/{member}.yaml):\n\n{_body(member)}")
    if (about := Path(str(module.__file__)).with_suffix(".txt")).is_file():
        parts.append(_wrapped("", about.read_text("utf-8")))
    return "\n\n".join([*parts, *([HYDRA] if config else [])])


def groups(config: str) -> dict[str, tuple[str, ...]]:
    """Every group of a configuration and what it takes."""
    from flashcp.experiments.cli.schema import GROUPS, committed  # late: it needs numpy

    found = {name: names for name, names in GROUPS.items() if f"\n  - {name}: " in _text(config)}
    if config == "train":
        found["experiment"] = (*committed("experiment"), *committed("simulation"))
    return found


def _text(file: str) -> str:
    from importlib import resources  # late, as numpy above: `flashcp --help` asks for no file

    return (resources.files("flashcp.conf") / f"{file}.yaml").read_text("utf-8")


def _body(file: str) -> str:
    """A file's own keys: without its first lines of comment, its defaults list and what it tells Hydra."""
    lines = _text(file).partition("\nhydra:\n")[0].splitlines()
    start = lines.index("", lines.index("defaults:")) if "defaults:" in lines else 0
    return "\n".join(f"  {line}".rstrip() for line in lines[start:] if not line.startswith("# @")).strip("\n")


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=head, subsequent_indent=" " * min(len(head), 14))


if __name__ == "__main__":
    sys.exit(main())
