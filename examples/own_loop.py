"""A loop of one's own: FSDP2, one compiled graph a block for all plans, made-up documents.

torchrun --nproc-per-node=2 examples/own_loop.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import flashcp

VOCABULARY, DIM, HEADS, WINDOW = 64, 64, 4, 2048


class Block(nn.Module):
    def __init__(self, cp: flashcp.ContextParallel) -> None:
        super().__init__()
        self.cp, self.norm, self.qkv, self.out = cp, nn.RMSNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, plan: flashcp.ShardingPlan) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3 * HEADS, -1)).chunk(3, dim=1)
        x = x + self.out(self.cp.attention(q, k, v, plan).flatten(1))
        return x + self.mlp(x)


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)  # the same weights and documents on every rank
    with flashcp.ContextParallel() as cp:
        embed, place, head = nn.Embedding(VOCABULARY, DIM), nn.Embedding(WINDOW, DIM), nn.Linear(DIM, VOCABULARY)
        blocks = [Block(cp), Block(cp)]
        for block in blocks:
            block.compile(fullgraph=True)
        model = nn.ModuleList(map(fully_shard, (embed, place, *blocks, head)))
        cp.prepare(model)  # gradients are summed over ranks, for a rank's loss is its own rows' part
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(30):
            lengths = flashcp.lengths_of(cu_seqlens=torch.tensor([0, 7 * step + 300, 1500, 1600, WINDOW]))
            starts = torch.randint(VOCABULARY, (len(lengths),)).repeat_interleave(torch.from_numpy(lengths))
            whole = (starts + 3 * torch.cat([torch.arange(n) for n in lengths.tolist()])) % VOCABULARY
            labels, plan = flashcp.shift_labels(whole, lengths), flashcp.plan(lengths, cp.world_size)
            x = embed(cp.shard(whole, plan)) + place(cp.position_ids(plan))
            for block in blocks:
                x = block(x, plan)
            loss = cross_entropy(head(x), cp.shard(labels, plan), reduction="sum") / labels.ne(-100).sum()
            loss.backward()
            cp.synchronize()  # raises on all ranks where rows did not come
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss := loss.detach())
            print(f"loss: {loss:.3f}\n" if cp.rank == 0 and step % 6 == 5 else "", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
