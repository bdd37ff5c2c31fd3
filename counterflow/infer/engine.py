"""The engine: requests of any lengths in, tokens and text out, three calls a step.

`schedule` decides without a tensor who runs over what, `run` makes tokens, `take_back` hands them to their
sequences, cuts what lies behind a stop, and frees what has ended. One thread calls `step`; a server's other
threads put requests into a queue of their own. The model stays where its weights are and in their precision.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter

from counterflow.errors import ConfigError, RequestError
from counterflow.infer.batch import Batch, Work
from counterflow.infer.blocks import Blocks
from counterflow.infer.cache import Cache, power_of_two
from counterflow.infer.depth import Depth
from counterflow.infer.passes import Passes, graphs_for
from counterflow.infer.ranks import Ranks
from counterflow.infer.request import Delta, Sampling, Sequence, TokenLogprob
from counterflow.infer.run import Made, Outcome, Runner
from counterflow.infer.statistics import Statistics
from counterflow.infer.text import TextStream
from counterflow.model.transformer import Transformer

ALL = -1
LONGEST_WAIT = 1024
"""Hidden states that are kept for a module which does not draft; a text with more is written without it to its end."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of a step and of the cache, and how drafts are made."""

    max_sequences: int = 32
    """Sequences that run at once."""
    max_rows: int = 512
    """Positions of a step, all sequences and drafts together: longer prompts are run in chunks."""
    block_size: int = 64
    """Positions of a block of the cache: the GPU's kernel reads as many at once. Prompts share whole blocks."""
    cache_bytes: float = 2**30
    """At most so much for the cache; less if `max_sequences` of the longest texts need less."""
    positions: int = 0
    """Tokens of one text at most, prompt and all; 0: the model's positions."""
    drafts: int = ALL
    """Tokens drafted ahead by the MTP modules at most; 0: none, and no module is run. −1: one by each module. Beyond
    the modules the last one is used again."""
    modules: int = ALL
    """How many of the model's modules draft; −1: all, as far as `drafts` goes."""
    adapt: bool = True
    """Fewer or no drafts where measured times and acceptance say that they cost more than they bring."""
    graphs: bool = True
    """Replay decoding's passes as CUDA graphs where the model and its device allow it."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_rows", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("drafts", "modules"):
            if getattr(self, name) < ALL:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0, or −1 for all.")
        if self.positions < 0:
            raise ConfigError(f"positions is {self.positions}; it must be at least 1, or 0 for the model's.")
        if not self.cache_bytes > 0:
            raise ConfigError(f"cache_bytes is {self.cache_bytes}; it must be above 0.")


class Engine:
    """Runs requests together on one model; `bytes_of` gives a token's bytes, for stop strings and `Delta.text`.

    Where `ranks` share the model's experts, every rank has an engine of the same settings, and all step together.
    """

    def __init__(
        self,
        model: Transformer,
        settings: EngineSettings | None = None,
        bytes_of: Callable[[int], bytes] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        self.model, self.bytes_of, self.ranks = model, bytes_of, ranks or Ranks()
        drafts, self.modules = chain_of(len(model.mtp), settings)
        num_blocks = _num_blocks(model, settings, drafts, self.modules)
        self.blocks = Blocks(num_blocks, settings.block_size, lookahead=self.modules)
        self.depth = Depth(drafts, settings.adapt)
        rows = _step_rows(settings, drafts)
        self.batch = Batch(self.blocks, settings.max_sequences, rows, positions_of(model, settings))
        cache = Cache(model, num_blocks, settings.block_size, self.modules)
        graphs = graphs_for(model, settings.graphs)
        run = Passes(model, cache, graphs, 1 + drafts, settings.max_sequences * drafts)
        self.runner = Runner(run, self.modules, self.ranks, rows)
        self.statistics = Statistics()
        self._texts: dict[int, TextStream] = {}
        self._prompts: dict[int, list[TokenLogprob | None]] = {}
        self._numbers = 0
        self._wrote = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs here."""
        return not self.batch.running and not self.batch.waiting

    def finished(self) -> bool:
        """Whether nothing waits or runs on any rank; all ask it between the same steps."""
        return not self.ranks.most(not self.idle)

    def add(self, prompt: Items[int], sampling: Sampling, samples: int = 1) -> list[Sequence]:
        """Queue a request; its sequences, by which deltas name their text.   Fails: RequestError."""
        self.check(prompt, samples)
        sequences: list[Sequence] = []
        for index in range(samples):
            leader = sequences[0] if sequences else None
            number, self._numbers = self._numbers, self._numbers + 1
            sequences.append(
                Sequence(number, list(prompt), len(prompt), sampling, self.modules, index, leader)
            )
            self._texts[number] = TextStream(self.bytes_of, sampling.stop)
        self.batch.waiting.extend(sequences)
        self.statistics.requests += 1
        self.statistics.prompt_tokens += len(prompt) * samples
        return sequences

    def check(self, prompt: Items[int], samples: int) -> None:
        """Fails (RequestError) where a request is impossible; reads nothing that a step changes."""
        if not prompt:
            raise RequestError(
                "the prompt is empty; give at least one token (the end token begins a document).",
                param="prompt",
            )
        positions, vocab = self.batch.positions, self.model.config.vocab_size
        if len(prompt) > positions:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; a text has {positions} positions here: shorten the prompt.",
                "context_length_exceeded",
                "prompt",
            )
        foreign = next((token for token in prompt if not 0 <= token < vocab), None)
        if foreign is not None:
            raise RequestError(
                f"the prompt holds token {foreign}; tokens are numbers from 0 to {vocab - 1}.", param="prompt"
            )
        if samples < 1:
            raise RequestError(f"n is {samples}; it must be at least 1.", param="n")

    def forget(self) -> None:
        """Nothing was counted or measured: what was written so far was to make ready."""
        self.statistics, self.depth = Statistics(), Depth(self.depth.deepest, self.depth.adapt)

    def recordings(self, sequences: Items[int], greedy: Items[bool]) -> list[Callable[[], None]]:
        """What records the graphs of decoding beforehand, one by one: for so many sequences, their powers of two, and
        for texts of the likeliest tokens, for drawn ones, or both; and what compiles the kernels of passes that are not
        recorded. Empty where none is."""
        drafts, passes = self.depth.deepest, self.runner.passes
        sizes = sorted({power_of_two(count) for count in sequences})
        recordings = [
            one
            for size, choose in product(sizes, greedy)
            for one in passes.recordings(size, drafts, self.modules, choose)
        ]
        return recordings + passes.compilations()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now; nothing more is heard of it."""
        if sequence.finish is None:
            self._end(sequence, "abort")

    def step(self) -> list[Delta]:
        """One step, which all ranks take together; what it gave to whom here."""
        began = perf_counter()
        works = self.schedule()
        if not works and not self.ranks.several:
            return []
        outcome = self.run(works)
        deltas = self.take_back(works, outcome)
        self._time(works, outcome, perf_counter() - began)
        return deltas

    def schedule(self) -> list[Work]:
        """Who runs over what."""
        writing = [sequence for sequence in self.batch.running if sequence.decoding]
        free = [self._limit(sequence) for sequence in writing if not sequence.sampling.fixed_depth]
        chosen = self.depth.choose(len(writing), min(free)) if free else 0
        depth = self.ranks.most(chosen)
        load = min(self.batch.max_sequences, len(self.batch.running) + len(self.batch.waiting))
        needed = min(self.modules, self.depth.needed(max(load, 1)))

        def depth_of(sequence: Sequence) -> int:
            fixed = sequence.sampling.fixed_depth
            return self.depth.deepest if fixed else min(depth, self._limit(sequence))

        return self.batch.plan(depth_of, lambda s: self.modules if s.sampling.fixed_depth else needed)

    def _limit(self, sequence: Sequence) -> int:
        """The most drafts that a text's modules can make."""
        return self.depth.deepest if sequence.modules == self.modules else sequence.modules

    def run(self, works: list[Work]) -> Outcome:
        """Their tokens."""
        return self.runner.run(works)

    def take_back(self, works: list[Work], outcome: Outcome) -> list[Delta]:
        """Tokens to their sequences, up to where they stop; what has ended is freed."""
        self._count(works, outcome)
        return [self._hand(work, made) for work, made in zip(works, outcome.made, strict=True)]

    def _hand(self, work: Work, made: Made) -> Delta:
        sequence = work.sequence
        if sequence.made == 0 and sequence.sampling.prompt_logprobs:
            begun = self._prompts.setdefault(sequence.number, [])
            begun[sequence.cached - work.rows :] = made.prompt_logprobs
        stream, text, count, ended = self._texts[sequence.number], "", 0, 0
        finish = None if sequence.sampling.max_tokens or sequence.cached < len(sequence.tokens) else "length"
        for token in made.tokens:
            if token in sequence.sampling.stop_tokens:
                finish, ended = "stop", 1
                break
            sequence.tokens.append(token)
            count += 1
            text += stream.add(token)
            finish = self._finish(sequence, stream)
            if finish:
                break
        delta = Delta(sequence, tuple(made.tokens[:count]), text, tuple(made.logprobs[: count + ended]))
        self.statistics.tokens += count
        self._publish(sequence)
        if made.tokens or finish:
            delta = replace(delta, prompt_logprobs=self._prompt(sequence))
        if finish:
            rest = stream.end()
            finish = "stop" if stream.stopped else finish  # a stop string may end in what was held back
            delta = replace(delta, text=text + rest, finish=finish)
            self._end(sequence, finish)
        return delta

    def _publish(self, sequence: Sequence) -> None:
        """Let others find its blocks, and say which its modules have filled."""
        blocks, modules = sequence.blocks, sequence.modules
        self.blocks.publish(sequence.tokens, blocks, sequence.published, sequence.cached, modules)
        filled = min(len(sequence.published), sequence.final // self.blocks.size)
        if filled > sequence.filled:
            self.blocks.fill(blocks[sequence.filled : filled], modules)
            sequence.filled = filled
        # What one step reads may wait in any case: modules run over it in the next.
        sequence.forget(max(LONGEST_WAIT, self.batch.max_rows + self.blocks.size))

    def _finish(self, sequence: Sequence, stream: TextStream) -> str | None:
        if stream.stopped:
            return "stop"
        full = len(sequence.tokens) > self.batch.positions
        return "length" if full or sequence.made >= sequence.sampling.max_tokens else None

    def _prompt(self, sequence: Sequence) -> tuple[TokenLogprob | None, ...]:
        kept = self._prompts.pop(sequence.number, None)
        return () if kept is None else (None, *kept)

    def _end(self, sequence: Sequence, finish: str) -> None:
        sequence.finish = finish
        self.batch.remove(sequence)
        self._texts.pop(sequence.number)
        self._prompts.pop(sequence.number, None)

    def _count(self, works: list[Work], outcome: Outcome) -> None:
        """Tokens, steps and acceptance."""
        statistics = self.statistics
        statistics.steps += 1
        statistics.draft_s += outcome.draft_s
        statistics.model_s += outcome.model_s
        statistics.reused_tokens, statistics.preemptions = self.batch.reused, self.batch.preemptions
        turns = [
            (work.drafts, len(made.tokens) - 1) for work, made in zip(works, outcome.made) if made.tokens
        ]
        for drafted, kept in turns:
            statistics.count(drafted, kept)
        self.depth.count([drafted for drafted, _ in turns], [kept for _, kept in turns])

    def _time(self, works: list[Work], outcome: Outcome, step_s: float) -> None:
        """A step's seconds, where it and the one before only wrote and all wrote alike."""
        wrote = bool(works) and all(work.sequence.made and work.rows == 1 for work in works)
        depths = {work.drafts for work in works}
        if wrote and self._wrote and len(depths) == 1:
            self.depth.record(len(works), depths.pop(), step_s, outcome.steady)
        self._wrote = wrote


def chain_of(modules: int, settings: EngineSettings) -> tuple[int, int]:
    """(drafts at most, modules that make them) on a model with so many MTP modules."""
    wanted = modules if settings.modules == ALL else settings.modules
    drafts = wanted if settings.drafts == ALL else settings.drafts
    if drafts and not modules:
        raise ConfigError(f"drafts is {drafts}; the model has no MTP modules to draft with: set it to 0.")
    if wanted > modules or (drafts and not wanted):
        raise ConfigError(
            f"modules is {wanted} for {drafts} drafts; the model has {modules} MTP modules, and drafts need one "
            "at least."
        )
    return drafts, min(wanted, drafts)


def pass_rows(model: Transformer, settings: EngineSettings) -> int:
    """The most rows that an engine of these settings runs a layer over in one pass, of the trunk or of a module.

    A step's positions wait for a module beside less than a block of each sequence's that has waited since before, and
    what one module has run over waits for the next; a module runs over a sequence's drafts as well.
    """
    drafts, modules = chain_of(len(model.mtp), settings)
    waiting = modules * (settings.block_size - 1) + drafts if modules else 0
    return _step_rows(settings, drafts) + settings.max_sequences * waiting


def _step_rows(settings: EngineSettings, drafts: int) -> int:
    """Positions of a step: room for every sequence to write with all its drafts, at least."""
    return max(settings.max_rows, settings.max_sequences * (1 + drafts))


def positions_of(model: Transformer, settings: EngineSettings) -> int:
    """Of one text at most."""
    most = model.config.max_positions
    return min(settings.positions or most, most)


def held_by_cache(model: Transformer, settings: EngineSettings) -> int:
    """The positions that one text can have in a cache of `cache_bytes`; 0 or less where it holds none."""
    drafts, modules = chain_of(len(model.mtp), settings)
    blocks = int(min(settings.cache_bytes, 2**62) // _block_bytes(model, settings, modules))
    return blocks * settings.block_size - drafts


def with_room(model: Transformer, settings: EngineSettings, positions: int) -> EngineSettings:
    """The settings for texts of so many positions at most, and a cache that holds one of them at least."""
    limited = replace(settings, positions=min(max(1, positions), positions_of(model, settings)))
    drafts, modules = chain_of(len(model.mtp), limited)
    one = -(-(limited.positions + drafts) // limited.block_size) * _block_bytes(model, limited, modules)
    return replace(limited, cache_bytes=max(limited.cache_bytes, one))


def _block_bytes(model: Transformer, settings: EngineSettings, modules: int) -> int:
    config = model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return (config.num_layers + modules) * settings.block_size * width * model.head.element_size()


def _num_blocks(model: Transformer, settings: EngineSettings, drafts: int, modules: int) -> int:
    """Blocks for `max_sequences` of the longest texts, or as many as `cache_bytes` hold."""
    positions, block_bytes = positions_of(model, settings), _block_bytes(model, settings, modules)
    one, held = -(-(positions + drafts) // settings.block_size), held_by_cache(model, settings)
    if held < positions:
        shorter = f", or set positions to {held} or less" if held > 0 else ""
        raise ConfigError(
            f"cache_bytes is {settings.cache_bytes:g}; one text of {positions} tokens takes {one * block_bytes:,} "
            f"bytes: give the cache as much at least{shorter}."
        )
    return min((held + drafts) // settings.block_size, settings.max_sequences * one)
