"""What the page says about each figure beyond its numbers: what was assumed, and why something does not come out."""

from __future__ import annotations

from collections import Counter

from flashcp.experiments.paper.beyond import wins
from flashcp.experiments.paper.cells import Numbers
from flashcp.experiments.paper.fig5 import unhidden_ring
from flashcp.experiments.paper.fig6 import breakdown
from flashcp.experiments.paper.parts import BASELINES, CHANGES, DATA, stages
from flashcp.experiments.paper.reality import out_of_order
from flashcp.experiments.paper.table2 import plain_case

__all__ = ["NOTES", "prose"]


def prose(text: str) -> str:
    """A paragraph in one line."""
    return " ".join(text.split())


def _fig3(numbers: Numbers) -> str:
    return prose("""
        Nothing was fitted here. That cut documents cost more comes from bytes alone: a shard of 512 queries brings in
        its whole prefix, and a ring brings Q in and O out once a step. One document of 128K is the same plan under
        `llama3` and `per_document`; what the paper has between them (1.03) is not in the model.
    """)


def _fig5(numbers: Numbers) -> str:
    ring, zigzag = (unhidden_ring(numbers, method) for method in ("ring", "ring_zigzag"))
    return prose(f"""
        **The rings do not come out.** They are priced as ring-flash-attention's source has them: fp32 merges outside
        the kernel after every step, fp32 gradients behind the KV on the same stream, their last hop in the open, and a
        zigzag whose host waits for the device at every use of a mask and several times a document, at an estimated 40
        us. That last item is most of what separates `ring_zigzag` from `ring`'s smaller copies on windows of many
        documents. Sends hide behind attention in the model, as that code is written to do. If nothing of them were
        hidden, FlashCP's mean in training would be {ring.speedup:.2f} over ring and {zigzag.speedup:.2f} over
        ring_zigzag; for the paper's means the links between neighbours would then have to be {ring.slower:.1f} and
        {zigzag.slower:.1f} times slower than the collectives'. The paper prints no breakdown of
        its rings, so how much was which we cannot tell, and nothing of either is in the parameters.
    """)


def _fig6(numbers: Numbers) -> str:
    base = {data: breakdown(numbers, data, "llama3").total for data in ("wlb_llm", "pile")}
    lines = ["| | WLB-LLM ms | speedup | Pile ms | speedup |", "|---|---|---|---|---|"]
    for provider in numbers.providers(numbers.case("pile", "n8", "h32")):
        totals = {data: breakdown(numbers, data, provider).total for data in base}
        cells = " | ".join(f"{total:.1f} | {base[data] / total:.2f}" for data, total in totals.items())
        lines.append(f"| {provider} | {cells} |")
    published, best = (breakdown(numbers, "pile", f"per_document{suffix}").total for suffix in ("", "_best_effort"))
    paper, ours = (breakdown(numbers, "pile", name).total for name in ("flashcp_paper_best_effort", "flashcp"))
    fitted = prose("""
        The WLB-LLM column was fitted (`flashcp bench paper_fit`: attention's two rates, the link's rate, the passes of
        the copies, `long_document_weight`); nothing was fitted to the Pile column. One assumption deserves distrust:
        8 us of launches a shard. The WLB-LLM column cannot tell it from the passes, the copies of `per_document` on
        Pile hang on it (about 1.3 ms for each us), and that column was known when it was made. What an exchange shows
        is halved between all-gather and reduce-scatter. Every baseline once more, with our kernel, no copies and our
        overlap:
    """)
    said = prose(f"""
        So on Pile's lengths copies and overlap are worth {published / best:.2f}x to `per_document` alone; what then
        separates it from `flashcp` is {best / ours:.2f}x. Between the paper's plan and ours, both at their best inside
        one NVLink node, it is {paper / ours:.2f}x. `ulysses` is as fast as any where heads divide. Our kernel is
        assumed to be as fast as the published one: it was not measured. Our gradients travel in fp32, the published
        methods' in bf16.
    """)
    return "\n".join([fitted, "", *lines, "", said])


def _fig7(numbers: Numbers) -> str:
    return prose("""
        Nothing was fitted here but the column of Figure 6. Half of a method's copies are counted in the forward.
        Inference comes out a little too fast for cut documents where windows are short: more than half of their copies
        must have been the forward's.
    """)


def _table2(numbers: Numbers) -> str:
    heads = ["long_document_weight", "heuristic, heads leave", "heuristic, tails leave", "`flashcp`, compacted"]
    heads += ["solver", "its bound", "solved"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in numbers.cases:
        weight = next((part[1:] for part in case.split("-") if part[0] == "w"), "1")
        providers = ("flashcp_paper", "flashcp_paper_tail", "flashcp", "exact")
        savings = [numbers(case, name, "saving") for name in providers]
        shown = [f"{value:.2f}" for value in (*savings, numbers(case, "exact", "bound"))]
        lines.append(f"| {weight} | {' | '.join(shown)} | {numbers(case, 'exact', 'solved'):.0%} |")
    plain = plain_case(numbers)
    why = prose(f"""
        **The savings do not come out, and no reading of Algorithm 1 can make them.** With the Pile's lengths as sampled
        the solver itself saves {numbers(plain, "exact", "saving"):.2f} in the paper's own metric (largest non-last
        rows of a rank, documents cut at multiples of 4,096 rows); the paper's integer program, which is free of any
        reading, saves 0.36. So its windows held far more long documents than ours, or its program could cut less
        freely. The table shows both beside the weight of long documents. What the heuristic reaches of the solver is
        near the paper's 0.78.
    """)
    readings = prose("""
        Readings we tried, 40 windows each: target R 1.01, 1.02, 1.05, 1.1; cutting the longest documents first or the
        shortest; a quarter of a piece at a time or as much as fits; the largest rank's rows or the mean; heads or tails
        leave. Only the last matters much: when *tails* leave the fullest rank, the heads that stay behind become
        non-last and travel. Means over 100 windows, tails / heads: Pile at N = 4 0.47 / 0.64 (Table 2: 0.28), Pile
        at N = 8 0.31 / 0.45 (3.6 of 5.4 ms in Figure 6: 0.33), WLB-LLM at N = 8 as sampled 0.22 / 0.71, at weight 10
        0.07 / 0.26 (Figure 6: 0.22). So tails with the lengths as sampled meet both collective times of Figure 6, but
        such windows cannot take the attention time printed beside them; heads with richer windows meet that and miss
        Pile's by 14%. Heads stay the default, `sharding.leaves=tail` is the other reading.
    """)
    return "\n".join([*lines, "", why, "", readings])


def _parts(numbers: Numbers) -> str:
    heads = ["lengths", "from", *CHANGES, "in all"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for data, title in DATA.items():
        for baseline in BASELINES:
            first, *others = stages(numbers, data, baseline)
            changes = " | ".join(f"{stage.speedup:.2f}" for stage in others)
            whole = first.ms / others[-1].ms
            lines.append(f"| {title} | {baseline} | {first.ms:.1f} ms | {changes} | {whole:.2f} |")
    said = prose("""
        Each column is the speedup of one change, made to what the columns before it left: the published method without
        its copies and with our kernel, which reads rows where they lie; its transfers beside attention; the exact
        exchange instead of its own; `flashcp`'s plan instead of its own, which is balance for `llama3` and less traffic
        for the others. Another order would share the product out differently: what overlap hides, less traffic cannot
        win again. Below 1 where every document is cut: each reader's gradients then come home by themselves and their
        owner adds them up, where a reduce-scatter adds on the way.
    """)
    return "\n".join([*lines, "", said])


def _beyond(numbers: Numbers) -> str:
    found = wins(numbers)
    count = Counter(win.fastest for win in found).most_common()
    lost = sum(win.fastest != "flashcp" for win in found)
    return prose(f"""
        Cases won: {", ".join(f"{name} {number}" for name, number in count)}. Margins of a few percent are within what
        the model can tell. `flashcp` wins where traffic is not hidden. It loses to `ulysses` where many heads meet
        short windows (1/N of the heads is then less to send than any rows), and to the paper's plan with its padded
        blocks where long documents are cut over several nodes: the exact exchange sends a row to each reader by itself,
        an all-gather brings it into a node once and passes it on over NVLink. An exact exchange that relays inside
        nodes is what this map asks for ({lost} of {len(found)} cases are not `flashcp`'s).
    """)


def _reality(numbers: Numbers) -> str:
    measured = next(row for row in numbers.rows if row.kind == "measured")
    return prose(f"""
        Measured: {measured.device}, {measured.versions}, commit {measured.commit}, {measured.date[:10]}; medians,
        p20 and p80 over repeated sweeps of `make demo`. Predicted: the same windows with `cluster=this_machine`
        (`flashcp bench calibrate` on the same machine), overlap `staged`, every method in our implementation,
        which is what the demo runs. Nothing was fitted to the demo's times. The predicted step leaves out
        embeddings, the loss, the optimizer and the loader's thread, which dilute the measured speedups. Two methods are
        told apart where their p20 to p80 do not overlap. {_order(numbers)}
    """)


def _hybrid(numbers: Numbers) -> str:
    one = next(row for row in numbers.rows if row.kind != "measured")
    return prose(f"""
        Rows say `{one.kind}`: instead of asking the cost model, `kernel=measured` ran the attention of each rank of
        each window, one after another on one thread. What is left between prediction and measurement is not the cost
        model's. {_order(numbers)}
    """)


def _order(numbers: Numbers) -> str:
    wrong = [" and ".join(pair) for pair in out_of_order(numbers)]
    return f"Out of order: {', '.join(wrong)}." if wrong else "No pair is out of order."


NOTES = {
    "paper_fig3": _fig3,
    "paper_fig5": _fig5,
    "paper_fig6": _fig6,
    "paper_fig7": _fig7,
    "paper_table2": _table2,
    "demo_predicted": _reality,
    "demo_hybrid": _hybrid,
    "speedup_parts": _parts,
    "beyond_paper": _beyond,
}
"""By figure: text made from its numbers."""
