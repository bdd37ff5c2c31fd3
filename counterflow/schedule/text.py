"""A schedule as text that people write and read: one line a rank, one word a cell.

    dualpipe, 2 stages
    0 1': F0 F0' F1 B0' F1'&B0 …

The first line names the schedule and the stages of one pipe; each row begins with the stages that its rank holds. A
chunk is its kind and micro-batch, a prime for the reverse pipe; where a rank holds several stages of one pipe, `@` and
the stage follow. Overlapping chunks are joined by `&`. Lines that begin with `#` are left out. PyTorch pipelining's
CSV (`2F0`, `1B3`, `(0F1;1B2)OVERLAP_F_B`) is read and written too, where it can say the same: it knows one pipe.
"""

import re
from collections.abc import Iterable, Sequence

from counterflow.errors import ScheduleError
from counterflow.schedule.words import Cell, Chunk, Kind, Schedule, StageId

WORD = re.compile(r"([FBIW])([0-9]{1,6})('?)(?:@([0-9]{1,6}))?")
ACTION = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
ARROW = "<--"


def to_text(schedule: Schedule) -> str:
    """The whole schedule; `from_text` reads it back as it was."""
    lines = [f"{schedule.name}, {schedule.stages} stages"]
    for rank, row in enumerate(schedule.rows):
        held = " ".join(map(str, schedule.held(rank)))
        lines.append(f"{held}: " + " ".join(word(schedule, rank, cell) for cell in row))
    return "\n".join(lines) + "\n"


def word(schedule: Schedule, rank: int, cell: Cell) -> str:
    """A cell as its rank's row has it."""
    pipes = [stage.pipe for stage in schedule.held(rank)]
    return "&".join(
        f"{chunk}@{chunk.stage.index}" if pipes.count(chunk.stage.pipe) > 1 else str(chunk) for chunk in cell
    )


def from_text(text: str) -> Schedule:
    """The schedule that a text says.   Fails: ScheduleError naming line and word; `check` judges what it means."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ScheduleError("the schedule is empty; its first line is 'NAME, N stages'.")
    head = re.fullmatch(r"(.+), ([0-9]{1,6}) stages?", lines[0][1])
    if head is None:
        raise ScheduleError(
            f"line {lines[0][0]}: '{lines[0][1][:60]}'; the first line must be 'NAME, N stages'."
        )
    rows = [_row(number, line) for number, line in lines[1:]]
    if not rows:
        raise ScheduleError("the schedule has no rows; each is 'STAGES: CELL CELL …', one a rank.")
    return Schedule(head[1], int(head[2]), tuple(rows))


def _row(number: int, line: str) -> tuple[Cell, ...]:
    holds, colon, cells = line.partition(":")
    stages = []
    for name in holds.split():
        match = re.fullmatch(r"([0-9]{1,6})('?)", name)
        if match is None:
            raise ScheduleError(f"line {number}: '{name}' is no stage; write 3, or 3' for the reverse pipe.")
        stages.append(StageId(len(match[2]), int(match[1])))
    if not colon or not stages:
        raise ScheduleError(
            f"line {number}: a row begins with the stages its rank holds, as in '0 7': F0 F1'."
        )
    return tuple(tuple(_chunk(number, part, stages) for part in cell.split("&")) for cell in cells.split())


def _chunk(number: int, part: str, stages: Sequence[StageId]) -> Chunk:
    match = WORD.fullmatch(part)
    if match is None:
        raise ScheduleError(
            f"line {number}: '{part}' is no chunk; write F3, B3, I3 or W3, then ' and @stage."
        )
    pipe = len(match[3])
    fitting = [s for s in stages if s.pipe == pipe and match[4] in (None, str(s.index))]
    if len(fitting) != 1:
        held = " ".join(map(str, stages))
        said = f"no stage of pipe {pipe} fits" if not fitting else "several stages fit: add @stage"
        raise ScheduleError(f"line {number}: '{part}' on a rank that holds {held}; {said}.")
    return Chunk(Kind(match[1]), fitting[0], int(match[2]))


def to_csv(schedule: Schedule) -> str:
    """PyTorch pipelining's compute-only CSV.   Fails: ScheduleError where a second pipe cannot be said."""
    if schedule.pipes > 1:
        raise ScheduleError(
            f"{schedule.name} feeds both ends, and PyTorch's CSV knows one pipe; write it as text, or take a schedule "
            "of one pipe."
        )
    return "".join(",".join(_action(cell) for cell in row) + "\n" for row in schedule.rows)


def _action(cell: Cell) -> str:
    actions = [f"{chunk.stage.index}{chunk.kind}{chunk.mb}" for chunk in cell]
    return actions[0] if len(actions) == 1 else f"({';'.join(actions)})OVERLAP_F_B"


def from_csv(text: str, name: str = "csv") -> Schedule:
    """A schedule from PyTorch pipelining's compute-only CSV.   Fails: ScheduleError naming row and action."""
    rows = []
    for rank, line in enumerate(line for line in text.splitlines() if line.strip()):
        rows.append(
            tuple(_from_actions(rank, action.strip()) for action in line.split(",") if action.strip())
        )
    schedule = Schedule(name, 0, tuple(rows))
    return Schedule(name, 1 + max((s.index for s in schedule.rank_of), default=-1), schedule.rows)


def _from_actions(rank: int, text: str) -> Cell:
    overlap = OVERLAP.fullmatch(text)
    actions = overlap[1].split(";") if overlap else [text]
    cell = []
    for action in actions:
        match = ACTION.fullmatch(action.strip())
        if match is None:
            raise ScheduleError(
                f"row {rank}: '{action}' is no action of the compute-only form; write 2F0, 1B3, 0I1 or 0W1, "
                "without sends, receives and shards."
            )
        cell.append(Chunk(Kind(match[2]), StageId(0, int(match[1])), int(match[3])))
    return tuple(cell)


def grid(schedule: Schedule, rank: int, position: int, around: int = 4) -> str:
    """The rows around a cell, with an arrow at it: what an error shows."""
    start = max(0, position - around)
    lines = []
    for other in range(max(0, rank - 2), min(schedule.ranks, rank + 3)):
        cells = [word(schedule, other, cell) for cell in schedule.rows[other]]
        shown = " ".join(
            _marked(cells[start : position + around + 1], position - start if other == rank else -1)
        )
        before, after = "… " * (start > 0), " …" * (len(cells) > position + around + 1)
        lines.append(f"  rank {other}: {before}{shown}{after}{f'  {ARROW}' if other == rank else ''}")
    return "\n".join(lines)


def _marked(words: Iterable[str], place: int) -> list[str]:
    return [f">{word}<" if index == place else word for index, word in enumerate(words)]
