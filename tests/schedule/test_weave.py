"""Cells of any unevenness become one order: every op, needs first, lanes in order, Figure 4 for equal layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.schedule.relation import op_needs, ops
from counterflow.schedule.weave import FIGURE_4, lanes, sent_behind, weave
from counterflow.schedule.words import OWING, TRANSFERS, Chunk, Kind, Lane, Op, Part, StageId
from tests.schedule.cases import moe_layer, plans

pytestmark = pytest.mark.pure

HERE, THERE = StageId(0, 1), StageId(1, 2)
KINDS = st.sampled_from([(Kind.F,), (Kind.B,), (Kind.I,), (Kind.W,), (Kind.F, Kind.B), (Kind.F, Kind.I)])


def cell_of(kinds, backward_first=False):
    cell = tuple(Chunk(kind, HERE if kind is Kind.F else THERE, place) for place, kind in enumerate(kinds))
    return cell[::-1] if backward_first else cell


def said(issued) -> list[str]:
    """Ops as Figure 4 names them: DISPATCH0(F), MLP1(W)."""
    return [f"{op.part}{op.layer}({'B' if op.kind is Kind.I else op.kind})" for op in issued]


@given(KINDS, plans(), plans(first=7), st.booleans())
def test_each_op_comes_once_after_its_need_and_in_its_lane(kinds, here, there, backward_first):
    cell, plan_of = cell_of(kinds, backward_first), {HERE: here, THERE: there}
    issued = weave(cell, plan_of)
    assert sorted(issued, key=repr) == sorted((op for c in cell for op in ops(c, plan_of[c.stage])), key=repr)
    done = set()
    for op in issued:
        before = op_needs(op, plan_of[op.chunk.stage])
        own = op.kind is not Kind.W or op.chunk.kind is not Kind.W  # a W chunk's I ran long ago
        if before is not None and own:
            kind = Kind.F if op.kind is Kind.F else Kind.I
            assert (op.chunk, kind, before) in done, f"{op} before its {kind} {before}"
        done.add((op.chunk, op.kind, (op.part, op.layer)))
    for lane, ordered in lanes(cell, plan_of).items():
        assert tuple(op for op in issued if op.lane is lane) == ordered


@given(plans(), plans(first=7))
def test_the_order_is_the_cells_and_the_plans_alone(here, there):
    plan_of = {HERE: here, THERE: there}
    assert weave(cell_of((Kind.F, Kind.B)), plan_of) == weave(cell_of((Kind.F, Kind.B), True), plan_of)


def test_fig4_a_pair_of_equal_moe_layers():
    """The report's two lanes: MLP(B) MLP(W) MLP(F) ATTN(B) ATTN(W) ATTN(F); DISPATCH(F) DISPATCH(B) COMBINE(F) …"""
    plan_of = {
        HERE: moe_layer(0) + moe_layer(1) + moe_layer(2),
        THERE: moe_layer(3) + moe_layer(4) + moe_layer(5),
    }
    both = lanes(cell_of((Kind.F, Kind.B)), plan_of)
    assert said(both[Lane.COMPUTE]) == [
        "ATTN0(F)",
        "MLP5(B)",
        "MLP5(W)",
        "MLP0(F)",
        "ATTN5(B)",
        "ATTN5(W)",
        "ATTN1(F)",
        "MLP4(B)",
        "MLP4(W)",
        "MLP1(F)",
        "ATTN4(B)",
        "ATTN4(W)",
        "ATTN2(F)",
        "MLP3(B)",
        "MLP3(W)",
        "MLP2(F)",
        "ATTN3(B)",
        "ATTN3(W)",
    ]
    assert said(both[Lane.ALL_TO_ALL]) == [
        "COMBINE5(B)",
        "DISPATCH0(F)",
        "DISPATCH5(B)",
        "COMBINE0(F)",
        "COMBINE4(B)",
        "DISPATCH1(F)",
        "DISPATCH4(B)",
        "COMBINE1(F)",
        "COMBINE3(B)",
        "DISPATCH2(F)",
        "DISPATCH3(B)",
        "COMBINE2(F)",
    ]
    assert said(weave(cell_of((Kind.F, Kind.B)), plan_of))[:12] == [
        "COMBINE5(B)",
        "ATTN0(F)",
        "DISPATCH0(F)",
        "MLP5(B)",
        "DISPATCH5(B)",
        "MLP5(W)",
        "MLP0(F)",
        "COMBINE0(F)",
        "ATTN5(B)",
        "COMBINE4(B)",
        "ATTN5(W)",
        "ATTN1(F)",
    ]


def test_fig4_each_transfer_hides_behind_the_other_chunks_computation():
    for (transfer, _), (hidden_by, _) in FIGURE_4:
        assert {transfer, hidden_by} == {"F", "B"}
    plan_of = {HERE: moe_layer(0) + moe_layer(1), THERE: moe_layer(2) + moe_layer(3)}
    issued = weave(cell_of((Kind.F, Kind.B)), plan_of)
    for place, op in enumerate(issued[:-1]):
        if op.part in TRANSFERS and place > 0:
            following = issued[place + 1 :]
            beside = next((other for other in following if other.lane is Lane.COMPUTE), None)
            assert beside is None or beside.chunk != op.chunk or beside.kind is Kind.W, (
                f"{op} beside {beside}"
            )


@pytest.mark.parametrize(
    ("kind", "compute", "transfers"),
    [
        (Kind.F, "EMBED0(F) ATTN0(F) MLP0(F) ATTN1(F) MLP1(F) HEAD0(F)", "DISPATCH0(F) COMBINE0(F)"),
        (
            Kind.B,
            "HEAD0(B) MLP1(B) MLP1(W) ATTN1(B) ATTN1(W) MLP0(B) MLP0(W) ATTN0(B) ATTN0(W) EMBED0(B)",
            "COMBINE0(B) DISPATCH0(B)",
        ),
        (Kind.I, "HEAD0(B) MLP1(B) ATTN1(B) MLP0(B) ATTN0(B) EMBED0(B)", "COMBINE0(B) DISPATCH0(B)"),
        (Kind.W, "MLP1(W) ATTN1(W) MLP0(W) ATTN0(W)", ""),
    ],
)
def test_lanes_of_single_chunks(kind, compute, transfers):
    plan = ((Part.EMBED, 0), *moe_layer(0), (Part.ATTN, 1), (Part.MLP, 1), (Part.HEAD, 0))
    both = lanes((Chunk(kind, HERE, 0),), {HERE: plan})
    assert said(both[Lane.COMPUTE]) == compute.split()
    assert said(both[Lane.ALL_TO_ALL]) == transfers.split()


@given(plans())
def test_a_whole_backward_is_its_two_halves(plan):
    both = {kind: {op[:3] for op in ops(Chunk(kind, HERE, 0), plan)} for kind in (Kind.B, Kind.I, Kind.W)}
    assert both[Kind.B] == both[Kind.I] | both[Kind.W] and not both[Kind.I] & both[Kind.W]
    assert {op[1] for op in both[Kind.W]} <= set(OWING)


def test_two_forwards_are_no_cell():
    with pytest.raises(AssertionError, match="at most one forward"):
        lanes((Chunk(Kind.F, HERE, 0), Chunk(Kind.F, THERE, 0)), {HERE: moe_layer(0), THERE: moe_layer(1)})


def test_ops_say_what_they_are():
    chunk = Chunk(Kind.B, THERE, 3)
    assert str(Op(Kind.W, Part.MLP, 5, chunk)) == "MLP5 W3'"
    assert Op(Kind.I, Part.COMBINE, 5, chunk).lane is Lane.ALL_TO_ALL


@given(KINDS, plans(), plans(first=7), st.booleans())
def test_what_a_chunk_gives_is_handed_on_behind_its_last_op(kinds, here, there, backward_first):
    cell, plan_of = cell_of(kinds, backward_first), {HERE: here, THERE: there}
    issued, found = weave(cell, plan_of), sent_behind(cell, plan_of)
    for chunk in cell:
        giving = [place for place, op in enumerate(issued) if op.chunk == chunk and op.kind is not Kind.W]
        assert (chunk in found) == bool(giving)
        if giving:
            assert issued.index(found[chunk]) >= giving[-1]
            assert found[chunk].part not in TRANSFERS or found[chunk] == issued[giving[-1]]


def test_fig4_the_pipelines_sends_follow_the_attention_beside_the_last_combine():
    plan_of = {HERE: moe_layer(0) + moe_layer(1), THERE: moe_layer(3) + moe_layer(4) + moe_layer(5)}
    forward, backward = cell = cell_of((Kind.F, Kind.B))
    found = sent_behind(cell, plan_of)
    assert said([found[forward], found[backward]]) == ["ATTN4(W)", "ATTN3(B)"]
    assert said([sent_behind(cell[:1], plan_of)[forward]]) == ["COMBINE1(F)"]
