"""What waits for what: the only place that knows it.

The checker, the simulator, the memory count, the list of transfers and the executor all read these few lines, so
what is checked is what runs.
"""

from counterflow.schedule.words import OWING, Carried, Chunk, Kind, Op, Part, Plan, Product, StageId


def gives(chunk: Chunk) -> frozenset[Product]:
    """The products of a chunk."""
    what = {
        Kind.F: (Carried.X,),
        Kind.B: (Carried.DX, Carried.DW),
        Kind.I: (Carried.DX,),
        Kind.W: (Carried.DW,),
    }[chunk.kind]
    return frozenset(Product(carried, chunk.stage, chunk.mb) for carried in what)


def needs(chunk: Chunk, stages: int) -> frozenset[Product]:
    """The products that must be there before a chunk starts; `stages` is the number of its pipe's."""
    pipe, index = chunk.stage
    if chunk.kind is Kind.F:
        return frozenset({Product(Carried.X, StageId(pipe, index - 1), chunk.mb)} if index else ())
    own = Carried.DX if chunk.kind is Kind.W else Carried.X
    needed = {Product(own, chunk.stage, chunk.mb)}
    if chunk.kind is not Kind.W and index + 1 < stages:
        needed.add(Product(Carried.DX, StageId(pipe, index + 1), chunk.mb))
    return frozenset(needed)


def ops(chunk: Chunk, plan: Plan) -> tuple[Op, ...]:
    """The ops of a chunk, each in the earliest place that `op_needs` allows."""
    if chunk.kind is Kind.F:
        return tuple(Op(Kind.F, part, layer, chunk) for part, layer in plan)
    found: list[Op] = []
    for part, layer in reversed(plan):
        if chunk.kind is not Kind.W:
            found.append(Op(Kind.I, part, layer, chunk))
        if chunk.kind is not Kind.I and part in OWING:
            found.append(Op(Kind.W, part, layer, chunk))
    return tuple(found)


def op_needs(op: Op, plan: Plan) -> tuple[Part, int] | None:
    """The part of the same pass (for W: of its I) that must be done before an op; None: the chunk's own needs."""
    here = (op.part, op.layer)
    if op.kind is Kind.W:
        return here
    beside = plan.index(here) + (-1 if op.kind is Kind.F else 1)
    return plan[beside] if 0 <= beside < len(plan) else None


def last_op(chunk: Chunk, plan: Plan) -> tuple[Kind, tuple[Part, int]]:
    """Kind and part of the op that gives what travels: x with F's last part, dx with I's last."""
    return (Kind.F, plan[-1]) if chunk.kind is Kind.F else (Kind.I, plan[0])
