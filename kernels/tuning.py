"""Block shapes of the attention kernels per chip, head_dim, dtype and pass: a table, never timed at start-up.

A training job that timed kernels when it starts would run different ones on different ranks. The entries were chosen
by what the compiler makes of them (no spilled registers, tensor cores, asynchronous copies, shared memory within the
chip's): `experiments/bench/tune_attention.py` compiles the candidates anywhere and times them where there is a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from flashcp.kernels.schedule import Schedule, Seen
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.values import check_choice, read_flag, shown

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
LATENT_DIM = 576
"""Of an MLA model's latents. Compiled for NVIDIA GPUs in bf16 and fp16, never run on one."""
DTYPES = ("bfloat16", "float16", "float32")
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Shared memory that one block may take, per architecture."""
SHORT_SPEED = 0.8
"""Speed assumed of the tiles for short documents, next to the large ones on a long document (not measured)."""
SHARING_GAIN = 0.9
"""Heads share a tile where that leaves less than this share of the pairs to compute (a choice, not measured)."""
HOPPER_GAIN = 1.3
"""Speed of the forward on Hopper next to the portable kernel's large tiles, at the least (1.28 to 1.51 on an H100): so
much more must small tiles, or heads that share one, leave out to be chosen."""


ANY_ORDER = "deterministic=false"
_TEXT = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?:x(\w+))?")


class Pass(Enum):
    """The three kernels that are tuned."""

    FORWARD = "forward"
    BACKWARD_KV = "backward_kv"
    BACKWARD_Q = "backward_q"


@dataclass(frozen=True)
class Blocks:
    """How a kernel is compiled: query rows and key rows of a block, warps, pipeline stages, precision of fp32 products.

    precision: `ieee`, or `tf32x3` (three tensor-core products, NVIDIA only); without meaning for 16-bit inputs.
    Raises ValueError for numbers the kernels cannot be built with.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    precision: str = "ieee"

    def __post_init__(self) -> None:
        for name, legal in (("block_m", (16, 32, 64, 128, 256)), ("block_n", (16, 32, 64, 128, 256)),
                            ("warps", (1, 2, 4, 8, 16)), ("stages", (1, 2, 3, 4, 5)),
                            ("precision", ("ieee", "tf32x3"))):  # fmt: skip
            check_choice(name, getattr(self, name), legal)

    def tile_rows(self, which: Pass) -> int:
        """Rows of a tile of that pass: keys for dK and dV, queries otherwise."""
        return self.block_n if which is Pass.BACKWARD_KV else self.block_m

    def to_text(self) -> str:
        """`128x64x8x3xieee`."""
        return f"{self.block_m}x{self.block_n}x{self.warps}x{self.stages}x{self.precision}"

    @classmethod
    def from_text(cls, text: str) -> Blocks:
        """The blocks `to_text` wrote; the precision may be left out. Raises ValueError for anything else."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            shape = "QUERY_ROWSxKEY_ROWSxWARPSxSTAGES[xPRECISION], such as 128x64x8x3"
            raise ValueError(f"{shown(text)}: expected {shape}")
        block_m, block_n, warps, stages = map(int, match.groups()[:4])
        return cls(block_m, block_n, warps, stages, match[5] or "ieee")


@dataclass(frozen=True)
class Tuning:
    """Blocks that replace the table's, pass by pass; None leaves the table's.

    deterministic: whether two backward runs agree bit for bit. Where they need not, Hopper computes the backward in
    one kernel that adds to dQ in any order (`kernels/hopper_backward.py`), unless blocks for it are asked for.
    Raises ValueError for anything else.
    """

    forward: Blocks | None = None
    backward_kv: Blocks | None = None
    backward_q: Blocks | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        for which in Pass:
            if not isinstance(blocks := self.of(which), Blocks | None):
                raise ValueError(f"{which.value}={shown(blocks)}: expected flashcp.kernels.tuning.Blocks, or None")
        read_flag("deterministic", self.deterministic)

    def of(self, which: Pass) -> Blocks | None:
        """What replaces the table's entry for a pass."""
        return getattr(self, which.value)

    def to_text(self) -> str:
        """`forward=128x64x8x3xieee,...`: what operators carry."""
        chosen = ((which.value, self.of(which)) for which in Pass)
        parts = [f"{name}={blocks.to_text()}" for name, blocks in chosen if blocks is not None]
        return ",".join(parts if self.deterministic else [*parts, ANY_ORDER])

    @classmethod
    def from_text(cls, text: str) -> Tuning:
        """The tuning `to_text` wrote. Raises ValueError for anything else."""
        if not isinstance(text, str):
            raise ValueError(f"tuning {shown(text)}: expected text")
        chosen = {}
        for part in filter(None, text.split(",")):
            if part == ANY_ORDER:
                continue
            name, _, blocks = part.partition("=")
            if name not in {which.value for which in Pass}:
                raise ValueError(f"tuning {shown(part)}: expected one of {', '.join(f'{w.value}=' for w in Pass)}")
            chosen[name] = Blocks.from_text(blocks)
        return cls(**chosen, deterministic=ANY_ORDER not in text.split(","))


def check_tuning(tuning: object) -> None:
    """Raises ValueError for what is neither a Tuning nor None."""
    if not isinstance(tuning, Tuning | None):
        raise ValueError(f"tuning is a {type(tuning).__name__}: expected a flashcp.kernels.tuning.Tuning, or None")


_F, _KV, _Q = Pass.FORWARD, Pass.BACKWARD_KV, Pass.BACKWARD_Q
_SMALL = (16, 32, 64)
_MIDDLE = (80, 96, 128)
_ROWS: tuple[tuple[str, int, tuple[int, ...], Pass, Blocks, Blocks | None], ...] = (
    # architecture, bytes an element, head_dims, pass, blocks for long documents, for short ones (None: the same)
    ("sm_80", 2, _SMALL, _F, Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    ("sm_80", 2, _SMALL, _KV, Blocks(64, 64, 8, 2), None),
    ("sm_80", 2, _SMALL, _Q, Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 2)),
    ("sm_80", 2, (80, 128), _F, Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 2)),
    ("sm_80", 2, (96,), _F, Blocks(128, 32, 8, 3), Blocks(64, 64, 8, 2)),
    ("sm_80", 2, (80,), _KV, Blocks(32, 64, 8, 2), None),
    ("sm_80", 2, (96,), _KV, Blocks(32, 64, 8, 3), None),
    ("sm_80", 2, (128,), _KV, Blocks(64, 64, 8, 2), None),
    ("sm_80", 2, (80,), _Q, Blocks(128, 32, 8, 3), Blocks(64, 32, 8, 2)),
    ("sm_80", 2, (96, 128), _Q, Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 2)),
    ("sm_80", 2, (256,), _F, Blocks(64, 32, 8, 2), None),
    ("sm_80", 2, (256,), _KV, Blocks(32, 32, 8, 1), None),
    ("sm_80", 2, (256,), _Q, Blocks(64, 32, 8, 1), None),
    ("sm_90", 2, (*_SMALL, 80, 128), _F, Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3)),
    ("sm_90", 2, (96,), _F, Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    ("sm_90", 2, (*_SMALL, *_MIDDLE), _KV, Blocks(64, 128, 8, 2), Blocks(64, 64, 8, 3)),
    ("sm_90", 2, (*_SMALL, *_MIDDLE), _Q, Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3)),
    ("sm_90", 2, (256,), _F, Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    ("sm_90", 2, (256,), _KV, Blocks(16, 64, 8, 2), None),
    ("sm_90", 2, (256,), _Q, Blocks(64, 32, 8, 2), None),
    ("sm_100", 2, (16,), _F, Blocks(128, 128, 8, 2), Blocks(64, 32, 4, 3)),
    ("sm_100", 2, (32, 64), _F, Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3)),
    ("sm_100", 2, _MIDDLE, _F, Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    ("sm_100", 2, (*_SMALL, *_MIDDLE), _KV, Blocks(64, 64, 8, 2), None),
    ("sm_100", 2, (*_SMALL, *_MIDDLE), _Q, Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3)),
    ("sm_100", 2, (256,), _F, Blocks(64, 32, 8, 2), None),
    ("sm_100", 2, (256,), _KV, Blocks(32, 32, 8, 2), None),
    ("sm_100", 2, (256,), _Q, Blocks(32, 32, 8, 2), None),
    ("gfx942", 2, (*_SMALL, *_MIDDLE), _F, Blocks(128, 64, 8, 1), Blocks(64, 64, 4, 1)),
    ("gfx942", 2, (*_SMALL, *_MIDDLE), _KV, Blocks(32, 64, 4, 1), None),
    ("gfx942", 2, (*_SMALL, *_MIDDLE), _Q, Blocks(64, 32, 4, 1), None),
    ("gfx942", 2, (256,), _F, Blocks(64, 32, 4, 1), None),
    ("gfx942", 2, (256,), _KV, Blocks(16, 32, 4, 1), None),
    ("gfx942", 2, (256,), _Q, Blocks(32, 32, 4, 1), None),
    *(
        (arch, 2, (LATENT_DIM,), which, blocks, None)
        for arch in ("sm_80", "sm_90", "sm_100")
        for which, blocks in ((_F, Blocks(32, 16, 8, 1)), (_KV, Blocks(32, 16, 8, 1)), (_Q, Blocks(16, 16, 8, 1)))
    ),
    *(
        row
        for arch, fast in (("sm_80", "tf32x3"), ("sm_90", "tf32x3"), ("sm_100", "tf32x3"), ("gfx942", "ieee"))
        for row in (
            (arch, 4, _SMALL, _F, Blocks(64, 32, 8, 2, fast), None),
            (arch, 4, _SMALL, _KV, Blocks(32, 32, 8, 1, fast), None),
            (arch, 4, _SMALL, _Q, Blocks(32, 32, 8, 1, fast), None),
            (arch, 4, _MIDDLE, _F, Blocks(32, 32, 8, 1), None),
            (arch, 4, _MIDDLE, _KV, Blocks(32, 32, 8, 1, fast), None),
            (arch, 4, _MIDDLE, _Q, Blocks(32, 32, 8, 1), None),
            (arch, 4, (256,), _F, Blocks(16, 32, 8, 1), None),
            (arch, 4, (256,), _KV, Blocks(16, 32, 8, 1), None),
            (arch, 4, (256,), _Q, Blocks(16, 16, 8, 1), None),
        )
    ),
)
TABLE: dict[tuple[str, int, int, Pass], tuple[Blocks, Blocks]] = {
    (arch, dim, size, which): (long, short or long) for arch, size, dims, which, long, short in _ROWS for dim in dims
}
"""(architecture, one of HEAD_DIMS or LATENT_DIM, bytes an element, pass) -> blocks for long and for short documents."""


def architecture(device: torch.device) -> str:
    """Key of the table for a device: its own architecture, or the nearest older one; `cpu` under the interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def table_dim(head_dim: int) -> int:
    """The head_dim of the table whose blocks serve this one: the next larger. Raises ValueError beyond the largest."""
    for dim in (*HEAD_DIMS, LATENT_DIM):
        if head_dim <= dim:
            return dim
    raise ValueError(f"head_dim={head_dim}: expected at most {LATENT_DIM} with attention='triton' on a GPU")


def choose(
    which: Pass,
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    schedule: Schedule,
    group: int = 1,
    gain: float = 1.0,
) -> Blocks:
    """The table's blocks for a pass, for long or for short documents: whichever computes less for its speed.

    group: query heads a KV head. gain: speed of another kernel on the large tiles, next to the portable one's.
    Raises ValueError for a head_dim beyond the table.
    """
    if arch == "cpu":
        return Blocks(32, 32, 4, 1)
    if (arch, table_dim(head_dim), dtype.itemsize, which) not in TABLE:
        raise ValueError(
            f"head_dim={head_dim} of {dtype} on {arch}: expected at most {HEAD_DIMS[-1]} with attention='triton', or "
            "bf16 or fp16 on an NVIDIA GPU"
        )
    long, short = TABLE[arch, table_dim(head_dim), dtype.itemsize, which]
    large = computed_pairs(which, schedule, long, tile_heads(which, long, schedule, group, gain))
    small = computed_pairs(which, schedule, short, tile_heads(which, short, schedule, group))
    return short if small < SHORT_SPEED / gain * large else long


def tile_heads(which: Pass, blocks: Blocks, schedule: Schedule, group: int, gain: float = 1.0) -> int:
    """How many of the `group` query heads of a KV head share a query tile, which then holds fewer rows of each.

    Several where documents are short: a tile of fewer rows computes fewer pairs that the mask throws away (known as
    PackGQA). As many as divide the group and leave 16 rows; one unless they save a tenth of the pairs. gain: as for
    `choose`, of a kernel that has one head a tile.
    """
    if which is Pass.BACKWARD_KV:
        return 1
    most = min(group & -group, blocks.block_m // 16)
    alone, together = (computed_pairs(which, schedule, blocks, heads) for heads in (1, most))
    return most if together < SHARING_GAIN / gain * alone else 1


def computed_pairs(which: Pass, schedule: Schedule, blocks: Blocks, heads: int = 1) -> int:
    """Query-key pairs a head that the tiles of a pass compute, about, the masked ones included. heads: of a tile."""
    tile_rows = blocks.tile_rows(which) // heads
    step = blocks.block_m if which is Pass.BACKWARD_KV else blocks.block_n  # rows of a block of the other side
    if schedule.seen is not None:
        return _seen_pairs(schedule, schedule.seen, tile_rows, step)
    length = schedule.query_stop - schedule.query_start
    keys = schedule.row_stop - schedule.row_start
    to_read = schedule.range_totals(keys * ~schedule.masked)
    own = schedule.range_totals(schedule.masked) > 0
    shared = own & (to_read == 0) & (length <= tile_rows // 2)
    # The tiles of a shard read 1, 2, 3, ... tiles of its own rows, in whole blocks.
    tiles, tiles_a_block = -(-length // tile_rows), max(step // tile_rows, 1)
    whole, rest = np.divmod(tiles, tiles_a_block)
    own_keys = max(step, tile_rows) * (tiles_a_block * whole * (whole + 1) // 2 + rest * (whole + 1))
    alone = tile_rows * (tiles * to_read + own * own_keys)
    return int((length * max(step, tile_rows))[shared].sum() + alone[~shared].sum())


def _seen_pairs(schedule: Schedule, seen: Seen, tile_rows: int, step: int) -> int:
    """The same under masks: as if all keys were there that rows see, and queries whichever side tiles are of."""
    start, length = schedule.query_position, schedule.query_stop - schedule.query_start
    count = -(-length // tile_rows)
    shard = np.repeat(np.arange(len(count)), count)
    first = start[shard] + tile_rows * expand_ranges(np.zeros_like(count), count)
    last = np.minimum(first + tile_rows, (start + length)[shard]) - 1
    document = seen.document[shard]
    keys = seen.masks.past(document, last) - seen.masks.lowest(document, first)
    alone = np.bincount(shard, tile_rows * step * -(-keys // step), len(count))
    own = schedule.range_totals(~schedule.received & (schedule.row_start == schedule.query_start[schedule.query]))
    shared = (own == 1) & (np.diff(schedule.range_first) == 1) & (length <= tile_rows // 2)
    return int((length * max(step, tile_rows))[shared].sum() + alone[~shared].sum())
