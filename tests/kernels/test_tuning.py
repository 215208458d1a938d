"""Block shapes: what is legal, how they travel, and when short documents get small tiles."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.tiles import query_tiles
from flashcp.kernels.tuning import (
    TABLE,
    Blocks,
    Pass,
    Tuning,
    architecture,
    choose,
    computed_pairs,
    table_dim,
    tile_heads,
)


def test_text_comes_back_as_the_tuning() -> None:
    tuning = Tuning(forward=Blocks(128, 64, 8, 3), backward_q=Blocks(16, 32, 4, 1, "tf32x3"))
    assert Tuning.from_text(tuning.to_text()) == tuning
    assert Tuning.from_text("") == Tuning()


def test_precision_may_be_left_out() -> None:
    assert Blocks.from_text("128x64x8x3") == Blocks.from_text("128x64x8x3xieee") == Blocks(128, 64, 8, 3)
    assert Tuning.from_text("backward_kv=64x32x4x2") == Tuning(backward_kv=Blocks(64, 32, 4, 2))


@pytest.mark.parametrize("text", ["", "1x2", "axbxcxd", "128x64x8x3x", "128x64x8x3;", " 128x64x8x3"])
def test_text_that_is_no_block_shape_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text!r}: expected QUERY_ROWSxKEY_ROWSxWARPSxSTAGES"):
        Blocks.from_text(text)
    with pytest.raises(ValueError, match="expected QUERY_ROWSxKEY_ROWSxWARPSxSTAGES"):
        Tuning.from_text(f"forward={text}")


def test_passes_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="'sideways=16x16x4x1': expected one of forward=, backward_kv=, backward_q="):
        Tuning.from_text("forward=64x64x4x2,sideways=16x16x4x1")


def test_blocks_that_cannot_be_built_are_named() -> None:
    with pytest.raises(ValueError, match="block_m=48: expected one of 16, 32, 64"):
        Blocks(48, 64, 4, 2)
    with pytest.raises(ValueError, match="precision='tf32': expected one of ieee, tf32x3"):
        Blocks(64, 64, 4, 2, "tf32")


def test_the_table_serves_every_head_dim_up_to_its_largest() -> None:
    assert [table_dim(d) for d in (1, 16, 17, 64, 72, 80, 96, 128, 192)] == [16, 16, 32, 64, 80, 80, 96, 128, 256]
    assert table_dim(257) == table_dim(576) == 576
    with pytest.raises(ValueError, match="head_dim=577: expected at most 576"):
        table_dim(577)
    schedule = whole_pack_schedule(np.array([40]))
    for arch, dtype in (("gfx942", torch.bfloat16), ("sm_90", torch.float32)):
        with pytest.raises(ValueError, match=rf"head_dim=576 of {dtype} on {arch}: expected at most 256"):
            choose(Pass.FORWARD, arch, 576, dtype, schedule)


def test_short_documents_get_small_tiles() -> None:
    long, short = TABLE["sm_90", 128, 2, Pass.FORWARD]
    assert (long.block_m, short.block_m) == (128, 64)

    def chosen(*lengths: int) -> Blocks:
        return choose(Pass.FORWARD, "sm_90", 128, torch.bfloat16, whole_pack_schedule(np.array(lengths)))

    assert chosen(32_768) == chosen(*[8192] * 4) == chosen(*[1024] * 32) == long
    assert chosen(*[32] * 1024) == chosen(*[130] * 200) == short
    assert chosen(32_768, *[32] * 100) == long  # the long one is nearly all there is to compute


def walked_pairs(schedule: Schedule, rows: int, blocks: Blocks, heads: int) -> int:
    """Pairs a head that the forward's tiles compute, counted tile by tile; their shards read nothing before them."""
    tile_rows = blocks.block_m // heads
    tiles = query_tiles(schedule, rows, tile_rows)
    keys = tiles.table[:, 2] - tiles.ranges[tiles.table[:, 3], 1]
    return int((tile_rows * -(-keys // blocks.block_n) * blocks.block_n).sum())


def test_computed_pairs_are_those_of_the_tiles() -> None:
    for lengths in ([1000], [64] * 10, [8] * 64, [300, 20, 20, 500]):
        schedule = whole_pack_schedule(np.array(lengths))
        for blocks, heads in product((Blocks(32, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(64, 64, 4, 1)), (1, 2, 4)):
            if blocks.block_m // heads >= 16:
                walked = walked_pairs(schedule, sum(lengths), blocks, heads)
                counted = computed_pairs(Pass.FORWARD, schedule, blocks, heads)
                assert walked == pytest.approx(counted, rel=0.35), (lengths, blocks, heads)


def test_heads_share_a_tile_where_documents_are_short() -> None:
    def heads(group: int, *lengths: int, which: Pass = Pass.FORWARD) -> int:
        return tile_heads(which, Blocks(64, 64, 4, 3), whole_pack_schedule(np.array(lengths)), group)

    short = [70] * 50
    assert [heads(group, *short) for group in (1, 2, 3, 4, 6, 7, 8, 16)] == [1, 2, 1, 4, 2, 1, 4, 4]
    assert heads(4, 8192, 8192) == 1  # long documents: hardly a pair is saved
    assert heads(4, *[16] * 500) == 1  # so short that several share a tile, whose keys take a whole block anyway
    assert heads(4, *short, which=Pass.BACKWARD_KV) == 1


def test_heads_that_share_a_tile_save_a_tenth_of_the_pairs() -> None:
    for length in (30, 64, 100, 200, 400, 1000, 4000):
        schedule, blocks = whole_pack_schedule(np.array([length] * (8000 // length))), Blocks(64, 64, 4, 3)
        rows = length * (8000 // length)
        alone, together = (walked_pairs(schedule, rows, blocks, heads) for heads in (1, 4))
        if tile_heads(Pass.FORWARD, blocks, schedule, 4) == 4:
            assert together < 0.95 * alone
        else:
            assert together > 0.8 * alone


def test_the_interpreter_has_an_architecture_of_its_own() -> None:
    assert architecture(torch.device("cpu")) == "cpu"
    assert choose(Pass.FORWARD, "cpu", 64, torch.float32, whole_pack_schedule(np.array([4]))).block_m == 32


def test_any_order_is_part_of_a_tunings_text() -> None:
    for tuning in (Tuning(deterministic=False), Tuning(Blocks(128, 64, 8, 3), deterministic=False), Tuning()):
        assert Tuning.from_text(tuning.to_text()) == tuning
    assert Tuning(deterministic=False).to_text() == "deterministic=false"
    with pytest.raises(ValueError, match="deterministic=maybe"):
        Tuning.from_text("deterministic=maybe")
