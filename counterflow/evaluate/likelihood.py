"""What a model makes of a text: −log p of every token, in windows over texts of any length.

A window is as long as the model's positions, unless a shorter one is asked for; the next one keeps half of it as
context, so that after the first window every token has at least half a window before it. The number moves with both,
so whoever reports it names them. The text begins a document, and its end is not predicted.

Logits are made a block of tokens at a time: those of a released model's whole window would take 85 GB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.config.run import Source
from counterflow.data.corpus import documents
from counterflow.data.files import files
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import DataError
from counterflow.kernels.head import token_blocks
from counterflow.model.transformer import Transformer
from counterflow.progress import Progress, sized
from counterflow.units import bytes_

LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Perplexity:
    """Sums over a text."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    def __add__(self, other: "Perplexity") -> "Perplexity":
        """Of both texts."""
        return Perplexity(*(one + two for one, two in zip(astuple(self), astuple(other))))

    @property
    def bits_per_byte(self) -> float:
        """The measure that does not depend on the tokenizer."""
        return self.nats / LN2 / self.bytes

    @property
    def nats_per_token(self) -> float:
        """The mean loss; its exponential is the perplexity."""
        return self.nats / self.tokens


def windows(count: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of each window over `count` ids: tokens first … end − 1 are predicted from start on.

    Each but the first predicts `stride` tokens. The last begins as early as its size allows, as lm-eval's does.
    """
    first = 1
    while first < count:
        end = min(count, first + (size if first == 1 else stride))
        yield max(0, end - 1 - size), first, end
        first = end


def half(size: int) -> int:
    """The stride of windows that keep half of the one before."""
    return max(1, size // 2)


def predictions(
    model: Transformer, ids: Int[Tensor, "S"], size: int = 0, stride: int = 0
) -> Iterator[tuple[Float[Tensor, "T V"], Int[Tensor, "T"]]]:
    """(log p over the vocabulary in fp32, the tokens that came), block by block; the first id is only context.

    `size` is the window's and `stride` how far the next one goes; 0: the model's positions, and half a window.
    """
    size = size or model.config.max_positions
    for start, first, end in windows(len(ids), size, stride or half(size)):
        yield from window(model, ids[start:end], first - start)


@torch.no_grad()
def window(
    model: Transformer, ids: Int[Tensor, "S"], first: int
) -> Iterator[tuple[Float[Tensor, "T V"], Int[Tensor, "T"]]]:
    """The same for `ids[first:]`, in one pass of the model over those before them."""
    h, _ = model.trunk(ids[None, :-1], model.context(1, len(ids) - 1))
    h, targets = h[first - 1 :], ids[first:]
    blocks = token_blocks(len(h), len(model.head), h.is_cuda)
    for at in blocks:
        rows = slice(at, at + blocks.step)
        yield (h[rows] @ model.head.t()).float().log_softmax(-1), targets[rows]


def ids_of(model: Transformer, tokenizer: Tokenizer, text: str) -> Int[Tensor, "S"]:
    """The beginning token and the text's, on the model's device."""
    return torch.tensor([tokenizer.bos, *tokenizer.encode(text)], device=model.head.device)


def nll(
    model: Transformer, tokenizer: Tokenizer, text: str, size: int = 0, stride: int = 0
) -> Float[Tensor, "S"]:
    """−log p of each of the text's tokens, in nats; windows as of `predictions`."""
    parts = [
        -log_p.gather(1, targets[:, None])[:, 0]
        for log_p, targets in predictions(model, ids_of(model, tokenizer, text), size, stride)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    source: Source,
    most_bytes: float = float("inf"),
    shown: bool = True,
    size: int = 0,
) -> Perplexity:
    """Over the documents of a source, each for itself, until so many bytes are read.   Fails: DataError without text.

    `size` is the window's, of which the next keeps half; 0: the model's positions.
    Cost: one forward over every token, about half of them twice where documents are longer than a window.
    """
    found = Perplexity(0.0, 0, 0, 0)
    most = min(most_bytes, sum(path.stat().st_size for _, path in files(source)))
    with Progress(f"reading {source.path}", most, shown=shown) as progress, _told_when_interrupted(progress):
        for document in documents(source):
            for part in _parts(model, tokenizer, document.text, size):
                found = found + part
                bits = found.nats / LN2 / max(1, found.bytes)
                read = sized(found.bytes, max(most, found.bytes), bytes_)
                progress.update(found.bytes, f"{bits:.3f} bits per byte so far", read)
            found = replace(found, documents=found.documents + 1)
            if found.bytes >= most_bytes:
                break
    if not found.tokens:
        raise DataError(f"'{source.path}' holds no text; give files with text, or the field that holds it.")
    return found


@contextmanager
def _told_when_interrupted(progress: Progress) -> Iterator[None]:
    """What was found until then is said, so that a long reading is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        progress.note(progress.said())
        raise


def _parts(model: Transformer, tokenizer: Tokenizer, text: str, size: int) -> Iterator[Perplexity]:
    """Of each block of a text's windows, which share its bytes by their tokens."""
    ids, whole, done, told = ids_of(model, tokenizer, text), len(text.encode()), 0, 0
    for log_p, targets in predictions(model, ids, size):
        done += len(targets)
        reached = whole * done // (len(ids) - 1)
        nats = -log_p.gather(1, targets[:, None]).double().sum().item()
        yield Perplexity(nats, len(targets), reached - told, 0)
        told = reached


def binoculars(
    observer: Transformer, performer: Transformer, tokenizer: Tokenizer, text: str, size: int = 0
) -> float:
    """The text's log-perplexity to the performer over how surprised the performer is by the observer's predictions.

    Low: each token is one that such models write; Hans et al., arXiv:2401.12070, with their code's roles. The two share
    a vocabulary; `size` is the window's, 0: the shorter of theirs.   Fails: DataError for a text without tokens.
    """
    ids = ids_of(performer, tokenizer, text)
    size = size or min(observer.config.max_positions, performer.config.max_positions)
    own = crossed = 0.0
    both = zip(predictions(observer, ids, size), predictions(performer, ids, size))
    for (seen, _), (made, targets) in both:
        own -= made.gather(1, targets[:, None]).double().sum().item()
        crossed -= (seen.exp() * made).double().sum().item()
    if not crossed:
        raise DataError("the text has no tokens to score; give one with a few sentences.")
    return own / crossed
