"""The paged cache of latents, and the rows of one pass that read and write it.

A token costs C + R numbers a layer (576 at 671B) instead of N (H + R + V): the normalised latent and the
turned rotary key, from which all heads' keys and values can be grown again. MTP modules have layers of their
own at the end. Entries are never moved: a pass names for every row the slot that it writes and for every
sequence the blocks that it reads, so a rejected draft is cut off by forgetting it; the next pass writes over
it.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from counterflow.model.transformer import Transformer

SHORT = 16
"""Rows of a sequence up to which sequences are put side by side in one padded product; longer ones stand alone."""
LEAST_BLOCKS, RUNG = 32, 4
"""Blocks of the smallest bucket, and how many times as many the next has. A program of the kernel that has nothing to
read ends at once, so a bucket that is too large costs little; and each is recorded for every batch size."""


@dataclass(frozen=True)
class Extent:
    """The positions of one sequence that a pass runs over, and the blocks that hold it."""

    start: int
    end: int
    blocks: list[int]


@dataclass(frozen=True)
class Group:
    """Sequences whose queries are padded to one length and attend together."""

    rows: slice
    """Which rows of the pass."""
    places: Int[Tensor, "T"]
    """Where each of them stands in the padded (B, S), unless that is full."""
    positions: Int[Tensor, "B S"]
    """Of the padded queries; 0 where there is none."""
    blocks: Int[Tensor, "B _"]
    """Blocks of each sequence, as far as the longest reaches at least, filled up with any."""
    keys: int
    """Positions of the longest sequence."""
    is_full: bool
    """Whether no query is padded, so that rows lie as they are."""


@dataclass(frozen=True)
class Rows:
    """Rows of several sequences laid end to end: what one pass runs over."""

    order: list[int]
    """The sequences, by index, in the order in which their rows lie."""
    starts: list[int]
    """The first row of each sequence, by index."""
    rope: Complex[Tensor, "T R2"]
    slots: Int[Tensor, "T"]
    groups: list[Group]

    def __len__(self) -> int:
        return len(self.slots)


NOBODY = -1
"""Where a token is kept that nobody asks for: the last place."""


@dataclass(frozen=True)
class Bucket:
    """The sizes of an even pass: every sequence has as many rows, and as many blocks to read, as the largest."""

    sequences: int
    queries: int
    """Rows of each."""
    blocks: int
    """Of each."""


def bucket_of(extents: Items[Extent], size: int, longest: int, few: bool = False) -> Bucket | None:
    """The bucket of a decoding pass: sequences filled up to powers of two, blocks to those of four, so that few buckets
    are met; with `few`, rows to powers of two as well.

    None where some sequence has more than the `longest` rows of decoding, or there are no sequences.
    """
    queries = max((extent.end - extent.start for extent in extents), default=0)
    if not 0 < queries <= min(longest, SHORT):
        return None
    blocks = max(-(-extent.end // size) for extent in extents)
    return Bucket(power_of_two(len(extents)), power_of_two(queries) if few else queries, rung(blocks))


def rung(blocks: int) -> int:
    """Blocks of the bucket that so many fit into."""
    found = LEAST_BLOCKS
    while found < blocks:
        found *= RUNG
    return found


def power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()


class Cache:
    """Entries of every layer and module: `num_blocks` blocks of `size` positions, and one more that nobody reads,
    for the rows that fill up an even pass."""

    def __init__(self, model: Transformer, num_blocks: int, size: int, modules: int) -> None:
        config = model.config
        self.size = size
        self.rope = model.rope
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        self.spare = num_blocks
        self.entries = model.head.new_zeros(config.num_layers + modules, (num_blocks + 1) * size, self.width)

    def rows(self, extents: Items[Extent]) -> Rows:
        """The rows of these extents: short ones first and in one group, the others each in its own."""
        order = sorted(range(len(extents)), key=lambda i: extents[i].end - extents[i].start > SHORT)
        starts, positions, slots, groups = [0] * len(extents), [], [], []
        together: list[Extent] = []
        for index in order:
            extent = extents[index]
            starts[index] = len(positions)
            positions += range(extent.start, extent.end)
            slots += [
                extent.blocks[p // self.size] * self.size + p % self.size for p in positions[starts[index] :]
            ]
            if extent.end - extent.start > SHORT:
                groups.append(self._group([extent], starts[index]))
            else:
                together.append(extent)
        if together:
            groups.insert(0, self._group(together, 0))
        device = self.entries.device
        at, to = (torch.tensor(each, dtype=torch.long, device=device) for each in (positions, slots))
        return Rows(order, starts, self.rope[at], to, groups)

    def packed(
        self, extents: Items[Extent], tokens: Items[list[int]], bucket: Bucket, keep: Items[int] = ()
    ) -> list[int]:
        """All that an even pass is told, as one row of numbers: tokens, positions, slots of its rows, where the token
        that follows each is kept, then blocks.

        A row that only fills up writes into the spare block and stands at position 0; `keep` is of each extent's last
        row, and what follows the others is kept for nobody.
        """
        rows = bucket.sequences * bucket.queries
        numbers = [0] * (2 * rows) + [self.spare * self.size] * rows + [NOBODY] * rows
        blocks = [self.spare] * (bucket.sequences * bucket.blocks)
        for index, (extent, own) in enumerate(zip(extents, tokens, strict=True)):
            first, span = index * bucket.queries, range(extent.start, extent.end)
            slots = [extent.blocks[p // self.size] * self.size + p % self.size for p in span]
            for start, values in ((0, own), (rows, span), (2 * rows, slots)):
                numbers[start + first : start + first + len(span)] = values
            if keep:
                numbers[3 * rows + first + len(span) - 1] = keep[index]
            held = extent.blocks[: bucket.blocks]
            blocks[index * bucket.blocks : index * bucket.blocks + len(held)] = held
        return numbers + blocks

    def even_rows(
        self, numbers: Int[Tensor, "_"], bucket: Bucket
    ) -> tuple[Int[Tensor, "T"], Rows, Int[Tensor, "T"]]:
        """The tokens, the rows and where what follows is kept, as `packed` says; nothing is read on the host."""
        rows = bucket.sequences * bucket.queries
        tokens, positions, slots, keep, blocks = numbers.split(
            [rows] * 4 + [bucket.sequences * bucket.blocks]
        )
        group = Group(
            slice(0, rows),
            torch.empty(0, dtype=torch.long, device=numbers.device),
            positions.view(bucket.sequences, bucket.queries),
            blocks.view(bucket.sequences, bucket.blocks),
            bucket.blocks * self.size,
            is_full=True,
        )
        starts = list(range(0, rows, bucket.queries))
        return tokens, Rows(list(range(bucket.sequences)), starts, self.rope[positions], slots, [group]), keep

    def _group(self, extents: list[Extent], first: int) -> Group:
        lengths = [extent.end - extent.start for extent in extents]
        longest, keys = max(lengths), max(extent.end for extent in extents)
        needed = -(-keys // self.size)
        places = [b * longest + s for b, length in enumerate(lengths) for s in range(length)]
        positions = [[*range(e.start, e.end), *[0] * (longest - (e.end - e.start))] for e in extents]
        device = self.entries.device
        if (
            device.type == "cuda" and self.entries.dtype == torch.bfloat16
        ):  # as even passes: few kernels are met
            needed = rung(needed)
        blocks = [(extent.blocks + [0] * needed)[:needed] for extent in extents]
        return Group(
            slice(first, first + sum(lengths)),
            torch.tensor(places, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(blocks, device=device),
            keys,
            len(places) == len(extents) * longest,
        )

    def seen(self, layer: int, group: Group) -> Float[Tensor, "B S C"]:
        """Entries of the group's sequences from position 0 on, as far as the longest reaches."""
        paged = self.entries[layer].view(-1, self.size, self.width)
        needed = -(-group.keys // self.size)
        return paged[group.blocks[:, :needed]].flatten(1, 2)[:, : group.keys]
