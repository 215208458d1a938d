"""torchtitan's Trainer on FlashCP: packing and context parallelism together (docs/torchtitan.md).

Written for torchtitan 0.3.0.
"""

from __future__ import annotations

from flashcp.integrations.torchtitan.machine import make_it_run

make_it_run()  # before torchtitan's modules read what there is

from flashcp.integrations.torchtitan.attention import FlashCPAttention, Planned  # noqa: E402
from flashcp.integrations.torchtitan.config import with_flashcp  # noqa: E402
from flashcp.integrations.torchtitan.sharing import Sharing  # noqa: E402
from flashcp.integrations.torchtitan.trainer import FlashCPConfig, Trainer, Validator  # noqa: E402

__all__ = ["FlashCPAttention", "FlashCPConfig", "Planned", "Sharing", "Trainer", "Validator", "with_flashcp"]
