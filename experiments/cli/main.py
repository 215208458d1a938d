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

from flashcp.experiments.cli.verbs import AS_JSON, VERBS

__all__ = ["main"]

OPTIONS = ("-h", "--help", "--json")
HYDRA_OPTIONS = {"-m", "--multirun", "-r", "--run", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info"}
HYDRA_OPTIONS |= {"-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path", "--hydra-help", "--version"}


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
    except SystemExit as end:  # of a verb, or of Hydra's parser of options
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
    asks_help, verb = bool({"-h", "--help"} & set(given)), next((word for word in given if word[:1] != "-"), "")
    for option in given:
        if option.startswith("-") and option.partition("=")[0] not in (*OPTIONS, *HYDRA_OPTIONS):
            raise ValueError(f"{option}: no such option; expected --help, --json or one of Hydra's (--hydra-help)")
    if not verb:
        print(usage())
        return 0 if asks_help else 2
    if verb not in VERBS:
        raise ValueError(f"{verb!r}: no such verb; expected one of {', '.join(VERBS)}")
    given.remove(verb)
    if asks_help:
        from flashcp.experiments.cli.usage import verb_usage

        print(verb_usage(verb, [word for word in given if word[:1] != "-"]))
        return 0
    module = import_module(f"flashcp.experiments.{VERBS[verb].module}")
    told = AS_JSON.set("--json" in given)
    try:
        return int(module.main([word for word in given if word not in OPTIONS]))
    finally:
        AS_JSON.reset(told)


def _complete(given: list[str]) -> int:
    """`-sc install=SHELL`: what the shell evaluates; `-sc query=SHELL`: words that may end COMP_LINE.

    Hydra completes the line of an application: ours without the verb.
    """
    verb, *rest = os.environ.get("COMP_LINE", "flashcp train ").split(" ")[1:] or [""]
    words = [word for word in given if word not in VERBS]
    if not rest:
        print(" ".join(VERBS))
    elif verb in VERBS:
        from flashcp.experiments.cli.compose import run_app

        module = import_module(f"flashcp.experiments.{VERBS[verb].module}")
        if verb == "bench" and len(rest) == 1:
            print(" ".join(module.BENCHES))
        elif config := module.keys(rest) if hasattr(module, "keys") else getattr(module, "CONFIG", ""):
            os.environ["COMP_LINE"] = " ".join(["flashcp", *rest[verb == "bench" :]])
            return run_app(print, config, words)
    return 0


def usage() -> str:
    """What `flashcp --help` prints."""
    verbs = "\n".join(f"  {name:<8} {verb.summary}" for name, verb in VERBS.items())
    return f"""usage: flashcp VERB [KEY=VALUE ...] [--json] [-m]

{verbs}

flashcp VERB --help lists the keys of a verb and their legal values.
--json: one JSON document on standard output, everything else on standard error.
-m: several values KEY=a,b, one job each. Verbs are Hydra applications: --cfg job, --info, --config-dir, --hydra-help.
Completion: eval "$(flashcp -sc install=bash)"

  flashcp plan world_size=8 data=pile
  flashcp plan method=flashcp data=lengths 'data.lengths=[70000,40000,21072]' figure=plan.png
  flashcp simulate cluster=h100-nvlink data=lengths data.path=lengths.txt world_size=8
  flashcp train method=llama3 world_size=2 loop.steps=50
  flashcp sweep experiment=demo"""


if __name__ == "__main__":
    sys.exit(main())
