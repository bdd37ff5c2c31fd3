"""Random schedules and plans that the tests of this folder draw."""

from typing import NamedTuple

from hypothesis import strategies as st

from counterflow.schedule import SCHEDULES
from counterflow.schedule.words import Part, Plan, Schedule, StageId


class Case(NamedTuple):
    """A schedule's name and size. Schedules are made in the tests: annotations are checked there with random numbers,
    which hypothesis forbids in a strategy."""

    name: str
    ranks: int
    microbatches: int
    stages_per_rank: int | None = None


def made(case: Case) -> Schedule:
    """The schedule of a case."""
    return SCHEDULES[case.name](*case[1:])


@st.composite
def cases(draw: st.DrawFn, names: tuple[str, ...] = tuple(SCHEDULES), most_ranks: int = 8) -> Case:
    """Any schedule of any size that its rule allows, and small enough to be quick."""
    name = draw(st.sampled_from(names))
    row, ranks = SCHEDULES[name], draw(st.integers(1, most_ranks))
    ranks += row.even_ranks and ranks % 2
    allowed = row.allowed(ranks)
    place = draw(st.integers(0, max(2, (20 - allowed.start) // allowed.step)))
    return Case(name, ranks, allowed[place], draw(st.integers(1, 3)) if row.choices else None)


@st.composite
def plans(draw: st.DrawFn, first: int = 0) -> Plan:
    """A stage's plan: an embedding or none, dense and MoE layers, a head or none, an MTP module or none."""
    plan: list[tuple[Part, int]] = [(Part.EMBED, 0)] if draw(st.booleans()) else []
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=5))
    for layer, moe in enumerate(kinds, start=first):
        plan += moe_layer(layer) if moe else ((Part.ATTN, layer), (Part.MLP, layer))
    if draw(st.booleans()):
        plan.append((Part.HEAD, 0))
    if draw(st.booleans()):
        plan += [(Part.MERGE, 1), *moe_layer(first + len(kinds)), (Part.HEAD, 1)]
    return tuple(plan)


def moe_layer(layer: int) -> Plan:
    """The parts of a layer of experts."""
    return (Part.ATTN, layer), (Part.DISPATCH, layer), (Part.MLP, layer), (Part.COMBINE, layer)


def equal_plans(schedule: Schedule, layers: int = 2) -> dict[StageId, Plan]:
    """The same number of MoE layers on every stage, embedding and head at the ends."""
    found: dict[StageId, Plan] = {}
    for stage in schedule.rank_of:
        plan = [part for at in range(layers) for part in moe_layer(stage.index * layers + at)]
        if stage.index == 0:
            plan.insert(0, (Part.EMBED, 0))
        if stage.index == schedule.stages - 1:
            plan.append((Part.HEAD, 0))
        found[stage] = tuple(plan)
    return found
