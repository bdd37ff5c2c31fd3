"""`counterflow generate`: text from a trained run, printed as it is written."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from counterflow.infer.engine import Engine

SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Generate:
    """Write text with a trained run or an exported model."""

    run: str
    """The run's folder, such as runs/tiny, or its name; or the folder of an exported model."""
    prompt: str = ""
    """What the text goes on from; empty: the beginning of a document."""
    max_tokens: int = 200
    temperature: float = 0.8
    """0 takes the likeliest token every time."""
    top_p: float = 0.95
    """The fewest likeliest tokens that hold this share of the probability are drawn from."""
    top_k: int = 0
    """At most so many likeliest tokens are drawn from; 0: all."""
    seed: int | None = None
    """The same number, the same text; without it another one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end it."""
    drafts: int = -1
    """Tokens drafted ahead by the multi-token modules, at most; 0: none, and the modules take no memory; −1: one by
    each. The text is the model's own whatever is drafted."""
    stats: bool = False
    """Say at the end how fast it was and what the drafts brought."""
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    precision: str = "fp32"
    """fp32 or bf16."""


def run(arguments: Sequence[str]) -> int:
    """Print the prompt and what follows it."""
    shown = Annotated[Generate, tyro.conf.FlagCreatePairsOff]
    generate(tyro.cli(shown, prog="counterflow generate", args=arguments, use_underscores=True))
    return 0


def generate(wish: Generate) -> str:
    """Print prompt and text as they come, and the numbers on stderr if asked for; the text."""
    from counterflow.infer.engine import Engine, EngineSettings
    from counterflow.infer.place import placed
    from counterflow.infer.request import Sampling
    from counterflow.infer.statistics import described
    from counterflow.train.restore import folder_of, model_of

    settings = EngineSettings(max_sequences=1, drafts=wish.drafts)
    model, tokenizer = model_of(folder_of(wish.run), wish.averaged)
    sampling = Sampling(
        wish.max_tokens,
        wish.temperature,
        wish.top_p,
        wish.top_k,
        wish.seed,
        wish.stop,
        stop_tokens=frozenset([tokenizer.eos]),
    )
    engine = Engine(placed(model, wish.device, wish.precision, settings), settings, tokenizer.decode)
    engine.add([tokenizer.bos, *tokenizer.encode(wish.prompt)], sampling)
    text = _printed(engine, wish.prompt)
    if wish.stats:
        print(f"\n{described(engine.statistics, engine.depth)}", file=sys.stderr)
    return text


def _printed(engine: "Engine", shown: str) -> str:
    print(shown, end="", flush=True)
    while not engine.idle:
        for delta in engine.step():
            shown += delta.text
            print(delta.text, end="", flush=True)
    print()
    return shown


def print_sample(folder: str) -> None:
    """What a finished run writes, kept beside it and shown in its report."""
    from counterflow.train.report import write_report

    print(f"\nA sample after '{SAMPLE_PROMPT.strip()}':\n")
    text = generate(Generate(run=folder, prompt=SAMPLE_PROMPT, max_tokens=SAMPLE_TOKENS, seed=0))
    (Path(folder) / "sample.txt").write_text(text, encoding="utf-8")
    print(f"\nThe run's page: {write_report(Path(folder))}")
