"""Hugging Face Transformers, Trainer, TRL and Accelerate on FlashCP (docs/transformers.md).

Written for Transformers 5.24, Accelerate 1.15 and TRL 1.16.
"""

from __future__ import annotations

from flashcp.integrations.transformers.accelerate import SameBatches
from flashcp.integrations.transformers.attended import check_attention
from flashcp.integrations.transformers.collator import Collator
from flashcp.integrations.transformers.images import take_own_features
from flashcp.integrations.transformers.install import install
from flashcp.integrations.transformers.layers import layers_of
from flashcp.integrations.transformers.trainer import parallelize

__all__ = ["Collator", "SameBatches", "check_attention", "install", "layers_of", "parallelize", "take_own_features"]
