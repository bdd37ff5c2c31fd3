"""What is asked of the engine, and a sequence on its way: its tokens, its place in the caches, its randomness.

Nothing here computes. A request for n samples is n sequences of one prompt; all but the first wait until the
first has been through its prompt, and then share its blocks.
"""

import random
from dataclasses import dataclass, field

from counterflow.errors import RequestError
from counterflow.infer.states import Row


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen and when they end."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """The fewest likeliest tokens that hold this share of the probability are drawn from."""
    top_k: int = 0
    """At most so many likeliest tokens are drawn from; 0: all."""
    seed: int | None = None
    """Replays the text, whatever runs beside it. Drafts then keep one depth, since every draft uses up randomness."""
    stop: tuple[str, ...] = ()
    """Texts that end it; none of them is given out."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end it, such as the end of a document; they are not given out."""
    logprobs: int | None = None
    """How many of the likeliest tokens to name beside each token with its log-probability; None: no log-probabilities.
    They are the model's own, before temperature, top-p and top-k."""
    prompt_logprobs: bool = False
    """Log-probabilities of the prompt's tokens too."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "it must be at least 0")
        warm = "it must be 0 (greedy) or above, and at most 100"
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, warm)
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "it must be above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "it must be at least 0 (0: all tokens)")
        named = self.logprobs is None or 0 <= self.logprobs <= 20
        _require(named, "logprobs", self.logprobs, "it must lie between 0 and 20")
        if not all(self.stop):
            raise RequestError(
                "a stop string is empty; it would end every text at once: leave it out.", param="stop"
            )

    @property
    def fixed_depth(self) -> bool:
        """Whether drafts must keep one depth so that the seed replays."""
        return self.seed is not None and self.temperature > 0


def _require(holds: bool, name: str, value: float | None, must: str) -> None:
    if not holds:
        raise RequestError(f"{name} is {value}; {must}.", param=name)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, nats, and the likeliest tokens' beside it, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """One text under way."""

    number: int
    """Unique in its engine."""
    tokens: list[int]
    """The prompt's, then its own."""
    prompt_length: int
    sampling: Sampling
    modules: int
    """MTP modules whose caches it fills, of the first on, so that they can draft; 0 without drafts."""
    index: int = 0
    """Which of the n samples of its request."""
    leader: "Sequence | None" = None
    """The first of its request's samples, if it is not that itself."""
    cached: int = 0
    """Positions that the main model's cache holds."""
    blocks: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    """Serial numbers of its first blocks, as far as they can be shared."""
    filled: int = 0
    """Of these, the blocks that all its modules have filled."""
    valid: list[int] = field(default_factory=list)
    """Positions of each module's cache that come from true tokens; n − k at most for n tokens."""
    waiting: list[list[Row]] = field(default_factory=list)
    """For each module the hidden states from `valid` on that it has yet to run over, in pieces of rows."""
    finish: str | None = None
    """stop, length or abort, once it has ended."""
    generator: random.Random = field(init=False)
    """All its randomness."""

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.generator = random.Random() if seed is None else random.Random(f"{seed} {self.index}")
        self.restart()

    def restart(self) -> None:
        """Nothing cached, as at the start; the tokens and the randomness stay."""
        self.cached, self.blocks, self.published, self.filled = 0, [], [], 0
        self.follow(self.modules)

    def follow(self, modules: int) -> None:
        """So many modules fill their caches from now on, from the beginning of the text or of what is cached."""
        self.modules = modules
        self.valid = [self.cached] * modules
        self.waiting = [[] for _ in range(modules)]

    def forget(self, most: int) -> None:
        """A module that more hidden states wait for than `most` drafts no more in this text, nor those behind it."""
        for module, waiting in enumerate(self.waiting):
            if len(waiting) > most:
                self.modules = module
                del self.valid[module:], self.waiting[module:]
                return

    @property
    def made(self) -> int:
        """Tokens of its own."""
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        """Whether it writes: only the last token of its own is missing from the cache, and drafts can follow it."""
        return self.made > 0 and self.cached == len(self.tokens) - 1

    @property
    def final(self) -> int:
        """Positions whose entries in its modules' caches stay as they are."""
        return min([self.cached, *self.valid])


@dataclass(frozen=True)
class Delta:
    """What one step added to a sequence."""

    sequence: Sequence
    tokens: tuple[int, ...] = ()
    text: str = ""
    """Empty without a tokenizer; held back while it may be the beginning of a stop string or half a character."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of its tokens, and behind them of the stop token if one ended the text."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Of the prompt's tokens, all at once with the first delta; None for the very first."""
    finish: str | None = None
