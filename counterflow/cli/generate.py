"""`counterflow generate`: text from a trained run, printed as it is written."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import tyro

from counterflow.cli.loading import loaded, mesh_on, settings_of
from counterflow.config.run import Parallel
from counterflow.progress import Progress

if TYPE_CHECKING:
    from counterflow.comm.mesh import Mesh
    from counterflow.data.tokenizer import Tokenizer
    from counterflow.infer.engine import Engine
    from counterflow.infer.request import Sampling

SAMPLE_PROMPT = "def __init__(self"
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Generate:
    """Write text with a trained run or an exported model."""

    run: str
    """The run's folder, such as runs/tiny, or its name; or the folder of an exported model."""
    prompt: str = ""
    """What the text goes on from; empty: the beginning of a document."""
    max_tokens: int = 200
    positions: int = 0
    """Prompt and text together may have so many tokens; 0: as many as they need, within the model's positions."""
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
    """Tokens drafted ahead by the multi-token modules in every step; 0: none, and the modules take no memory; −1: at
    most one by each module, and fewer or none where that is measured to be faster. The text is the model's own whatever
    is drafted."""
    stats: bool = False
    """Say at the end how long loading and the first token took, how fast the rest was and what drafts brought."""
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    ranks: int = 0
    """Processes that share each layer's experts between them, for a model that is too large for one; 0: as many as
    torchrun or Slurm has started, else one."""
    dispatch: str = Parallel.dispatch
    """How they reach each other's experts: collective, nvlink, copy_engine or deep_ep."""


def run(arguments: Sequence[str]) -> int:
    """Print the prompt and what follows it."""
    shown = Annotated[Generate, tyro.conf.FlagCreatePairsOff]
    wish = tyro.cli(shown, prog="counterflow generate", args=arguments, use_underscores=True)
    began = perf_counter()
    from counterflow.train.folder import require_model

    require_model(wish.run)  # before torch is imported
    from counterflow.train.launch import on_ranks

    return on_ranks(
        wish.ranks, wish.device, ["generate", *arguments], lambda mesh: generate(wish, mesh, began)
    )


def generate(wish: Generate, mesh: "Mesh | None" = None, began: float | None = None) -> str:
    """Print prompt and text as they come, and the numbers on stderr if asked for; the text.

    The first of `mesh`'s ranks has the prompt and prints; the others serve it with their experts. `began` is when the
    command did.
    """
    began = perf_counter() if began is None else began
    from counterflow.infer.engine import Engine, pass_rows, with_room
    from counterflow.infer.ranks import share_experts
    from counterflow.infer.statistics import Took, described
    from counterflow.infer.text import document
    from counterflow.train.folder import folder_of

    mesh, settings = mesh or mesh_on(wish.device), settings_of(1, wish.drafts, positions=wish.positions)
    model, tokenizer = loaded(folder_of(wish.run), wish.averaged, wish.precision, mesh, settings)
    prompt = mesh.all_do(lambda: document(tokenizer, wish.prompt))
    settings = with_room(model, settings, len(prompt) + wish.max_tokens)
    ranks = share_experts(model, mesh, pass_rows(model, settings), wish.dispatch)
    engine = Engine(model, settings, tokenizer.bytes_of, ranks)

    for record in engine.recordings([1], [wish.temperature == 0]):
        record()
    mesh.first_does(lambda: engine.add(prompt, _sampling(wish, tokenizer)))
    ready = perf_counter()
    text, first, last = _printed(engine, wish.prompt if mesh.first else "")
    if wish.stats and mesh.first:
        took = Took(ready - began, first - ready, last - first)
        print(f"\n{described(engine.statistics, engine.depth, took)}", file=sys.stderr)
    return text


def _sampling(wish: Generate, tokenizer: "Tokenizer") -> "Sampling":
    from counterflow.infer.request import Sampling

    drawn = (wish.temperature, wish.top_p, wish.top_k, wish.seed)
    return Sampling(wish.max_tokens, *drawn, stop=wish.stop, stop_tokens=tokenizer.ends_with(wish.stop))


def _printed(engine: "Engine", shown: str) -> tuple[str, float, float]:
    """The text, and when its first and last tokens came. A rank without a prompt is given nothing to print."""
    print(shown, end="", flush=True)
    first = last = 0.0
    while not engine.finished():
        for delta in engine.step():
            last = perf_counter()
            first = first or (last if engine.statistics.tokens else 0.0)
            shown += delta.text
            print(delta.text, end="\n" if delta.finish else "", flush=True)
    return shown, first or last, last


def print_sample(folder: str) -> None:
    """What a finished run writes, kept beside it and shown in its report."""
    from counterflow.train.report import write_report

    with Progress("loading the model", file=sys.stdout):
        import_module("counterflow.infer.engine")  # seconds, in which nothing would be seen
        import_module("counterflow.train.restore")
    print(f"\nA sample after '{SAMPLE_PROMPT}':\n")
    text = generate(Generate(run=folder, prompt=SAMPLE_PROMPT, max_tokens=SAMPLE_TOKENS, seed=0))
    (Path(folder) / "sample.txt").write_text(text, encoding="utf-8")
    print(f"\nThe run's page: {write_report(Path(folder))}")
    print(f"Its curves beside those of other runs: tensorboard --logdir {Path(folder).parent}")
