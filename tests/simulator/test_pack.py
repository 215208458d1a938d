"""Methods on one pack: what parts add up to, what an infinitely fast wire leaves, what overlap may and may not do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_machine
from flashcp.experiments.cli.compose import compose
from flashcp.sharding.lengths import windows
from flashcp.sharding.methods import METHODS
from flashcp.simulator.cost import AttentionShape, Link, Links
from flashcp.simulator.machine import Machine
from flashcp.simulator.module import simulate_module
from flashcp.simulator.pack import Batch, Outcome, simulate_batch
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.rivals import RIVALS
from flashcp.simulator.variants import HEADS, VARIANTS, WINDOW, Variant

PACK = next(windows("pile", 32_768, 1, 3))
RANKS = 4
ALL = list(VARIANTS.values())
OURS = [variant for variant in ALL if not variant.published]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return read_machine(compose("simulate", [])["cluster"])


def at_once(machine: Machine) -> Machine:
    """The same machine with a wire that takes no time."""
    return replace(machine, links=Links(8, Link(1e15, 0.0), Link(1e15, 0.0)))


def run(
    setting: Setting, variants: list[Variant] = ALL, pack: np.ndarray = PACK, ranks: int = RANKS
) -> dict[str, Outcome]:
    trials = [trial for one in variants for trial in one.trials(setting, ranks, WINDOW, head_ranks=1)]
    return {one.name: found for one, found in simulate_batch(Batch([pack], ranks, setting), trials).items()}


def test_every_method_is_there_as_published_and_at_its_best() -> None:
    methods, batches = [*METHODS, *HEADS], [*RIVALS, "block_placement"]
    best = [f"{name}_best_effort" for name in (*methods, *batches) if name != "flashcp"]
    assert set(VARIANTS) == {*methods, *best}
    assert not VARIANTS["flashcp"].published
    assert all(VARIANTS[name].published for name in METHODS if name != "flashcp")
    for name, variant in VARIANTS.items():
        assert (variant.implementation == "best effort") == name.endswith("_best_effort")


@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
def test_parts_add_up_and_nothing_is_negative(machine: Machine, overlap: str) -> None:
    for name, outcome in run(Setting(machine, overlap=overlap)).items():
        parts = outcome.attention_ms + outcome.copies_ms + outcome.exposed_exchange_ms
        assert outcome.module_ms == pytest.approx(parts), name
        assert min(outcome) >= -1e-9, name
        assert outcome.forward_ms < outcome.module_ms, name


@pytest.mark.parametrize("lengths", [(48, 42, 40, 3, 1, 13), (12944, 5146, 12308, 15281, 7674, 9218)])
@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
def test_no_more_of_an_exchange_is_exposed_than_it_takes(lengths: tuple[int, ...], overlap: str) -> None:
    """Ranks also wait for rows of one that attends longer before they leave: 21 times as long, here, as they travel."""
    pairs = [f"{strategy}+{exchange}" for strategy in flashcp.strategies() for exchange in ("exact", "all_gather")]
    for ranks in (2, 8):
        for one in flashcp.simulate(lengths, ranks, methods=pairs, overlap=overlap, head_ranks=1):
            assert one.exposed_exchange_ms <= one.exchange_ms, one.name
            assert one.attention_ms + one.copies_ms + one.exposed_exchange_ms == pytest.approx(one.module_ms), one.name


def test_the_same_pack_gives_the_same_numbers(machine: Machine) -> None:
    assert run(Setting(machine)) == run(Setting(machine))


def test_one_rank_has_nobody_to_wait_for(machine: Machine) -> None:
    for name, outcome in run(Setting(machine), ranks=1).items():
        assert outcome.exchange_ms == pytest.approx(0), name
        assert outcome.exposed_exchange_ms == pytest.approx(0, abs=1e-9), name


def test_llama3_as_published_follows_the_paper_s_sum(machine: Machine) -> None:
    setting = Setting(machine)
    planned = Planned(flashcp.plan(PACK, RANKS, "per_sequence"), setting)
    outcome = run(setting)["llama3"]
    collective = machine.links.collective_us(8192 * setting.shape.kv_bytes, RANKS)
    window = 2 * 32_768 * setting.shape.kv_bytes / (1e6 * machine.copies.gbps)
    copies = machine.published.gathered_passes * window + 2 * RANKS * machine.published.shard_us / 1e3
    attention = (planned.whole_us(False).max() + planned.whole_us(True).max()) / 1e3
    assert outcome.exchange_ms == pytest.approx(2 * collective / 1e3) == outcome.exposed_exchange_ms
    assert outcome.copies_ms == pytest.approx(copies)
    assert outcome.attention_ms == pytest.approx(attention)
    assert outcome.kept_mib * 2**20 == 32_768 * setting.shape.kv_bytes
    backward = simulate_module(planned, VARIANTS["llama3"]).backward
    slowest = planned.whole_us(True).max() + 1e3 * copies / 2
    np.testing.assert_allclose(backward.now, slowest + collective)  # all meet before the reduce-scatter


def test_wlb_adaptive_copies_as_the_strategy_it_chose(machine: Machine) -> None:
    one_document, many = np.array([32_768]), np.full(64, 512)
    for pack, choice in ((one_document, "llama3"), (many, "llama3"), (PACK, "per_document")):
        outcomes = run(Setting(machine), pack=pack)
        assert outcomes["wlb_adaptive"].module_ms == pytest.approx(outcomes[choice].module_ms)


def test_a_wire_that_takes_no_time_hides_the_exchange(machine: Machine) -> None:
    """All but waiting for slower ranks, which is more where a backward stops between remote and local rows (`none`)."""
    for overlap, share in (("none", 0.06), ("staged", 0.02), ("fused", 0.02)):
        for name, outcome in run(Setting(at_once(machine), overlap=overlap), OURS).items():
            assert outcome.exposed_exchange_ms == pytest.approx(0, abs=share * outcome.module_ms), (name, overlap)


def test_fused_never_waits_longer_than_none(machine: Machine) -> None:
    fused, none = (run(Setting(machine, overlap=overlap), OURS) for overlap in ("fused", "none"))
    for name in fused:
        assert fused[name].module_ms <= none[name].module_ms * 1.001, name
    assert fused["flashcp"].exposed_exchange_ms < 0.5 * none["flashcp"].exposed_exchange_ms


def test_staged_pays_for_the_merge(machine: Machine) -> None:
    staged, none = (run(Setting(at_once(machine), overlap=overlap), OURS) for overlap in ("staged", "none"))
    assert staged["per_document_best_effort"].attention_ms > none["per_document_best_effort"].attention_ms


def test_a_fused_kernel_is_as_good_as_its_tiles_in_order_of_arrival(machine: Machine) -> None:
    """Shard by shard, each after the rows it reads have come, on the rank that ends last."""
    setting = Setting(machine, overlap="fused")
    planned = Planned(flashcp.plan(PACK, RANKS, "flashcp"), setting)
    module = simulate_module(planned, VARIANTS["flashcp"])
    arrivals = {span.stop[0] for span in module.forward.spans if span.kind == "exchange"}
    assert len(arrivals) == 1
    reads = planned.reads
    us = planned.own_us(False) + planned.read_us(False).sum(axis=1)
    for rank in range(RANKS):
        mine = reads.rank == rank
        busy = us[mine].sum() + planned.cost.launch_us() + module.forward.busy["copies"][rank]
        remote = mine & (reads.others.sum(axis=1) > reads.others[np.arange(len(mine)), rank])
        latest = next(span.stop[rank] for span in module.forward.spans if span.kind == "exchange")
        end = module.forward.now[rank]
        assert busy - 1e-9 <= end <= max(busy, latest + us[remote].sum()) + 1e-9


@pytest.mark.parametrize("ranks_per_node", [8, 2])
@pytest.mark.parametrize("overlap", ["none", "fused"])
def test_nobody_is_faster_than_the_best_effort(machine: Machine, ranks_per_node: int, overlap: str) -> None:
    """Neither the authors' code nor ours, which copies and sends more; a ring as published hides in any case."""
    here = replace(machine, links=replace(machine.links, ranks_per_node=ranks_per_node))
    for name, method in METHODS.items():
        if name == "flashcp":
            continue
        best, published = VARIANTS[f"{name}_best_effort"], VARIANTS[name]
        pair = Variant("pair", method.sharding, method.exchange)
        found = run(Setting(here, overlap=overlap), [best, published, pair])
        least = found[best.name].module_ms
        assert least <= found["pair"].module_ms * 1.001, name
        if overlap == "fused" or method.exchange != "ring":
            assert least <= found[name].module_ms * 1.001, name


def test_rings_compute_while_blocks_travel(machine: Machine) -> None:
    slow = replace(machine, links=Links(8, Link(machine.links.node.gbps / 50, 2.0), machine.links.network))
    quick, late = run(Setting(machine)), run(Setting(slow))
    for name in ("ring", "ring_zigzag"):
        assert quick[name].exposed_exchange_ms < quick[name].exchange_ms
        assert late[name].exposed_exchange_ms > 0.5 * late[name].exchange_ms
    assert quick["ring"].attention_ms > 1.5 * quick["ring_zigzag"].attention_ms  # the last rank holds every tail


def test_ulysses_splits_heads_evenly_and_only_so(machine: Machine) -> None:
    outcomes = run(Setting(machine))
    assert outcomes["ulysses"].imbalance == 1
    assert outcomes["ulysses_best_effort"].copies_ms == 0
    ours = run(Setting(machine), [Variant("", "contiguous", "ulysses")])[""]
    assert ours.copies_ms == outcomes["ulysses"].copies_ms
    assert not run(Setting(machine), [VARIANTS["ulysses"]], ranks=3)


def test_fewer_kv_heads_make_a_lighter_exchange(machine: Machine) -> None:
    mha, gqa = (run(Setting(machine, AttentionShape(32, heads, 128, 2))) for heads in (32, 8))
    for name in ("llama3", "flashcp"):
        assert gqa[name].exchange_ms < 0.4 * mha[name].exchange_ms
        assert gqa[name].kept_mib == pytest.approx(mha[name].kept_mib / 4)


def test_gradients_in_fp32_take_twice_the_wire(machine: Machine) -> None:
    wide, narrow = (run(Setting(machine, gradient_wire=wire)) for wire in ("fp32", "model"))
    assert narrow["flashcp"].exchange_ms < 0.75 * wide["flashcp"].exchange_ms
    for name in ("llama3", "llama3_best_effort"):  # neither sends more than the model's dtype
        assert narrow[name] == wide[name]


def test_across_nodes_the_network_is_what_counts(machine: Machine) -> None:
    apart = replace(machine, links=replace(machine.links, ranks_per_node=1))
    near, far = run(Setting(machine)), run(Setting(apart))
    for name in VARIANTS:
        assert far[name].exchange_ms > 4 * near[name].exchange_ms, name
        assert far[name].attention_ms == pytest.approx(near[name].attention_ms, rel=1e-6), name
