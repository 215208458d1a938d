"""`python -m flashcp.train CONFIG.json ...`: one rank, alone or under `python -m torch.distributed.run`.

Several configurations take turns, step by step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flashcp.train.config import TrainConfig
from flashcp.train.ranks import exit_code
from flashcp.train.run import run_in_turns


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input (one line, no traceback); 1 when a rank fails (its number in the line)."""
    parser = argparse.ArgumentParser(prog="python -m flashcp.train", description=__doc__)
    parser.add_argument(
        "config", nargs="+", help="JSON file with the fields of flashcp.train.config.TrainConfig; several take turns"
    )
    paths = parser.parse_args(arguments).config
    return exit_code(lambda: run_in_turns([TrainConfig.from_file(path) for path in paths]))


if __name__ == "__main__":
    sys.exit(main())
