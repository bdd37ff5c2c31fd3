"""The kernels of the `nvlink` dispatch, in Triton: rows pushed into the memory of other ranks, no word to the host.

Every rank has an arena at the same offsets; `bases` are the addresses of all ranks' arenas. Turns are counted for each
region: whoever fills it raises `ready` at the receiver, whoever has read it gives `free` to all senders, and a
kernel that needs either spins until it is there, or until its patience ends: then it notes its trouble and goes on, and
the host makes an error of it. Turns only grow and are kept on the device, so that nothing is reset and a captured graph
may be replayed.

Signals: all threads store, the program's barrier orders them, and one thread's release at system scope tells; the
reader's acquire and a barrier give the same order there. Under Triton's interpreter there is nobody to wait for inside
a kernel, so what it needs must be there.
"""

from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import globaltimer  # pyright: ignore[reportMissingImports]

PHASES = ("", "counts of rows", "room for rows", "rows")
"""What a kernel may wait for, as `trouble` numbers it."""
MANY = tl.constexpr(64)
"""Rows whose ids and gates go at once."""


@triton.jit
@no_type_check
def lay_out(ids, tokens, slots, sent, T, K: tl.constexpr, ranks: tl.constexpr, each, block: tl.constexpr):
    """One program a destination: which tokens it gets, in their order, each token's place among them, how many."""
    to = tl.program_id(0)
    count = 0
    for first in range(0, T, block):
        token = first + tl.arange(0, block)
        hit = tl.zeros((block,), tl.int32)
        for k in tl.static_range(K):
            expert = tl.load(ids + token * K + k, mask=token < T, other=-1).to(tl.int32)
            hit = hit | ((expert >= to * each) & (expert < to * each + each)).to(tl.int32)
        place = count + tl.cumsum(hit, 0) - 1
        tl.store(tokens + to * T + place, token, mask=hit > 0)
        tl.store(slots + token * ranks + to, tl.where(hit > 0, place, -1), mask=token < T)
        count += tl.sum(hit, 0)
    tl.store(sent + to, count)


@triton.jit
@no_type_check
def exchange(
    sent, bases, at_matrix, at_flags, turns, matrix, host, trouble, me,
    tell: tl.constexpr, take: tl.constexpr, ranks: tl.constexpr, wide: tl.constexpr, patience: tl.constexpr,
):  # fmt: skip
    """Every rank's counts to every rank: `matrix[source, destination]`, here and in the host's memory.

    The table is double: a rank may be one exchange ahead of another that still reads. Both halves, `tell` and `take`,
    are one launch on a GPU.
    """
    turn = tl.load(turns) + 1
    table = at_matrix + (turn % 2) * (ranks * ranks * 4)
    column = tl.arange(0, wide)
    if tell:
        counts = tl.load(sent + column, mask=column < ranks, other=0)
        for rank in tl.static_range(ranks):
            row = _int32(bases, rank, table) + me * ranks
            tl.store(row + column, counts, mask=column < ranks)
        tl.debug_barrier()
        for rank in tl.static_range(ranks):
            _signal(_int32(bases, rank, at_flags) + me, turn)
    if take:
        for rank in tl.static_range(ranks):
            _await(_int32(bases, me, at_flags) + rank, turn, trouble, 1, rank, patience)
        tl.debug_barrier()
        for rank in tl.static_range(ranks):
            at = _int32(bases, me, table) + rank * ranks + column
            row = tl.load(at, mask=column < ranks, volatile=True)
            tl.store(matrix + rank * ranks + column, row, mask=column < ranks)
            tl.store(host + rank * ranks + column, row, mask=column < ranks)
        tl.store(turns, turn)


@triton.jit
@no_type_check
def push(
    rows, tokens, ids, gates, matrix, bases, at_rows, at_meta, at_flags, turns, done, trouble,
    me, T, room, meta_room, stride, meta_stride, each,
    words: tl.constexpr, block: tl.constexpr, tile: tl.constexpr, size: tl.constexpr, K: tl.constexpr,
    wide: tl.constexpr, home: tl.constexpr, meta: tl.constexpr, signal: tl.constexpr, ranks: tl.constexpr,
    patience: tl.constexpr,
):  # fmt: skip
    """Rows to the ranks where they belong, each into its final place; a set number of programs, each row by one.

    Outward, each destination's tokens; `home`, the arrived rows of each source. With `meta` their ids and gates go too,
    or the gates' gradients. A region lacks its own rank's rows, not their ids and gates. Without `signal` more follows.
    """
    pid, programs, turn = tl.program_id(0), tl.num_programs(0), tl.load(turns) + 1
    word: tl.constexpr = tl.int32 if size == 4 else tl.int8
    for rank in tl.static_range(ranks):
        _await(_int32(bases, me, at_flags) + ranks + rank, turn - 1, trouble, 2, rank, patience)
    tl.debug_barrier()
    for ahead in tl.static_range(ranks):
        to = (me + ahead) % ranks
        count, start, place, meta_place = _span(matrix, me, to, ranks, home)
        there, meta_there = _word(bases, to, at_rows, word), _int32(bases, to, at_meta)
        for first in range(pid * tile, tl.where(to == me, 0, count), programs * tile):
            j = first + tl.arange(0, tile)
            here = (j < count) & (place + j < room)
            row = start + j if home else tl.load(tokens + to * T + j, mask=here, other=0)
            _copy(rows, there, row, place + j, here, stride, words, block, word)
        if meta:
            for first in range(pid * MANY, tl.where(home & (to == me), 0, count), programs * MANY):
                j = first + tl.arange(0, MANY)
                here = (j < count) & (meta_place + j < meta_room)
                if home:
                    _gates(gates, meta_there, start + j, meta_place + j, here, meta_stride, K, wide)
                else:
                    row = tl.load(tokens + to * T + j, mask=here, other=0)
                    _route(ids, gates, meta_there, row, meta_place + j, here, to, each, meta_stride, K, wide)
    if signal:
        tl.debug_barrier()
        if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(done, 0)
            _tell(bases, at_flags + me * 4, turns, turn, ranks)


@triton.jit
@no_type_check
def await_room(bases, at_flags, turns, trouble, me, ranks: tl.constexpr, patience: tl.constexpr):
    """Until every receiver has read the region's last rows: before a copy that is not a kernel."""
    turn = tl.load(turns) + 1
    for rank in tl.static_range(ranks):
        _await(_int32(bases, me, at_flags) + ranks + rank, turn - 1, trouble, 2, rank, patience)


@triton.jit
@no_type_check
def tell_rows(bases, at_flags, turns, me, ranks: tl.constexpr):
    """The rows are there: after a copy that is not a kernel."""
    _tell(bases, at_flags + me * 4, turns, tl.load(turns) + 1, ranks)


@triton.jit
@no_type_check
def await_rows(bases, at_flags, turns, trouble, me, ranks: tl.constexpr, patience: tl.constexpr):
    """Until all ranks' rows are here."""
    turn = tl.load(turns) + 1
    for rank in tl.static_range(ranks):
        _await(_int32(bases, me, at_flags) + rank, turn, trouble, 3, rank, patience)
    tl.store(turns, turn)


@triton.jit
@no_type_check
def give_room(bases, at_flags, turns, me, ranks: tl.constexpr):
    """The region has been read: all ranks may fill it again."""
    _tell(bases, at_flags + (ranks + me) * 4, turns, tl.load(turns) + 1, ranks)


@triton.jit
@no_type_check
def gather_sum(
    into, own, box, slots, matrix, out, me, width, has_into: tl.constexpr,
    ranks: tl.constexpr, block: tl.constexpr, total: tl.constexpr,
):  # fmt: skip
    """One token a program: into + its rows from all ranks, in the order of ranks, in fp32, rounded once."""
    token = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here = column < width
    at = token.to(tl.int64) * width + column
    sum = tl.zeros((block,), total)
    if has_into:
        sum += tl.load(into + at, mask=here, other=0.0).to(total)
    place = 0
    for rank in tl.static_range(ranks):
        slot = tl.load(slots + token * ranks + rank)
        if slot >= 0:
            if rank == me:
                first = 0
                for source in tl.static_range(ranks):
                    first += tl.where(source < me, tl.load(matrix + source * ranks + me), 0)
                value = tl.load(own + (first + slot).to(tl.int64) * width + column, mask=here, other=0.0)
            else:
                value = tl.load(box + (place + slot).to(tl.int64) * width + column, mask=here, other=0.0)
            sum += value.to(total)
        place += tl.where(rank == me, 0, tl.load(matrix + me * ranks + rank))
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _span(matrix, me, to, ranks: tl.constexpr, home: tl.constexpr):
    """Rows to send to a rank, the first of them here, its place in the region there, its place with those at home."""
    start, place, whole = 0, 0, 0
    if home:  # the gates' gradients lie as the rows do
        count = tl.load(matrix + to * ranks + me)
        for rank in tl.static_range(ranks):
            start += tl.where(rank < to, tl.load(matrix + rank * ranks + me), 0)
            theirs = tl.load(matrix + to * ranks + rank)
            place += tl.where((rank < me) & (rank != to), theirs, 0)
        whole = place
    else:
        count = tl.load(matrix + me * ranks + to)
        for rank in tl.static_range(ranks):
            theirs = tl.load(matrix + rank * ranks + to)
            place += tl.where((rank < me) & (rank != to), theirs, 0)
            whole += tl.where(rank < me, theirs, 0)
    return count, start, place, whole


@triton.jit
@no_type_check
def _copy(
    rows, there, row, place, here, stride, words: tl.constexpr, block: tl.constexpr, word: tl.constexpr
):
    """Some rows at once, so that many loads are under way, in the widest words that they are made of."""
    mine = (rows + row.to(tl.int64) * stride).to(tl.pointer_type(word))
    theirs = there + place.to(tl.int64) * words
    if word == tl.int32:
        mine, theirs = tl.multiple_of(mine, 16), tl.multiple_of(theirs, 16)
    for first in tl.static_range(0, words, block):
        at = first + tl.arange(0, block)
        mask = here[:, None] & (at < words)[None, :]
        tl.store(theirs[:, None] + at[None, :], tl.load(mine[:, None] + at[None, :], mask=mask), mask=mask)


@triton.jit
@no_type_check
def _route(
    ids, gates, there, row, place, here, to, each, stride, K: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """Some rows' experts on the destination, −1 for those of others, and their gates as bits."""
    k = tl.arange(0, wide)[None, :]
    mask = here[:, None] & (k < K)
    expert = tl.load(ids + row[:, None] * K + k, mask=mask, other=-1).to(tl.int32)
    gate = tl.load(gates + row[:, None] * K + k, mask=mask, other=0.0)
    mine = (expert >= to * each) & (expert < to * each + each)
    at = there + place[:, None] * stride + k
    tl.store(at, tl.where(mine, expert - to * each, -1), mask=mask)
    tl.store(at + K, tl.where(mine, gate, 0.0).to(tl.int32, bitcast=True), mask=mask)


@triton.jit
@no_type_check
def _gates(gates, there, row, place, here, stride, K: tl.constexpr, wide: tl.constexpr):
    """Some rows' gradients of their gates, as bits."""
    k = tl.arange(0, wide)[None, :]
    mask = here[:, None] & (k < K)
    gate = tl.load(gates + row[:, None] * K + k, mask=mask, other=0.0)
    tl.store(there + place[:, None] * stride + k, gate.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
@no_type_check
def _int32(bases, rank, offset):
    """A place in a rank's arena."""
    return (tl.load(bases + rank) + offset).to(tl.pointer_type(tl.int32))


@triton.jit
@no_type_check
def _word(bases, rank, offset, word: tl.constexpr):
    return (tl.load(bases + rank) + offset).to(tl.pointer_type(word))


@triton.jit
@no_type_check
def _tell(bases, at_flag, turns, turn, ranks: tl.constexpr):
    """A turn has come to its end: every rank's flag says so."""
    tl.store(turns, turn)
    for rank in tl.static_range(ranks):
        _signal(_int32(bases, rank, at_flag), turn)


@triton.jit
@no_type_check
def _signal(flag, turn):
    tl.atomic_xchg(flag, turn, sem="release", scope="sys")


@triton.jit
@no_type_check
def _await(flag, turn, trouble, phase, rank, patience: tl.constexpr):
    """Until a flag has come to a turn; not at all once there is trouble."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if patience == 0:
        if seen < turn:
            _complain(trouble, phase, rank, turn)
    else:
        if seen < turn:
            end = globaltimer() + patience
            if tl.load(trouble, volatile=True) != 0:
                end = globaltimer()
            while (seen < turn) & (globaltimer() < end):
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            if seen < turn:
                _complain(trouble, phase, rank, turn)


@triton.jit
@no_type_check
def _complain(trouble, phase, rank, turn):
    """To the host, in its own memory; of several complaints one stays."""
    tl.store(trouble + 1, rank)
    tl.store(trouble + 2, turn)
    tl.store(trouble, phase)
