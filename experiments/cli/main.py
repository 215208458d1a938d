"""The command `flashcp`: a verb, then Hydra overrides.

Bad input of every kind ends in one line on standard error and exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from flashcp.experiments.cli.verbs import VERBS

__all__ = ["main"]


class Stopped(BaseException):
    """A signal asked the command to end; what is under way is stopped on the way out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 when something failed on the way; 2 for bad input; 128 + its number after a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _signals_raise():
            return _run(given)
    except ValueError as error:
        print(f"flashcp: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
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
    asks_help = bool({"-h", "--help"} & set(given))
    options, words = [word for word in given if word.startswith("-")], [word for word in given if word[:1] != "-"]
    for option in options:
        if option not in ("-h", "--help", "--json"):
            raise ValueError(f"{option}: no such option; expected --help, --json or overrides KEY=VALUE")
    if not words:
        print(usage())
        return 0 if asks_help else 2
    if words[0] not in VERBS:
        raise ValueError(f"{words[0]!r}: no such verb; expected one of {', '.join(VERBS)}")
    if asks_help:
        from flashcp.experiments.cli.usage import verb_usage

        print(verb_usage(words[0], words[1:]))
        return 0
    module = import_module(f"flashcp.experiments.{VERBS[words[0]].module}")
    return int(module.main(words[1:], as_json="--json" in options))


def usage() -> str:
    """What `flashcp --help` prints."""
    verbs = "\n".join(f"  {name:<8} {verb.summary}" for name, verb in VERBS.items())
    return f"""usage: flashcp VERB [KEY=VALUE ...] [--json]

{verbs}

flashcp VERB --help lists the keys of a verb and their legal values.
--json: one JSON document on standard output, everything else on standard error.

  flashcp plan world_size=8 data=pile
  flashcp plan method=flashcp data=lengths 'data.lengths=[70000,40000,21072]' figure=plan.png
  flashcp simulate cluster=h100-nvlink data=lengths data.path=lengths.txt world_size=8
  flashcp train method=llama3 world_size=2 loop.steps=50
  flashcp sweep experiment=demo"""


if __name__ == "__main__":
    sys.exit(main())
