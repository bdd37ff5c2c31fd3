"""The middle one of a step's three calls: what the schedule asks for, as passes of the model.

First the modules draft, then one pass of the trunk runs over prompts' chunks, last tokens and drafts alike, then
every sequence that reached its last token is given its next ones. Only numbers come back: which tokens, how many
drafts they kept, their log-probabilities.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.comm.clock import between, mark
from counterflow.infer import passes
from counterflow.infer.batch import Work
from counterflow.infer.cache import Extent
from counterflow.infer.distribution import distribution
from counterflow.infer.ranks import Ranks
from counterflow.infer.request import Sequence, TokenLogprob
from counterflow.infer.speculate import Drafter, greedy_verdict, verdict
from counterflow.infer.states import Row, rows_of, upload


@dataclass
class Made:
    """What a step made for one sequence."""

    tokens: list[int]
    """The drafts it kept and the token behind them; empty within its prompt."""
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob]
    """Of the prompt's tokens that follow the rows of this step."""


@dataclass
class Outcome:
    """What a step made, in the order of its works, and the seconds it took."""

    made: list[Made]
    draft_s: float
    model_s: float
    steady: bool = True
    """Whether nothing was recorded, no prompt read and no module caught up: the next such step takes as long."""


class Runner:
    """Runs a schedule's works by passes of a model over its cache; modules catch up over so many `rows` at a time."""

    def __init__(self, run: passes.Passes, modules: int, ranks: Ranks, rows: int) -> None:
        self.model, self.cache, self.passes = run.model, run.cache, run
        self.drafter = Drafter(run, modules, ranks, rows) if modules else None

    @torch.no_grad()
    def run(self, works: list[Work]) -> Outcome:
        """New tokens of every work that samples; the sequences' caches then reach to their last true token."""
        device, unsteady = self.model.head.device, self.passes.unsteady
        began = mark(device)
        uniforms = [_uniforms(work) for work in works]
        drafts, q = self._draft(works, uniforms)
        drafted = mark(device)
        h, starts, best = self._trunk(works, drafts)
        made = [Made([], [], []) for _ in works]
        self._sample(works, drafts, q, uniforms, h, starts, best, made)
        for work, start, result in zip(works, starts, made, strict=True):
            if work.sequence.sampling.prompt_logprobs and not work.sequence.made:
                result.prompt_logprobs = self._prompt(work, h[start : start + work.rows])
        for work, (states, first), result in zip(works, _first_states(works, h, starts), made, strict=True):
            advance(work.sequence, states, first, first + work.rows + max(0, len(result.tokens) - 1))
        steady = self.passes.unsteady == unsteady
        return Outcome(made, between(began, drafted), between(drafted, mark(device)), steady)

    def _draft(self, works: list[Work], uniforms: list[list[float]]) -> tuple[list[list[int]], Tensor | None]:
        if self.drafter is None:
            return [[] for _ in works], None
        wanted = [work.drafts for work in works]
        chain = self.drafter.draft([work.sequence for work in works], wanted, uniforms)
        return chain.tokens, chain.q

    def _trunk(self, works: list[Work], drafts: list[list[int]]) -> passes.Passed:
        """One pass over all rows; its likeliest tokens too, where nothing else of the head's is asked for."""
        extents, tokens = [], []
        for work, drafted in zip(works, drafts, strict=True):
            sequence, start = work.sequence, work.sequence.cached
            extents.append(Extent(start, start + work.rows + work.drafts, sequence.blocks))
            tokens.append(sequence.tokens[start : start + work.rows] + drafted)
        asked = (work.sequence.sampling for work in works if work.samples)
        greedy = all(not sampling.temperature and sampling.logprobs is None for sampling in asked)
        return self.passes.trunk(extents, tokens, choose=greedy)

    def _sample(
        self,
        works: list[Work],
        drafts: list[list[int]],
        q: Float[Tensor, "B K V"] | None,
        uniforms: list[list[float]],
        h: Float[Tensor, "T D"],
        starts: list[int],
        best: Int[Tensor, "T"] | None,
        made: list[Made],
    ) -> None:
        """The next tokens of the works that have reached their sequence's last one, into `made`."""
        chosen = [i for i, work in enumerate(works) if work.samples and work.sequence.sampling.max_tokens]
        if not chosen:
            return
        deepest = max(works[i].drafts for i in chosen)
        firsts = [starts[i] + works[i].rows - 1 for i in chosen]
        rows = [
            [first + min(k, works[i].drafts) for k in range(deepest + 1)] for i, first in zip(chosen, firsts)
        ]
        logits = None
        if best is not None:
            likeliest = best.tolist()
            drafts = self.passes.resolved(drafts)
            found = greedy_verdict([[likeliest[r] for r in row] for row in rows], [drafts[i] for i in chosen])
        else:
            asked = [row for some in rows for row in some]
            logits = passes.logits_of(self.model, h[upload(asked, h.device)])
            logits = logits.view(len(chosen), deepest + 1, -1)
            found = self._judged(works, drafts, q, uniforms, chosen, logits)
            drafts = self.passes.resolved(drafts)
        for row, (i, (keep, token)) in enumerate(zip(chosen, found, strict=True)):
            made[i].tokens = [*drafts[i][:keep], token]
            wanted = works[i].sequence.sampling.logprobs
            if wanted is not None and logits is not None:
                made[i].logprobs = logprobs(logits[row, : keep + 1], made[i].tokens, wanted)

    def _judged(
        self,
        works: list[Work],
        drafts: list[list[int]],
        q: Tensor | None,
        uniforms: list[list[float]],
        chosen: list[int],
        logits: Float[Tensor, "B K1 V"],
    ) -> list[tuple[int, int]]:
        """Drafts kept and the token behind them, of the chosen works; the drafts are still codes."""
        if not any(works[i].sequence.sampling.temperature for i in chosen):
            drafts = self.passes.resolved(drafts)
            return greedy_verdict(logits.argmax(-1).tolist(), [drafts[i] for i in chosen])
        deepest, device = logits.shape[1] - 1, logits.device
        p = distribution(logits, [works[i].sequence.sampling for i in chosen])
        missing = [[0] * (deepest - works[i].drafts) for i in chosen]
        codes = [code for i, none in zip(chosen, missing) for code in (*drafts[i], *none)]
        judging = [
            uniforms[i][works[i].drafts : -1] + [*none, uniforms[i][-1]] for i, none in zip(chosen, missing)
        ]
        numbers = [number for row in judging for number in row]
        kept, following = verdict(
            p,
            p[:, :0] if q is None else q[upload(chosen, device), :deepest],
            self.passes.drafted[-1 - upload(codes, device)].view(len(chosen), deepest),
            upload([works[i].drafts for i in chosen], device),
            upload(numbers, device, torch.float64).view(len(chosen), deepest + 1),
        )
        return list(zip(kept.tolist(), following.tolist(), strict=True))

    def _prompt(self, work: Work, h: Float[Tensor, "T D"]) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens that follow these rows."""
        following = work.sequence.tokens[work.sequence.cached + 1 : work.sequence.cached + work.rows + 1]
        logits = passes.logits_of(self.model, h[: len(following)])
        return logprobs(logits, following, work.sequence.sampling.logprobs or 0)


def _first_states(works: list[Work], h: Float[Tensor, "T D"], starts: list[int]) -> list[Row]:
    """Each work's first hidden state. In a pass over prompts those of texts that write are copied out: they may wait
    for a module over a thousand steps, and would keep all the prompts' beside them."""
    writing = [index for index, work in enumerate(works) if work.sequence.decoding and work.sequence.modules]
    firsts: list[Row] = [(h, start) for start in starts]
    if not writing or all(work.sequence.decoding for work in works):
        return firsts
    rows = [starts[i] + row for i in writing for row in range(works[i].rows + works[i].drafts)]
    copied, first = h[upload(rows, h.device)], 0
    for index in writing:
        firsts[index] = copied, first
        first += works[index].rows + works[index].drafts
    return firsts


def advance(sequence: Sequence, h: Float[Tensor, "T D"], start: int, end: int) -> None:
    """The main cache is true for these rows more; their hidden states wait for the first module."""
    sequence.cached += end - start
    if sequence.modules:
        sequence.waiting[0] += rows_of(h, start, end)


def _uniforms(work: Work) -> list[float]:
    """The numbers of one turn: one to draw each draft, one to judge each, one for the token behind them."""
    if not work.samples:
        return []
    return [work.sequence.generator.random() for _ in range(2 * work.drafts + 1)]


def logprobs(logits: Float[Tensor, "T V"], tokens: list[int], top: int) -> list[TokenLogprob]:
    """The model's own log-probabilities of one token a row, and the `top` likeliest beside it."""
    if not tokens:
        return []
    logs = torch.log_softmax(logits, dim=-1)
    chosen = logs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logs.topk(min(top, logits.shape[-1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, (ids, values) in zip(tokens, chosen, pairs, strict=True)
    ]
