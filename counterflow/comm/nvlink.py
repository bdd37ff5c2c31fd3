"""Dispatch over NVLink by our own kernels: rows pushed once to each rank, straight into the place where they are read.

What ranks exchange they write into each other's memory; the kernels run in a lane of their own, on a set number of
multiprocessors, and need no word from the host: counts are exchanged on the device, and every sender finds there where
its rows belong. The host asks for the counts when what came is waited for, since what is kept for backward follows the
rows that arrived: they are copied out of the arena, those that never left their rank gathered between them, and the
room is given back. By then the counts have long been there.

Each of a layer's four transfers has its region, so that one is read while the next is filled. A region has room for the
worst routing, or for `Terms.room` rows, and what exceeds that is an error on every rank alike. `copy_engine` fills the
same regions by copies between devices, which no multiprocessor moves; the host must then know the sizes and waits for
them before it issues a copy.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.comm.clock import mark
from counterflow.comm.dispatch import Arrived, Pending, Route, Terms
from counterflow.comm.lane import Lane, Mark, wait
from counterflow.comm.peers import Peers
from counterflow.comm.traffic import Traffic
from counterflow.comm.wire import Region, Wire
from counterflow.errors import ConfigError
from counterflow.kernels.fp8 import dequantise, quantise

MULTIPROCESSORS = 8
"""For a push, where nothing is set: as many as fill an NVLink of an H200."""


@dataclass(frozen=True)
class Way:
    """How rows came: enough for the way back and for the backwards of both."""

    tokens: Int[Tensor, "W T"]
    """The tokens of each destination."""
    slots: Int[Tensor, "T W"]
    """The place of each token among those of a destination; −1: it does not go there."""
    matrix: Int[Tensor, "W W"]
    """Rows from each rank to each."""
    counts: tuple[tuple[int, ...], ...] = ()
    """The same, once the host knows them."""


@dataclass(frozen=True)
class Pushed(Arrived):
    """What arrived, and the way it came."""

    way: Way


class Nvlink:
    """A dispatcher over one arena, which is made with the first call; with `copy` its rows go by the copy engine."""

    def __init__(self, peers: Peers, terms: Terms, copy: bool = False) -> None:
        self.exchange, self.terms, self.copy = peers.whole, terms, copy
        self.ranks, self.index = peers.whole.size, peers.whole.index
        self.each = terms.experts // self.ranks
        self.moved = Traffic()
        self.repeats = 1
        """Times that every transfer's rows travel; a benchmark makes a link slower by more."""
        self._opened: tuple[Wire, Lane] | None = None

    def dispatch(self, x: Float[Tensor, "T D"], route: Route) -> Pending[Pushed]:
        """Each row once to every rank that holds one of its experts."""
        wire, lane = self._open(x, route.ids.shape[1])
        rows, route = self._packed(x), Route(route.ids.contiguous(), route.gates.float().contiguous())
        with lane.issue():
            tokens, slots, sent = wire.lay_out(route.ids, self.each)
            matrix, host = wire.share_counts(sent)
            counted, way = lane.mark(), Way(tokens, slots, matrix)
            if self.copy:
                way = self._known(way, host, counted)
            self._send(Region.DISPATCH, rows, way, route)
            sent_all = lane.mark()

        def finish() -> Pushed:
            known = self._known(way, host, counted)
            self._arrive(Region.DISPATCH, sent_all)
            came = self._between(Region.DISPATCH, x, known)
            ids, gates = self._route_of(known, route)
            wire.give_room(Region.DISPATCH)
            self._count(_away(known.counts[self.index], self.index), rows, 8 * ids.shape[1])
            return Pushed(came, ids, gates, known)

        return Pending(finish)

    def combine(
        self, y: Float[Tensor, "A D"], arrived: Arrived, into: Float[Tensor, "T D"]
    ) -> Pending[Float[Tensor, "T D"]]:
        """into + the sum of each token's rows, in fp32 and in the order of ranks, rounded once."""
        wire, way, y, into = self._wire(), _way(arrived), y.contiguous(), into.contiguous()
        sent = self._home(Region.COMBINE, y, way)

        def finish() -> Tensor:
            self._arrive(Region.COMBINE, sent)
            box = wire.rows_of(Region.COMBINE, y.shape[1], y.dtype)
            out = wire.gather_sum(y, box, way.slots, way.matrix, into)
            wire.give_room(Region.COMBINE)
            return out

        return Pending(finish)

    def combine_backward(self, dout: Float[Tensor, "T D"], arrived: Arrived) -> Pending[Float[Tensor, "A D"]]:
        """The output's gradient by the way the rows came."""
        wire, lane = self._open(dout, 0)
        way, rows = _way(arrived), self._packed(dout)
        with lane.issue():
            self._send(Region.COMBINE_BACKWARD, rows, way)
            sent = lane.mark()
        self._count(_away(way.counts[self.index], self.index), rows)

        def finish() -> Tensor:
            self._arrive(Region.COMBINE_BACKWARD, sent)
            came = self._between(Region.COMBINE_BACKWARD, dout, way)
            wire.give_room(Region.COMBINE_BACKWARD)
            return came

        return Pending(finish)

    def dispatch_backward(
        self, drows: Float[Tensor, "A D"], dgates: Float[Tensor, "A K"], arrived: Arrived
    ) -> Pending[tuple[Float[Tensor, "T D"], Float[Tensor, "T K"]]]:
        """The tokens' gradients, summed as in combine, and their gates', each of which one rank has."""
        wire, way, region = self._wire(), _way(arrived), Region.DISPATCH_BACKWARD
        drows, gates = drows.contiguous(), dgates.float().contiguous()
        sent = self._home(region, drows, way, gates)

        def finish() -> tuple[Tensor, Tensor]:
            self._arrive(region, sent)
            box = wire.rows_of(region, drows.shape[1], drows.dtype)
            dx = wire.gather_sum(drows, box, way.slots, way.matrix)
            box = wire.meta_of(region, gates.shape[1], torch.float32, wire.rows)
            dg = wire.gather_sum(gates, box, way.slots, way.matrix)
            wire.give_room(region)
            return dx, dg.to(dgates.dtype)

        return Pending(finish)

    def transport(self, x: Float[Tensor, "T D"], arrived: Arrived) -> Pending[None]:
        """Only the way out: rows of `x` to where they are read, and not read there. For benchmarks."""
        wire, lane, way = self._wire(), self._open(x, 0)[1], _way(arrived)
        with lane.issue():
            self._send(Region.COMBINE_BACKWARD, self._packed(x), way)
            sent = lane.mark()
        return Pending(lambda: self._pass_over(wire, Region.COMBINE_BACKWARD, sent))

    def transport_home(self, y: Float[Tensor, "A D"], arrived: Arrived) -> Pending[None]:
        """Only the way home, the same."""
        wire, sent = self._wire(), self._home(Region.COMBINE, y.contiguous(), _way(arrived))
        return Pending(lambda: self._pass_over(wire, Region.COMBINE, sent))

    def traffic(self) -> list[Traffic]:
        """What moved since this was last asked."""
        if self._opened:
            self._wire().check()
        found, self.moved = self.moved, Traffic()
        return [found]

    def _open(self, x: Tensor, top: int) -> tuple[Wire, Lane]:
        """The arena, made by all ranks in their first call."""
        if self._opened is None:
            tokens = max(self.exchange.counts([max(self.terms.tokens, len(x))] * self.ranks))
            rows = self.terms.room or max(self.ranks - 1, 1) * tokens
            row_bytes = max(x.shape[1] * x.element_size(), self._packed(x[:0]).shape[1] * self.terms.fp8)
            wire = Wire(self.exchange, rows, rows + tokens, row_bytes, 2 * top, x.device)
            self._opened = wire, Lane(x.device)
        return self._opened

    def _wire(self) -> Wire:
        assert self._opened is not None, "what comes back went out before"
        return self._opened[0]

    def _packed(self, x: Tensor) -> Tensor:
        return quantise(x) if self.terms.fp8 else x.contiguous()

    def _known(self, way: Way, host: Tensor, counted: Mark) -> Way:
        """The way with its counts, once the host has them; the same error on all ranks where there is no room."""
        if way.counts:
            return way
        if counted is not None:
            counted.synchronize()
        wire = self._wire()
        wire.check()
        counts = tuple(tuple(row) for row in host.tolist())
        for rank in range(self.ranks):
            column = [row[rank] for row in counts]
            most = max(
                _away(column, rank), _away(counts[rank], rank), sum(column) + wire.rows - wire.meta_rows
            )
            if most > wire.rows:
                error = ConfigError(
                    f"{most} rows were to cross to or from rank {rank} of those that share experts, and there is room "
                    f"for {wire.rows}; raise parallel.dispatch_room, or leave it 0 for the worst case."
                )
                error.shared = True
                raise error
        return replace(way, counts=counts)

    def _send(self, region: Region, rows: Tensor, way: Way, route: Route | None = None) -> None:
        """Out to the ranks of the experts."""
        wire, ids, gates = self._wire(), route and route.ids, route and route.gates
        if not self.copy:
            for again in reversed(range(self.repeats)):
                wire.push(
                    region,
                    rows,
                    way.tokens,
                    way.matrix,
                    self._programs(),
                    False,
                    ids,
                    gates,
                    self.each,
                    not again,
                )
            return
        parts = [rows[:0]] * self.ranks
        for rank, count in enumerate(way.counts[self.index]):
            if rank != self.index:
                parts[rank] = rows.index_select(0, way.tokens[rank, :count])
        if route is not None:  # ids and gates, a hundredth of the bytes, go by kernel
            nothing = rows.new_empty(len(rows), 0)
            wire.push(region, nothing, way.tokens, way.matrix, 1, False, ids, gates, self.each, signal=False)
        wire.copy(region, parts, [self._place(way, rank) for rank in range(self.ranks)], self.repeats)

    def _home(self, region: Region, rows: Tensor, way: Way, gates: Tensor | None = None) -> Mark:
        """Back to the ranks of the tokens."""
        wire, lane = self._open(rows, 0)
        column = [row[self.index] for row in way.counts]
        with lane.issue():
            if not self.copy:
                for again in reversed(range(self.repeats)):
                    wire.push(
                        region,
                        rows,
                        way.tokens,
                        way.matrix,
                        self._programs(),
                        True,
                        gates=gates,
                        signal=not again,
                    )
            else:
                if gates is not None:
                    nothing = rows.new_empty(len(rows), 0)
                    wire.push(region, nothing, way.tokens, way.matrix, 1, True, gates=gates, signal=False)
                parts = list(rows.split(column))
                parts[self.index] = rows[:0]
                places = [self._place_home(way, rank) for rank in range(self.ranks)]
                wire.copy(region, parts, places, self.repeats)
            sent = lane.mark()
        self._count(_away(column, self.index), rows, 4 * gates.shape[1] if gates is not None else 0)
        return sent

    def _programs(self) -> int:
        return self.terms.multiprocessors or MULTIPROCESSORS

    def _place(self, way: Way, to: int) -> int:
        """Where this rank's rows begin in another's region."""
        return sum(way.counts[rank][to] for rank in range(self.index) if rank != to)

    def _place_home(self, way: Way, to: int) -> int:
        """The same on the way home."""
        return sum(way.counts[to][rank] for rank in range(self.index) if rank != to)

    def _arrive(self, region: Region, sent: Mark) -> None:
        """The rows of all ranks are here, and this rank's have left, so that their memory may be used again."""
        start = mark(self._wire().bases.device)
        self._wire().arrive(region)
        wait(sent)
        self.moved.waits.append((start, mark(self._wire().bases.device)))

    def _pass_over(self, wire: Wire, region: Region, sent: Mark) -> None:
        self._arrive(region, sent)
        wire.give_room(region)

    def _between(self, region: Region, x: Tensor, way: Way) -> Tensor:
        """The rows that arrived, out of the arena: by source, those of this rank from `x`."""
        wire, column = self._wire(), [row[self.index] for row in way.counts]
        before, here, after = sum(column[: self.index]), column[self.index], sum(column[self.index + 1 :])
        out = x.new_empty(before + here + after, x.shape[1])
        first, own, last = out.split([before, here, after])
        tokens = way.tokens[self.index, :here]
        if not self.terms.fp8:
            box = wire.rows_of(region, x.shape[1], x.dtype, before + after)
            first.copy_(box[:before])
            last.copy_(box[before:])
            torch.index_select(x, 0, tokens, out=own)
            return out
        box = wire.rows_of(region, self._packed(x[:0]).shape[1], torch.uint8, before + after)
        for packed, rows in ((box[:before], first), (quantise(x[tokens]), own), (box[before:], last)):
            dequantise(packed, x.shape[1], x.dtype, rows)
        return out

    def _route_of(self, way: Way, route: Route) -> tuple[Tensor, Tensor]:
        """Local ids and gates of the rows that arrived."""
        count, top = sum(row[self.index] for row in way.counts), route.ids.shape[1]
        ids = self._wire().meta_of(Region.DISPATCH, 2 * top, torch.int32, count)[:, :top]
        gates = self._wire().meta_of(Region.DISPATCH, 2 * top, torch.float32, count)[:, top:]
        return ids.to(route.ids.dtype), gates.clone()

    def _count(self, away: int, rows: Tensor, more: int = 0) -> None:
        self.moved.rows += away
        self.moved.bytes += away * (rows.shape[1] * rows.element_size() + more)


def nvlink(peers: Peers, terms: Terms) -> Nvlink:
    """By kernels."""
    return Nvlink(peers, terms)


def copy_engine(peers: Peers, terms: Terms) -> Nvlink:
    """By copies between devices."""
    return Nvlink(peers, terms, copy=True)


def _away(counts: tuple[int, ...] | list[int], home: int) -> int:
    return sum(counts) - counts[home]


def _way(arrived: Arrived) -> Way:
    assert isinstance(arrived, Pushed), "what was pushed comes back to who pushed it"
    return arrived.way
