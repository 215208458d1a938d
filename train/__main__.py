"""`python -m flashcp.train CONFIG.json`: one rank, alone or under `python -m torch.distributed.run`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import TCPStore

from flashcp.train.config import TrainConfig
from flashcp.train.ranks import launched_rank
from flashcp.train.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input (one line, no traceback); 1 when a rank fails (its number in the line)."""
    parser = argparse.ArgumentParser(prog="python -m flashcp.train", description=__doc__)
    parser.add_argument("config", help="JSON file with the fields of flashcp.train.config.TrainConfig")
    path = parser.parse_args(arguments).config
    try:
        run(TrainConfig.from_file(path))
    except ValueError as error:
        if _first_to_report():
            _say(str(error))
        return 2
    except Exception as error:
        rank, world_size = launched_rank()
        if _first_to_report():
            traceback.print_exc()
        _say(f"rank {rank} of {world_size}: {type(error).__name__}: {error}")
        return 1
    return 0


def _say(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _first_to_report() -> bool:
    """Whether no other rank has reported yet: all ranks meet the same bad input, and one line should say so.

    The launcher's store counts, because the launcher stops all ranks when the first one ends: rank 0 may
    never come to speak.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    port = int(os.environ["MASTER_PORT"])
    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=5))
    return store.add("flashcp/reports", 1) == 1


if __name__ == "__main__":
    sys.exit(main())
