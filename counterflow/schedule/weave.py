"""The ops of a cell in the order one thread issues them: Figure 4 as data, for stages of any unevenness.

A forward and a backward chunk are cut into turns, one a pair of transfers. The i-th turn of the one runs with the i-th
of the other, so that each transfer has the other chunk's computation beside it; parts without transfers (embedding,
dense layers, head) join the turn before them, and turns left over follow their own chain. That fixes the order of both
lanes; they merge into one order by issuing a transfer as soon as its lane and its need allow. The order depends on the
cell and the plans alone, so all ranks that have the same cell issue the same, whatever happens to be ready.
"""

from collections.abc import Mapping
from typing import NamedTuple

from counterflow.schedule.relation import op_needs, ops
from counterflow.schedule.words import TRANSFERS, Cell, Chunk, Kind, Lane, Op, Part, Plan, StageId

FIGURE_4 = (
    (("F", "first"), ("B", "mlp")),
    (("B", "second"), ("F", "mlp")),
    (("F", "second"), ("B", "rest")),
    (("B", "first"), ("F", "rest")),
)
"""Rows of (a transfer, the computation it hides behind). The last transfer is of the backward's next turn. [Fig. 4]"""


class Turn(NamedTuple):
    """The ops of one turn, under the names that FIGURE_4 uses."""

    first: tuple[Op, ...]
    """DISPATCH F or COMBINE I."""
    mlp: tuple[Op, ...]
    """What both transfers enclose."""
    second: tuple[Op, ...]
    """COMBINE F or DISPATCH I."""
    rest: tuple[Op, ...]
    """All up to the next turn: ATTN, and whatever has no transfer."""


def lanes(cell: Cell, plans: Mapping[StageId, Plan]) -> dict[Lane, tuple[Op, ...]]:
    """Every op of a cell once, in the order of its lane."""
    openings, turns = _turned(cell, plans)
    issued = [*openings["B"], *(turns["B"][0].first if turns["B"] else ()), *openings["F"]]
    for index in range(max(map(len, turns.values()))):
        for row in FIGURE_4:
            for side, group in row:
                place = index + (side == "B" and group == "first")
                if place < len(turns[side]):
                    issued += getattr(turns[side][place], group)
    return {lane: tuple(op for op in issued if op.lane is lane) for lane in Lane}


def weave(cell: Cell, plans: Mapping[StageId, Plan]) -> tuple[Op, ...]:
    """Both lanes as one order of issue: a transfer goes out before the next computation wherever it can."""
    both = lanes(cell, plans)
    issued: list[Op] = []
    known: set[tuple[Kind, tuple[Part, int]]] = set()
    waiting = list(both[Lane.ALL_TO_ALL])

    def release() -> None:
        while waiting:
            before = op_needs(waiting[0], plans[waiting[0].chunk.stage])
            if before is not None and (waiting[0].kind, before) not in known:
                return
            issue(waiting.pop(0))

    def issue(op: Op) -> None:
        issued.append(op)
        known.add((op.kind, (op.part, op.layer)))

    release()
    for op in both[Lane.COMPUTE]:
        issue(op)
        release()
    assert not waiting, f"transfers of {cell} wait for what their chunk does not do"
    return tuple(issued)


def sent_behind(cell: Cell, plans: Mapping[StageId, Plan]) -> dict[Chunk, Op]:
    """The op behind which each chunk's x or dx is handed on; a chunk that has no such op is left out.

    That is the chunk's last op; where it is a transfer, the attention that it hides behind, since whoever hands on what
    is under way waits for it. [Fig. 4]
    """
    found: dict[Chunk, Op] = {}
    turns = _turned(cell, plans)[1]
    for chunk in cell:
        giving = [op for op in ops(chunk, plans[chunk.stage]) if op.kind is not Kind.W]
        if not giving:
            continue
        found[chunk] = giving[-1]
        if giving[-1].part in TRANSFERS and len(turns["F"]) <= len(turns["B"]):
            beside = turns["B"][len(turns["F"]) - 1].rest
            found[chunk] = [giving[-1], *(op for op in beside if op.layer == beside[0].layer)][-1]
    return found


def _turned(cell: Cell, plans: Mapping[StageId, Plan]) -> tuple[dict[str, list[Op]], dict[str, list[Turn]]]:
    """What comes before the first transfer of the cell's forward and backward chunk, and their turns."""
    chains: dict[str, list[Op]] = {"F": [], "B": []}
    for chunk in cell:
        side = chains["F" if chunk.kind is Kind.F else "B"]
        assert not side, f"a cell has at most one forward and one backward chunk: {cell}"
        side += ops(chunk, plans[chunk.stage])
    found = {side: _turns(chain) for side, chain in chains.items()}
    return {side: opening for side, (opening, _) in found.items()}, {
        side: own for side, (_, own) in found.items()
    }


def _turns(chain: list[Op]) -> tuple[list[Op], list[Turn]]:
    """The ops before the first transfer, and the turns."""
    places = [place for place, op in enumerate(chain) if op.part in TRANSFERS]
    if not places:
        return chain, []
    assert len(places) % 2 == 0, "a stage holds both transfers of a layer or none"
    turns = []
    for first, second, end in zip(places[::2], places[1::2], [*places[2::2], len(chain)]):
        turns.append(Turn(*map(tuple, _cut(chain[first:end], second - first))))
    return chain[: places[0]], turns


def _cut(turn: list[Op], second: int) -> tuple[list[Op], ...]:
    return turn[:1], turn[1:second], turn[second : second + 1], turn[second + 1 :]
