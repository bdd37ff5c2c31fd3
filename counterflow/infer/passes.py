"""Passes of the model over rows of a cache: the trunk's, and one MTP module's. The layers are the model's own.

Rows of several sequences are laid end to end, as they are. Where passes are recorded as graphs (`graphs.py`), those of
decoding are laid evenly instead: as many rows for each sequence, filled up to a bucket, so that few shapes are met.

Drafts stay on the device until they are judged: on the host such a token is a code, −1 − its place in
`Passes.drafted`, until `resolved`. An even pass reads them there, and can choose the likeliest token behind each row
too, so that a chain of drafts and the pass that verifies them are issued without a word from the device.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.infer.attend import attend
from counterflow.infer.cache import (
    LEAST_BLOCKS,
    NOBODY,
    RUNG,
    Bucket,
    Cache,
    Extent,
    Rows,
    bucket_of,
    power_of_two,
)
from counterflow.infer.graphs import Graphs, hindrance
from counterflow.infer.states import Row, gather, upload
from counterflow.model.layer import Context, Layer
from counterflow.model.mtp import MtpModule
from counterflow.model.transformer import Transformer

log = logging.getLogger(__name__)


class Passed(NamedTuple):
    """What a pass gave."""

    h: Float[Tensor, "T D"]
    """Hidden states after the last norm."""
    starts: list[int]
    """Where each extent's begin."""
    best: Int[Tensor, "T"] | None
    """The likeliest token behind each row, where that was asked for and the pass was an even one."""


class Passes:
    """A model's passes over one cache. Those in which no sequence has more rows than decoding, `longest` in the trunk
    and one more with each module, are replayed from `graphs`, if given; `places` is how many tokens they can keep on
    the device."""

    def __init__(
        self, model: Transformer, cache: Cache, graphs: Graphs | None, longest: int, places: int = 0
    ) -> None:
        self.model, self.cache, self.graphs, self.longest = model, cache, graphs, longest
        self._longer = 0
        self.drafted = torch.zeros(places + 1, dtype=torch.long, device=model.head.device)
        """Drafts, by their places; the last is nobody's."""

    @property
    def unsteady(self) -> int:
        """Passes so far that were longer than decoding's, or were recorded."""
        return self._longer + (self.graphs.count if self.graphs else 0)

    def trunk(self, extents: Items[Extent], tokens: Items[list[int]], choose: bool = False) -> Passed:
        """The whole model but its head; `choose` asks for the likeliest tokens."""
        return self._run(0, self._trunk, extents, tokens, None, [NOBODY] * len(extents) if choose else None)

    def module(
        self,
        depth: int,
        extents: Items[Extent],
        tokens: Items[list[int]],
        hidden: Items[list[Row]],
        keep: list[int] | None = None,
    ) -> Passed:
        """MTP depth `depth` (from 0); `hidden` are the depth before's states, extent by extent. With `keep` an even
        pass puts the token that is likeliest behind each extent's last row into that place of `drafted`."""
        act = partial(self._module, depth)
        return self._run(1 + depth, act, extents, tokens, hidden, keep)

    def resolved(self, tokens: Items[list[int]]) -> list[list[int]]:
        """The same with the tokens that are codes; waits for the device if there are any."""
        if all(token >= 0 for some in tokens for token in some):
            return list(tokens)
        drafted = self.drafted.tolist()
        return [[drafted[-1 - token] if token < 0 else token for token in some] for some in tokens]

    def _run(
        self,
        name: int,
        act: Callable[..., Tensor],
        extents: Items[Extent],
        tokens: Items[list[int]],
        hidden: Items[list[Row]] | None,
        keep: list[int] | None,
    ) -> Passed:
        device = self.cache.entries.device
        longest = self.longest + max(0, name - 1)
        self._longer += any(extent.end - extent.start > longest for extent in extents)
        bucket = self.graphs and bucket_of(extents, self.cache.size, longest, few=hidden is not None)
        if not self.graphs or not bucket:
            rows, tokens = self.cache.rows(extents), self.resolved(tokens)
            given = [token for i in rows.order for token in tokens[i]]
            flat = torch.tensor(given, dtype=torch.long, device=device)
            states = [] if hidden is None else [self._joined([row for i in rows.order for row in hidden[i]])]
            return Passed(act(flat, rows, *states), rows.starts, None)
        numbers = upload(self.cache.packed(extents, tokens, bucket, keep or ()), device)
        states = [] if hidden is None else [gather(even(hidden, bucket))]
        h, *best = self._replay(self.graphs, name, act, bucket, keep is not None, numbers, *states)
        return Passed(h, [index * bucket.queries for index in range(len(extents))], best[0] if best else None)

    def recordings(self, sequences: int, drafts: int, modules: int, choose: bool) -> list[Callable[[], None]]:
        """What records, one by one, all graphs that so many sequences, drafts at most and modules can need, if there
        are graphs; `choose` as their passes will ask for it."""
        made: list[Callable[[], None]] = []
        if not self.graphs:
            return made
        blocks = self._rungs()
        for number, rows in product(blocks, range(1, drafts + 2)):
            made.append(partial(self._record, 0, Bucket(sequences, rows, number), choose))
        for depth, number in product(range(modules), blocks):
            powers = range(power_of_two(1 + drafts + depth).bit_length())
            made += [
                partial(self._record, 1 + depth, Bucket(sequences, 1 << i, number), choose) for i in powers
            ]
        return made

    def compilations(self) -> list[Callable[[], None]]:
        """What compiles, one by one, the kernels of passes that are not recorded but meet few rows of a long text, as
        those of modules that catch up do, if there are graphs."""
        if not self.graphs:
            return []
        sizes = [1 << power for power in range(self.cache.size.bit_length())]
        return [partial(self._plain, number, size) for number, size in product(self._rungs(), sizes)]

    @torch.no_grad()
    def _plain(self, blocks: int, rows: int) -> None:
        """The trunk, not recorded, over the last rows of nobody's text that reaches through so many blocks."""
        end = min(blocks * self.cache.size, len(self.cache.rope))
        extent = Extent(max(0, end - rows), end, [self.cache.spare] * blocks)
        laid = self.cache.rows([extent])
        self._trunk(torch.zeros(len(laid), dtype=torch.long, device=self.drafted.device), laid)

    def _rungs(self) -> list[int]:
        """Blocks of all buckets."""
        blocks, most = [LEAST_BLOCKS], -(-len(self.cache.rope) // self.cache.size)
        while blocks[-1] < most:
            blocks.append(blocks[-1] * RUNG)
        return blocks

    @torch.no_grad()
    def _record(self, name: int, bucket: Bucket, choose: bool) -> None:
        """One graph, by a pass over rows of nobody."""
        assert self.graphs, "a list of recordings is of graphs"
        act = self._trunk if not name else partial(self._module, name - 1)
        device, width = self.cache.entries.device, self.model.config.hidden_size
        numbers = upload(self.cache.packed((), (), bucket), device)
        rows = bucket.sequences * bucket.queries
        states = [self.model.head.new_zeros(rows, width)] if name else []
        self._replay(self.graphs, name, act, bucket, choose, numbers, *states)

    def _replay(
        self,
        graphs: Graphs,
        name: int,
        act: Callable[..., Tensor],
        bucket: Bucket,
        choose: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        return graphs.run((name, bucket, choose), partial(self._even, act, bucket, choose), *inputs)

    def _trunk(self, flat: Tensor, rows: Rows) -> Tensor:
        return run_trunk(self.model, flat, rows, self.cache)

    def _module(self, depth: int, flat: Tensor, rows: Rows, states: Tensor) -> Tensor:
        return run_module(self.model, depth, states, flat, rows, self.cache)

    def _joined(self, rows: list[Row]) -> Float[Tensor, "T D"]:
        return gather(rows) if rows else self.model.head.new_empty(0, self.model.config.hidden_size)

    def _even(
        self,
        act: Callable[..., Tensor],
        bucket: Bucket,
        choose: bool,
        numbers: Int[Tensor, "_"],
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        tokens, rows, keep = self.cache.even_rows(numbers, bucket)
        tokens = torch.where(tokens < 0, self.drafted[(-1 - tokens).clamp_min(0)], tokens)
        h = act(tokens, rows, *states)
        if not choose:
            return (h,)
        best = logits_of(self.model, h).argmax(-1)
        self.drafted[keep] = best
        return h, best


def even(hidden: Items[list[Row]], bucket: Bucket) -> list[Row | None]:
    """Each sequence's rows at its place of the bucket, None beside them."""
    filled = [[*rows, *[None] * (bucket.queries - len(rows))] for rows in hidden]
    return [row for rows in filled for row in rows] + [None] * (
        (bucket.sequences - len(filled)) * bucket.queries
    )


def graphs_for(model: Transformer, wanted: bool) -> Graphs | None:
    """Room for graphs, or None where they are not wanted or, which is logged, not possible."""
    why = hindrance(model)
    if wanted and why:
        log.info("decoding runs without CUDA graphs: %s.", why)
    return Graphs() if wanted and not why else None


def run_trunk(model: Transformer, tokens: Int[Tensor, "T"], rows: Rows, cache: Cache) -> Float[Tensor, "T D"]:
    """Hidden states after the final norm, each row at its position of its sequence."""
    h = model.embed(tokens)
    for index, layer in enumerate(model.layers):
        h = _run_layer(model, layer, h, rows, cache, index)
    return model.norm(h)


def run_module(
    model: Transformer,
    depth: int,
    hidden: Float[Tensor, "T D"],
    tokens: Int[Tensor, "T"],
    rows: Rows,
    cache: Cache,
) -> Float[Tensor, "T D"]:
    """Hidden states of MTP depth `depth` (from 0) after the module's norm.

    `hidden` is the depth before's at the rows' positions, `tokens` those that stand depth + 1 further on.
    """
    module = model.mtp[depth]
    assert isinstance(module, MtpModule), "a depth is an MTP module"
    h = module.merge(hidden, model.embed(tokens), None)
    h = _run_layer(model, module.layer, h, rows, cache, model.config.num_layers + depth)
    return module.norm(h)


def logits_of(model: Transformer, h: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
    """The head's logits in fp32."""
    return (h @ model.head.t()).float()


def _run_layer(
    model: Transformer, layer: torch.nn.Module, h: Tensor, rows: Rows, cache: Cache, index: int
) -> Float[Tensor, "T D"]:
    assert isinstance(layer, Layer), "the trunk is made of layers"
    context = Context(1, rows.rope, model.dispatcher, sequence_scale=0.0)
    if len(h):  # a rank without rows has no attention, but experts for the others' tokens
        h = h + attend(layer.attention, layer.attn_norm(h), rows, cache, index)
    return layer.combine(layer.mlp(layer.dispatch(layer.feed(h, context)))).h
