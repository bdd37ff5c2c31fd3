"""Whether a schedule can run: every need given, nothing given twice, nothing left, no rank waiting for ever.

It is played without clocks: a cell is done once all its chunks need has been given. The error shows the rows around
the cell where it goes wrong.
"""

from counterflow.errors import ScheduleError
from counterflow.schedule.relation import gives, needs
from counterflow.schedule.text import grid, word
from counterflow.schedule.transfers import transfers
from counterflow.schedule.words import Carried, Kind, Product, Schedule, StageId


def check(schedule: Schedule) -> Schedule:
    """The schedule, if it is sound.   Fails: ScheduleError that names the cell and shows it."""
    _check_cells(schedule)
    _check_stages(schedule)
    given = _check_given_once(schedule)
    _play(schedule, given)
    _check_left(schedule, given)
    transfers(schedule)
    return schedule


def _fail(schedule: Schedule, rank: int, position: int, what: str) -> ScheduleError:
    return ScheduleError(
        f"{schedule.name}, rank {rank}, cell {position}: {what}\n{grid(schedule, rank, position)}"
    )


def _check_cells(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.rows):
        for position, cell in enumerate(row):
            forward = [chunk for chunk in cell if chunk.kind is Kind.F]
            backward = [chunk for chunk in cell if chunk.kind in (Kind.B, Kind.I)]
            alone = len(cell) == 1
            if not alone and (len(cell) != 2 or len(forward) != 1 or len(backward) != 1):
                raise _fail(
                    schedule,
                    rank,
                    position,
                    "a cell is one chunk, or one forward and one backward that overlap.",
                )
            if not alone and forward[0].stage == backward[0].stage and forward[0].mb == backward[0].mb:
                raise _fail(schedule, rank, position, "a micro-batch cannot overlap with its own backward.")


def _check_stages(schedule: Schedule) -> None:
    """Each stage of each pipe on exactly one rank, and no index beyond the pipe's."""
    if not schedule.rank_of:
        raise ScheduleError(f"{schedule.name}: there is nothing to do; add chunks.")
    homes: dict[StageId, int] = {}
    for rank, position, chunk in schedule.chunks():
        if chunk.stage.index >= schedule.stages:
            last = schedule.stages - 1
            raise _fail(schedule, rank, position, f"stage {chunk.stage} is beyond the last, {last}.")
        if homes.setdefault(chunk.stage, rank) != rank:
            raise _fail(
                schedule,
                rank,
                position,
                f"stage {chunk.stage} is on rank {homes[chunk.stage]} too; keep it on one.",
            )
    for pipe in range(schedule.pipes):
        for index in range(schedule.stages):
            if StageId(pipe, index) not in homes:
                raise ScheduleError(
                    f"{schedule.name}: no rank has stage {StageId(pipe, index)}; add its chunks."
                )


def _check_given_once(schedule: Schedule) -> dict[Product, tuple[int, int]]:
    """Where each product is given."""
    given: dict[Product, tuple[int, int]] = {}
    for rank, position, chunk in schedule.chunks():
        for product in gives(chunk):
            if product in given:
                raise _fail(
                    schedule, rank, position, f"the {product} was given before, in cell {given[product][1]}."
                )
            given[product] = rank, position
    return given


def _play(schedule: Schedule, given: dict[Product, tuple[int, int]]) -> None:
    at, done, moved = [0] * schedule.ranks, set[Product](), True

    def missing(rank: int) -> list[Product]:
        cell = schedule.rows[rank][at[rank]]
        wanted = {product for chunk in cell for product in needs(chunk, schedule.stages)}
        return sorted(wanted - done)

    while moved:
        moved = False
        for rank, row in enumerate(schedule.rows):
            while at[rank] < len(row) and not missing(rank):
                done.update(product for chunk in row[at[rank]] for product in gives(chunk))
                at[rank] += 1
                moved = True
    stuck = [rank for rank, row in enumerate(schedule.rows) if at[rank] < len(row)]
    for rank in stuck:
        for product in missing(rank):
            if product not in given:
                raise _fail(schedule, rank, at[rank], f"it needs the {product}, which nothing gives.")
    if stuck:
        rank = stuck[0]
        product = missing(rank)[0]
        other, position = given[product]
        cell = word(schedule, other, schedule.rows[other][position])
        raise _fail(
            schedule,
            rank,
            at[rank],
            f"deadlock: it waits for the {product}, which rank {other} gives in {cell}, and that waits in turn.",
        )


def _check_left(schedule: Schedule, given: dict[Product, tuple[int, int]]) -> None:
    """All stages of a pipe do the same micro-batches; if any backward is there, all are, weights included."""
    training = any(product.what is not Carried.X for product in given)
    wanted = (Carried.X, Carried.DX, Carried.DW) if training else (Carried.X,)
    for pipe, microbatches in enumerate(schedule.microbatches):
        for index in range(schedule.stages):
            for mb in range(microbatches):
                for what in wanted:
                    product = Product(what, StageId(pipe, index), mb)
                    if product not in given:
                        raise ScheduleError(
                            f"{schedule.name}: nothing gives the {product}; what its forward keeps would stay for "
                            "ever: add the chunk, or take the micro-batch out."
                            if what is not Carried.X
                            else f"{schedule.name}: nothing gives the {product}: add F{mb} of that stage."
                        )
