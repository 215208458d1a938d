"""Accelerate deals each rank batches of its own: here all ranks of a context-parallel group get the same ones."""

from __future__ import annotations

import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashcp.context_parallel import ContextParallel


class SameBatches(ParallelismConfig):
    """Accelerate's `parallelism_config` for FlashCP: rank r of all reads the batches of group r // cp.world_size.

    To Accelerate all ranks stay data parallel otherwise: DDP and FSDP average gradients over all of them, and none of
    its own context parallelism is switched on. Groups are of ranks that follow each other.
    Raises ValueError where cp's ranks are not such a group.
    """

    def __init__(self, cp: ContextParallel) -> None:
        super().__init__(1, 1, 1, 1, "torch", 1, "deepspeed")
        self.group_size, self.group_rank = cp.world_size, cp.rank
        self._check()

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """[groups, ranks of a group]; FSDP shards over both."""
        if not dist.is_initialized():
            return None
        shape = (dist.get_world_size() // self.group_size, self.group_size)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp_shard", "cp"))
        mesh._flatten("dp_shard_cp")
        return mesh

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """In place of Accelerate's checks of sizes, which are all 1."""
        self._check()

    def _check(self) -> None:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if ranks % self.group_size or rank % self.group_size != self.group_rank:
            raise ValueError(
                f"rank {rank} of {ranks} is rank {self.group_rank} of a context-parallel group of {self.group_size}: "
                "expected groups of ranks that follow each other"
            )
