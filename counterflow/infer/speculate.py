"""Drafts by the MTP modules, and the verdict on them that leaves the model's distribution as it is.

Module k merges the hidden state of position i with the embedding of token i + k and predicts token i + k + 1, so
the chain after n tokens is: every module in turn at position n − 2, each with one more drafted token. Behind the
last module the chain goes on with that module re-used: what it made at a position stands in for what the depth
before would have made at the next one.

A module's cache is true only as far as its tokens are: to position n − k. What a chain writes beyond is a
draft; the next chain begins at the first entry that is not true, with the hidden states that the verify pass has
made since, and writes over it. Those states wait, a row each, with their sequence (`Sequence.waiting`), so a
sequence may go without drafts for a while and its modules catch up when drafts are taken up again; within a prompt,
which others may share, a whole block of them is run over at once. A text without drafts so pays for no module: where
none is expected to draft its prompt is not run over either, and where too many states wait they are let go, and the
text goes on without (`Sequence.forget`). Not taken: running modules on every position as it comes, which costs the full
draft even when none is wanted.

A draft x from q is kept with probability min(1, p(x) / q(x)), else replaced by one from the positive part of
p − q; then what is given out is distributed as p. Keeping a draft because it is p's likeliest token is not that.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.infer import passes
from counterflow.infer.cache import NOBODY, Extent
from counterflow.infer.distribution import distribution, draw
from counterflow.infer.ranks import Ranks
from counterflow.infer.request import Sequence
from counterflow.infer.states import Row, gather, rows_of, upload


@dataclass
class Chain:
    """Drafts under way for the sequences of one step."""

    sequences: Items[Sequence]
    wanted: list[int]
    """Drafts for each sequence."""
    uniforms: list[list[float]]
    """A number for each draft."""
    tokens: list[list[int]]
    """Drafts so far, as codes of where the device keeps them."""
    q: Float[Tensor, "B K V"] | None
    """What each draft was drawn from, zero where there is none; None where all take the likeliest token."""
    ahead: dict[int, list[Row]] = field(default_factory=dict)
    """Hidden states of the newest depth at positions where they rest on drafts, by sequence."""
    newest: dict[int, Row] = field(default_factory=dict)
    """The hidden state that the newest draft was made from."""


class Drafter:
    """Fills the modules' caches and drafts with them. [§5.4.3]"""

    def __init__(self, run: passes.Passes, modules: int, ranks: Ranks, rows: int) -> None:
        self.passes, self.modules, self.ranks, self.rows = run, modules, ranks, rows
        self.model, self.cache = run.model, run.cache
        self.enough = min(run.cache.size, rows)
        """Positions that modules catch up by, in a text that waits or is in its prompt."""

    def draft(self, sequences: Items[Sequence], wanted: list[int], uniforms: list[list[float]]) -> Chain:
        """`wanted` drafts for each sequence, none where it is 0; the modules of those and of prompts catch up.

        All ranks run a module where one of them has rows for it.
        """
        deepest, q = max(wanted, default=0), None
        behind = any(self._behind(sequence, n) for sequence, n in zip(sequences, wanted, strict=True))
        doing = self.ranks.most(2 if behind else 1 if deepest else 0)
        if any(sequence.sampling.temperature for sequence in sequences):
            shape = (len(sequences), deepest, self.model.config.vocab_size)
            q = torch.zeros(shape, device=self.cache.entries.device)
        chain = Chain(sequences, wanted, uniforms, [[] for _ in sequences], q)
        if not doing:
            return chain
        if doing == 2:
            self._catch_up(chain)
        for depth in range(self.modules):
            spans = self._spans(chain, depth)
            if self.ranks.most(len(spans)):
                pieces, there = self._run(chain, depth, spans)
                self._choose(chain, depth, {i: piece[-1] for i, piece in pieces.items()}, there)
        for depth in range(self.modules, self.ranks.most(deepest)):
            self._run_again(chain, depth)
        return chain

    def _behind(self, sequence: Sequence, wanted: int) -> bool:
        """Whether enough waits for some module, of a text that drafts or is in its prompt."""
        most = max(map(len, sequence.waiting), default=0)
        return (wanted > 0 or not sequence.decoding) and most >= self.enough

    def _catch_up(self, chain: Chain) -> None:
        """Modules over what waits for them, but for less than `enough` of each sequence's, `rows` at a time."""
        for depth in range(self.modules):
            spans = self._waiting(chain, depth)
            while self.ranks.most(len(spans)):
                self._run(chain, depth, spans)
                spans = self._waiting(chain, depth)

    def _waiting(self, chain: Chain, depth: int) -> dict[int, tuple[int, int]]:
        """By sequence: where the next pass that catches up ends for this depth."""
        spans, left = {}, self.rows
        for index, (sequence, wanted) in enumerate(zip(chain.sequences, chain.wanted, strict=True)):
            if depth >= sequence.modules or not (wanted or not sequence.decoding):
                continue
            last = wanted > 0  # the position that a chain begins at is left to it
            count = min(left, self._true(sequence, depth) - last - sequence.valid[depth])
            if count >= self.enough:
                end = sequence.valid[depth] + count
                spans[index], left = (end, end), left - count
        return spans

    def _run(
        self, chain: Chain, depth: int, spans: dict[int, tuple[int, int]]
    ) -> tuple[dict[int, list[Row]], bool]:
        """One module over these spans: its hidden states by sequence, and whether drafts are chosen from them."""
        extents, inputs, tokens = [], [], []
        for index, (end, _) in spans.items():
            sequence = chain.sequences[index]
            start = sequence.valid[depth]
            inputs.append([*sequence.waiting[depth], *chain.ahead.get(index, ())][: end - start])
            tokens.append((sequence.tokens + chain.tokens[index])[start + depth + 1 : end + depth + 1])
            extents.append(Extent(start, end, sequence.blocks))
        pieces, chosen = self._pieces(chain, depth, list(spans), extents, inputs, tokens)
        for (index, (_, true)), given, piece in zip(spans.items(), inputs, pieces, strict=True):
            self._keep(chain, index, depth, true, given, piece)
        return dict(zip(spans, pieces, strict=True)), chosen

    def _spans(self, chain: Chain, depth: int) -> dict[int, tuple[int, int]]:
        """By sequence that drafts at this depth: the position where it ends now, and where its true entries will."""
        return {
            index: (sequence.cached, self._true(sequence, depth))
            for index, sequence in enumerate(chain.sequences)
            if chain.wanted[index] > depth
        }

    def _true(self, sequence: Sequence, depth: int) -> int:
        """Where a depth's true entries can end: n − k, as far as the depth before has come."""
        reached = sequence.valid[depth - 1] if depth else sequence.cached
        return max(sequence.valid[depth], min(reached, len(sequence.tokens) - depth - 1))

    def _keep(
        self, chain: Chain, index: int, depth: int, true: int, given: list[Row], piece: list[Row]
    ) -> None:
        """What waits for this depth and the next from now on, and what rests on drafts."""
        sequence = chain.sequences[index]
        reached = sequence.valid[depth - 1] if depth else sequence.cached
        count, left = true - sequence.valid[depth], reached - sequence.valid[depth]
        if len(given) < left:
            given = sequence.waiting[depth]
        sequence.waiting[depth] = given[count:left]
        if depth + 1 < sequence.modules:
            sequence.waiting[depth + 1] += piece[:count]
        chain.ahead.pop(index, None)
        if len(piece) > count:
            chain.ahead[index] = piece[count:]
        sequence.valid[depth] = true

    def _run_again(self, chain: Chain, depth: int) -> None:
        """The last module a position further on, its own hidden state for want of the depth before's."""
        beyond = depth - self.modules
        chosen = [index for index, wanted in enumerate(chain.wanted) if wanted > depth]
        extents = []
        for index in chosen:
            at = chain.sequences[index].cached + beyond
            extents.append(Extent(at, at + 1, chain.sequences[index].blocks))
        inputs = [[chain.newest[index]] for index in chosen]
        tokens = [chain.tokens[index][-1:] for index in chosen]
        pieces, there = self._pieces(chain, depth, chosen, extents, inputs, tokens)
        self._choose(chain, depth, {i: piece[0] for i, piece in zip(chosen, pieces, strict=True)}, there)

    def _pieces(
        self,
        chain: Chain,
        depth: int,
        indices: list[int],
        extents: list[Extent],
        inputs: list[list[Row]],
        tokens: list[list[int]],
    ) -> tuple[list[list[Row]], bool]:
        """A module's hidden states over these extents, in their order; whether drafts were chosen from them there."""
        keep = None
        if chain.q is None:
            keep = [self._place(chain, i, depth) if chain.wanted[i] > depth else NOBODY for i in indices]
        module = min(depth, self.modules - 1)
        out, starts, best = self.passes.module(module, extents, tokens, inputs, keep)
        pieces = [
            rows_of(out, start, start + len(given)) for start, given in zip(starts, inputs, strict=True)
        ]
        return pieces, best is not None

    def _place(self, chain: Chain, index: int, depth: int) -> int:
        """Of a draft among those that the device keeps."""
        return depth * len(chain.sequences) + index

    def _choose(self, chain: Chain, depth: int, hidden: dict[int, Row], there: bool) -> None:
        """The sequences' next draft from this depth's hidden states, where one is wanted and it is not `there` yet."""
        chosen = [index for index in hidden if chain.wanted[index] > depth]
        if not chosen:
            return
        chain.newest = {index: hidden[index] for index in chosen}
        places = [self._place(chain, index, depth) for index in chosen]
        if not there:
            logits = passes.logits_of(self.model, gather([hidden[index] for index in chosen]))
            drafted = (
                logits.argmax(-1) if chain.q is None else self._draw(chain, chain.q, depth, chosen, logits)
            )
            self.passes.drafted[upload(places, drafted.device)] = drafted
        for index, place in zip(chosen, places, strict=True):
            chain.tokens[index].append(-1 - place)

    def _draw(
        self, chain: Chain, q: Float[Tensor, "B K V"], depth: int, chosen: list[int], logits: Tensor
    ) -> Int[Tensor, "_"]:
        """A draft of each of the chosen, and what it was drawn from into `q`."""
        p = distribution(logits, [chain.sequences[index].sampling for index in chosen])
        q[upload(chosen, p.device), depth] = p
        uniform = [chain.uniforms[index][depth] for index in chosen]
        return draw(p, upload(uniform, p.device, torch.float64))


def greedy_verdict(best: list[list[int]], drafts: list[list[int]]) -> list[tuple[int, int]]:
    """`verdict` at temperature 0: drafts are kept while they are the likeliest tokens; the next of those follows."""
    kept = []
    for row, drafted in zip(best, drafts, strict=True):
        keep = next((k for k, token in enumerate(drafted) if token != row[k]), len(drafted))
        kept.append((keep, row[keep]))
    return kept


def verdict(
    p: Float[Tensor, "B K1 V"],
    q: Float[Tensor, "B K V"],
    drafts: Int[Tensor, "B K"],
    counts: Int[Tensor, "B"],
    uniforms: Float[Tensor, "B K1"],
) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """How many of each sequence's `counts` drafts are kept, and the token that follows them.

    `p` is the model's distribution before each draft and after the last, `q` the drafts' own and zero where there
    is none. The last column of `uniforms` draws the token that follows.
    """
    given = p[:, :-1].gather(-1, drafts[..., None])[..., 0]
    asked = q.gather(-1, drafts[..., None])[..., 0]
    real = torch.arange(drafts.shape[1], device=p.device) < counts[:, None]
    kept = ((uniforms[:, :-1] * asked < given) & real).long().cumprod(1).sum(1)
    each = torch.arange(len(p), device=p.device)
    following = p[each, kept]
    refused = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)[each, kept]
    rest = torch.where((kept < counts)[:, None], (following - refused).clamp_min(0), following)
    # p and q that differ by rounding alone leave nothing; then p itself is right to the last bit.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, following)
    return kept, draw(rest, uniforms[:, -1])
