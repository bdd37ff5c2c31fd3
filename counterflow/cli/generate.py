"""`counterflow generate`: text from a trained run, printed as it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Generate:
    """Sample text from a trained run or an exported model."""

    run: str
    """The run's folder, such as runs/tiny, or its name; or the folder of an exported model."""
    prompt: str = ""
    """What the text goes on from; empty: the beginning of a document."""
    max_tokens: int = 200
    temperature: float = 0.8
    """0 takes the likeliest token every time."""
    top_p: float = 0.95
    seed: int = 0
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""


def run(arguments: Sequence[str]) -> int:
    """Print the prompt and what follows it."""
    generate(tyro.cli(Generate, prog="counterflow generate", args=arguments, use_underscores=True))
    return 0


def generate(wish: Generate) -> str:
    """Print prompt and text as they come; the text."""
    from counterflow.infer.sample import sample_tokens
    from counterflow.train.restore import folder_of, model_of

    model, tokenizer = model_of(folder_of(wish.run), wish.averaged)
    prompt = [tokenizer.bos, *tokenizer.encode(wish.prompt)]
    tokens: list[int] = []
    shown = tokenizer.decode(prompt)
    print(shown, end="", flush=True)
    for token in sample_tokens(
        model, prompt, wish.max_tokens, wish.temperature, wish.top_p, wish.seed, frozenset([tokenizer.eos])
    ):
        tokens.append(token)
        text = tokenizer.decode(prompt + tokens)
        if not text.endswith("\ufffd"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return shown


def print_sample(folder: str) -> None:
    """What a finished run writes, kept beside it and shown in its report."""
    from counterflow.train.report import write_report

    print(f"\nA sample after '{SAMPLE_PROMPT.strip()}':\n")
    text = generate(Generate(run=folder, prompt=SAMPLE_PROMPT, max_tokens=SAMPLE_TOKENS))
    (Path(folder) / "sample.txt").write_text(text, encoding="utf-8")
    print(f"\nThe run's page: {write_report(Path(folder))}")
