"""Decoding's attention in Triton: the blocks are read where they lie, each once for a tile of heads.

A sequence's keys are split among programs, so that few long sequences fill the device as well as many short ones; a
second small kernel joins the splits by their log-sum-exp. Where a tile's entries lie is looked up one tile ahead: an
address that waits for a load of its own turn is not read ahead, and the kernel then waits for every tile.

Triton compiles a kernel again where a number becomes 1 or a multiple of 16. Numbers that change from pass to pass are
kept out of that: a text would wait for it while it is written, and the machine code would be no better.
"""

import math
from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS = 64
"""Most query rows (queries × heads) of one program."""


def decode(
    query: Tensor, entries: Tensor, blocks: Tensor, positions: Tensor, size: int, latent: int, scale: float
) -> Tensor:
    """As `decode.decode_attention`, in bf16 on a GPU; Triton's interpreter runs it on a CPU."""
    batch, queries, heads, width = query.shape
    rows = queries * heads
    tile = min(ROWS, max(16, triton.next_power_of_2(rows)))
    programs = batch * triton.cdiv(rows, tile)
    longest = blocks.shape[1] * size
    device = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
    keys, warps, stages, shared = (CHOSEN if device and device.major == HOPPER else ELSEWHERE)[tile]
    places = shared * (device.multi_processor_count if device else INTERPRETED)
    splits = splits_of(programs, longest, places)
    part = torch.empty(batch, splits, rows, latent, device=query.device, dtype=torch.float32)
    lse = torch.empty(batch, splits, rows, device=query.device, dtype=torch.float32)
    out = torch.empty(batch, rows, latent, device=query.device, dtype=query.dtype)
    query, positions = query.reshape(batch, rows, width), positions.contiguous()
    _split[(triton.cdiv(rows, tile), batch, splits)](  # pyright: ignore[reportIndexIssue]
        query, entries, blocks, positions, part, lse,
        rows, heads, queries, blocks.stride(0), scale * math.log2(math.e), splits,
        size=size, latent=latent, rotary=width - latent,
        pad=max(16, triton.next_power_of_2(width - latent)), tile=tile, keys=keys,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    some, many = min(latent, JOINED), triton.next_power_of_2(splits)
    _join[(rows, batch, latent // some)](  # pyright: ignore[reportIndexIssue]
        part, lse, out, rows, splits, latent=latent, some=some, many=many
    )
    return out.view(batch, queries, heads, latent)


CHOSEN = {16: (64, 8, 3, 1), 32: (32, 4, 3, 2), 64: (64, 8, 2, 1)}
"""By rows of a tile: keys read at once, warps, stages, programs that share a multiprocessor. Of a sweep on an H200
(`records/2026-12-01-decode-attention`); at 64 rows the products bind, and Triton's reach 28 % of the device's."""
ELSEWHERE = {16: (32, 4, 2, 2), 32: (32, 4, 2, 2), 64: (64, 8, 2, 1)}
"""The same where a multiprocessor may have less shared memory than a Hopper's: one buffer. Not measured."""
HOPPER = 9
"""Compute capability."""
INTERPRETED = 16
"""Multiprocessors where there are none: enough for several splits."""
LEAST_KEYS, MOST_SPLITS = 128, 128
"""Keys of a split, and splits of a sequence."""
JOINED = 128
"""Numbers of a row that a program joins: with more, many splits of them do not fit into its registers."""


def splits_of(programs: int, longest: int, places: int) -> int:
    """In how many parts a sequence's keys are read: as many as the device has places for at once, and no program more,
    since one that is left over takes as long as all; each with some tiles to read."""
    return max(1, min(places // programs, longest // LEAST_KEYS, MOST_SPLITS))


@triton.jit
@no_type_check
def _block_of(table, k, stop, size: tl.constexpr, keys: tl.constexpr):
    """The blocks of the entries from k on: one number where one block holds them all."""
    if size % keys == 0:
        block = tl.load(table + k // size, mask=k < stop, other=0)
    else:
        key = k + tl.arange(0, keys)
        block = tl.load(table + key // size, mask=key < stop, other=0)
    return block


@triton.jit
@no_type_check
def _fold(q, qr, value, turned, seen, scale, best, total, mean):
    """The running softmax and mean with some more entries taken in."""
    score = tl.dot(q, value.T)
    score = tl.dot(qr, turned.T, score) * scale
    score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(score - safe[:, None])
    fade = tl.exp2(best - safe)
    mean = tl.dot(p.to(value.dtype), value, mean * fade[:, None])
    return higher, total * fade + tl.sum(p, 1), mean


@triton.jit(do_not_specialize=["rows", "queries", "stride", "splits"])
@no_type_check
def _split(
    query, entries, blocks, positions, part, lse,
    rows, heads, queries, stride, scale, splits,
    size: tl.constexpr, latent: tl.constexpr, rotary: tl.constexpr, pad: tl.constexpr,
    tile: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """A tile of query rows over one split of a sequence's keys: the mean of values, and the log2 of the sum."""
    first, b, split = tl.program_id(0) * tile, tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = latent + rotary
    row = first + tl.arange(0, tile)
    here = row < rows
    c, r = tl.arange(0, latent), tl.arange(0, pad)
    own = query + (b * rows + row)[:, None] * width
    q = tl.load(own + c[None, :], mask=here[:, None], other=0.0)
    qr = tl.load(own + latent + r[None, :], mask=here[:, None] & (r < rotary)[None, :], other=0.0)
    last = tl.load(positions + b * queries + row // heads, mask=here, other=-1)
    end = tl.max(last, 0) + 1
    each = tl.cdiv(tl.cdiv(end, splits), keys) * keys
    start, stop = split * each, tl.minimum(end, (split + 1) * each)
    best = tl.full([tile], float("-inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    mean = tl.zeros([tile, latent], tl.float32)
    table = blocks + b * stride
    block = _block_of(table, start, stop, size, keys)
    for k in range(start, stop, keys):
        key = k + tl.arange(0, keys)
        there = key < stop
        slot = (block * size + key % size).to(tl.int64)
        block = _block_of(table, k + keys, stop, size, keys)
        at = entries + slot[:, None] * width
        value = tl.load(at + c[None, :], mask=there[:, None], other=0.0)
        turned = tl.load(at + latent + r[None, :], mask=there[:, None] & (r < rotary)[None, :], other=0.0)
        seen = there[None, :] & (key[None, :] <= last[:, None])
        best, total, mean = _fold(q, qr, value, turned, seen, scale, best, total, mean)
    place = (b * splits + split) * rows + row
    none = total == 0.0
    mean = mean / tl.where(none, 1.0, total)[:, None]
    tl.store(part + place[:, None] * latent + c[None, :], mean, mask=here[:, None])
    tl.store(lse + place, tl.where(none, float("-inf"), best + tl.log2(total)), mask=here)


@triton.jit(do_not_specialize=["rows", "splits"])
@no_type_check
def _join(
    part, lse, out, rows, splits, latent: tl.constexpr, some: tl.constexpr, many: tl.constexpr
):  # fmt: skip
    """Some numbers of one query row's splits, weighted by their sums."""
    row, b = tl.program_id(0), tl.program_id(1)
    s, c = tl.arange(0, many), tl.program_id(2) * some + tl.arange(0, some)
    place = (b * splits + s) * rows + row
    sums = tl.load(lse + place, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(sums - tl.max(sums, 0))
    mean = tl.load(part + place[:, None] * latent + c[None, :], mask=(s < splits)[:, None], other=0.0)
    joined = tl.sum(mean * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (b * rows + row) * latent + c, joined.to(out.dtype.element_ty))
