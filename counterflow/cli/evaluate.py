"""`counterflow evaluate WHAT`: a model's worth by programs, text, experts or another model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from counterflow.cli.files import keep
from counterflow.cli.loading import loaded, mesh_on, precision_on
from counterflow.cli.tasks import Tasks, tasks
from counterflow.config.run import Parallel
from counterflow.errors import ConfigError, DataError, nearest
from counterflow.machine import cores

if TYPE_CHECKING:
    from counterflow.comm.mesh import Mesh


@dataclass(frozen=True)
class HumanEval:
    """pass@k on the 164 problems of HumanEval; programs run in a sandbox."""

    run: str = ""
    """The run's folder or name, or an exported folder."""
    completions: str = ""
    """Instead of a run: `canonical` (the reference solutions), `pass` (empty bodies), or a .jsonl file of task_id and
    completion."""
    samples: int = 1
    """Texts for each problem."""
    k: tuple[int, ...] = (1, 10, 100)
    """pass@k for each of these that there are samples enough for."""
    temperature: float = 0.0
    """0 writes the likeliest text; more than one sample needs more, such as 0.8."""
    top_p: float = 0.95
    max_tokens: int = 512
    positions: int = 0
    """Prompt and text together have so many tokens at most; 0: the model's positions. Memory is taken for the longest
    prompt and its text."""
    seed: int = 0
    prompt: str = "as-is"
    """as-is, or stripped of white space at its end."""
    problems: int = 164
    """The first so many, for a quick look; the score is then not HumanEval's."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""
    ranks: int = 0
    """Processes that share each layer's experts and write the texts in turn; 0: as many as torchrun or Slurm has
    started, else one."""
    dispatch: str = Parallel.dispatch
    """How they reach each other's experts: collective, nvlink, copy_engine or deep_ep."""
    workers: int = 0
    """Programs run at a time; 0: one for each core."""
    time_s: float = 3.0
    """Seconds a program may take."""
    memory_mib: int = 512
    """Memory of each of its processes."""
    unconfined: bool = False
    """Run programs although the system gives no namespaces: limits are then all that holds them."""
    json: str = ""
    """Where the report is written; default humaneval.json in the run's folder. A model's texts are kept beside it as
    .jsonl while it writes."""


def humaneval(wish: HumanEval, mesh: "Mesh") -> None:
    """Write, run, report; all ranks write, and the first does the rest."""
    from counterflow.evaluate import humaneval as bench
    from counterflow.evaluate.complete import BATCH, Sampling
    from counterflow.evaluate.sandbox import Limits, require_confinement

    limits = Limits(time_s=wish.time_s, memory_bytes=wish.memory_mib << 20)
    given = dict(list(bench.problems().items())[: wish.problems])
    require_confinement(limits, wish.unconfined)
    settings: dict[str, Any] = {"model": wish.run or wish.completions}
    if wish.run:
        model, tokenizer, folder = _model(wish.run, wish.averaged, wish.precision, mesh)
        sampling = Sampling(
            wish.max_tokens, wish.temperature, wish.top_p, wish.seed, bench.STOPS, wish.positions
        )
        settings |= {"precision": wish.precision, "averaged": wish.averaged, "batch": BATCH}
        settings |= {"prompt": wish.prompt, "sampling": asdict(sampling)}
        texts = bench.written(
            model, tokenizer, given, sampling, wish.samples, wish.prompt, mesh, wish.dispatch
        )
        if not mesh.first:
            list(texts)
            return
        out = Path(wish.json or folder / "humaneval.json")
        texts = bench.kept(texts, out.with_suffix(".jsonl"))
    else:
        known: dict[str, Callable[[Any], Any]] = {"canonical": bench.canonical, "pass": bench.empty}
        make = known.get(wish.completions)
        texts = make(given) if make else bench.from_file(Path(wish.completions), given)
        out = wish.json
    answers = bench.grade(given, list(texts), limits, wish.workers or cores())
    found = bench.report(answers, wish.k, limits, settings)
    _table("HumanEval", [*_humaneval_rows(found).items()])
    keep(found, out)


def _humaneval_rows(found: Mapping[str, Any]) -> dict[str, Any]:
    sampling, limits = found.get("sampling", {}), found["limits"]
    held = [name for name, holds in found["confined_by"].items() if holds]
    rows = {name: f"{score:.1%}" for name, score in found["scores"].items()}
    rows |= {"passed": f"{found['passed']} of {found['samples']} programs, {found['problems']} problems"}
    if sampling:
        rows |= {
            "prompt": f"{found['prompt']}, after the beginning token",
            "sampling": f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, "
            f"seed {sampling['seed']}, at most {sampling['max_tokens']} tokens, batch {found['batch']}, "
            f"{found['precision']}",
            "stops": " ".join(repr(stop) for stop in sampling["stops"]) + " and the end token",
        }
    rows["limits"] = (
        f"{limits['time_s']:g} s, {limits['memory_bytes'] >> 20} MiB, {limits['processes']} processes"
    )
    return rows | {"confined by": "limits" + "".join(f", {name}" for name in held)}


def _model(run: str, averaged: bool, precision: str, mesh: "Mesh") -> Any:
    """(model, tokenizer, folder) of a run or an exported folder, on the mesh's device; of its experts this rank's."""
    from counterflow.train.folder import folder_of

    folder = folder_of(run)
    return *loaded(folder, averaged, precision, mesh), folder


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")


@dataclass(frozen=True)
class Perplexity:
    """Bits per byte of texts, which do not depend on the tokenizer, and nats per token."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or globs of .txt, .md, .py, .jsonl or .parquet, or python-stdlib."""
    run: str = ""
    """The run's folder or name, or an exported folder."""
    field: str = "text"
    """The key or column that holds the text, in .jsonl and .parquet."""
    max_bytes: float = 1e6
    """Of each of the texts; documents are read whole."""
    window: int = 0
    """Tokens that the model sees at once; a longer document goes on in windows that keep half of the one before. The
    number moves with it. 0: the model's positions."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    averaged: bool = False
    ranks: int = 0
    """Processes that share each layer's experts, for a model that is too large for one; each reads all texts.
    0: as many as torchrun or Slurm has started, else one."""
    dispatch: str = Parallel.dispatch
    """How they reach each other's experts: collective, nvlink, copy_engine or deep_ep."""
    json: str = ""
    """Where the numbers are written too."""


def perplexity(wish: Perplexity, mesh: "Mesh") -> None:
    """Measure each of the texts; all ranks alike, so that all run the same passes."""
    from counterflow.config.run import Source
    from counterflow.evaluate.likelihood import half
    from counterflow.evaluate.likelihood import perplexity as measure
    from counterflow.infer.ranks import share_experts
    from counterflow.units import bytes_

    if not wish.texts:
        raise ConfigError("no texts are named; give files, folders or globs, or python-stdlib.")
    model, tokenizer, _ = _model(wish.run, wish.averaged, wish.precision, mesh)
    window = _window(wish.window, model.config.max_positions)
    share_experts(model, mesh, window, wish.dispatch)
    rows = [("windows", f"{window} tokens, each {half(window)} on from the one before")]
    found = []
    for path in wish.texts:
        one = measure(model, tokenizer, Source(path, field=wish.field), wish.max_bytes, mesh.first, window)
        said = (
            f"{one.bits_per_byte:.4f} bits per byte, {one.nats_per_token:.4f} nats per token; "
            f"{bytes_(one.bytes)} in {one.documents} documents, {one.tokens} tokens"
        )
        rows.append((path, said))
        means = {"bits_per_byte": one.bits_per_byte, "nats_per_token": one.nats_per_token}
        found.append({"text": path, **asdict(one), **means})
    if not mesh.first:
        return
    _table(f"{wish.run} in {wish.precision}", rows)
    report = {"model": wish.run, "precision": wish.precision, "window": window, "stride": half(window)}
    keep(report | {"texts": found}, wish.json)


def _window(asked: int, positions: int) -> int:
    """The window's tokens.   Fails: ConfigError."""
    if not 0 <= asked <= positions:
        raise ConfigError(
            f"window is {asked} and the model has {positions} positions; take 1 to {positions}, or 0 for all."
        )
    return asked or positions


@dataclass(frozen=True)
class ExpertLoad:
    """Relative load of every expert by kind of text, as a picture (Figure 9 of the report) and as numbers."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """NAME=PATH of each kind of text, or PATH alone."""
    run: str = ""
    """The run's folder or name, or an exported folder."""
    field: str = "text"
    """The key or column that holds the text, in .jsonl and .parquet."""
    max_tokens: int = 100_000
    """Of each kind."""
    window: int = 0
    """Tokens that the model sees at once; 0: its positions."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    averaged: bool = False
    picture: str = ""
    """A .png, .svg or .pdf; default expert_load.png in the run's folder. The numbers lie beside it as .json."""


def expert_load(wish: ExpertLoad, mesh: "Mesh") -> None:
    """Count, draw, and say how far the busiest expert is above the mean."""
    from counterflow.config.run import Source
    from counterflow.evaluate import expert_load as bench

    if not wish.texts:
        raise ConfigError("no texts are named; give NAME=PATH of one kind of text or more.")
    if wish.picture and Path(wish.picture).suffix.lower() not in bench.PICTURES:
        raise ConfigError(f"picture is '{wish.picture}'; its name must end in {', '.join(bench.PICTURES)}.")
    model, tokenizer, folder = _model(wish.run, wish.averaged, wish.precision, mesh)
    pairs = [text.split("=", 1) if "=" in text else (text, text) for text in wish.texts]
    domains = {name: Source(path, field=wish.field) for name, path in pairs}
    if len(domains) < len(pairs):
        raise ConfigError(f"two kinds of text have one name in {' '.join(wish.texts)}; give each its own.")
    window = _window(wish.window, model.config.max_positions)
    counted = bench.expert_load(model, tokenizer, domains, wish.max_tokens, window)
    loads = {name: bench.relative_load(one) for name, one in counted.items()}
    picture = Path(wish.picture or folder / "expert_load.png")
    bench.draw(loads, model.config.num_dense_layers, picture)
    rows = {
        name: f"busiest expert {load.max():.2f} times even, layers' mean {load.amax(-1).mean():.2f}"
        for name, load in loads.items()
    }
    _table(f"{wish.run}: relative expert load", [*rows.items(), ("picture", picture)])
    kept = {
        name: {"counts": one.tolist(), "relative_load": loads[name].tolist()} for name, one in counted.items()
    }
    keep(
        {"model": wish.run, "first_layer": model.config.num_dense_layers, "domains": kept},
        picture.with_suffix(".json"),
    )


@dataclass(frozen=True)
class Binoculars:
    """How likely a language model wrote a text, from two checkpoints of one vocabulary: low is likely."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """Files; each document has its score."""
    observer: str = ""
    """A run or exported folder whose predictions are the yardstick."""
    performer: str = ""
    """A run or exported folder whose perplexity is measured; in the paper the one tuned further."""
    field: str = "text"
    max_documents: int = 100
    window: int = 0
    """Tokens that the models see at once; 0: the positions of the one that has fewer."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""


def binoculars(wish: Binoculars, mesh: "Mesh") -> None:
    """Score each document."""
    from itertools import islice

    from counterflow.config.run import Source
    from counterflow.data.corpus import documents
    from counterflow.evaluate.likelihood import binoculars as score

    if not wish.texts:
        raise ConfigError("no texts are named; give files.")
    observer, tokenizer, _ = _model(wish.observer, False, wish.precision, mesh)
    performer, other, _ = _model(wish.performer, False, wish.precision, mesh)
    if tokenizer.bpe.get_vocab() != other.bpe.get_vocab() or len(observer.head) != len(performer.head):
        raise ConfigError(
            f"{wish.observer} and {wish.performer} have different vocabularies; their predictions can be compared "
            "only over the same tokens: take two checkpoints of one tokenizer."
        )
    window = _window(wish.window, min(observer.config.max_positions, performer.config.max_positions))
    rows: list[tuple[str, str]] = []
    for path in wish.texts:
        for document in islice(documents(Source(path, field=wish.field)), wish.max_documents):
            found = score(observer, performer, tokenizer, document.text, window)
            rows.append((_named(path, document.name), f"{found:.4f}"))
    if not rows:
        raise DataError(
            f"{', '.join(wish.texts)} hold no text; give files with text, or the field that holds it."
        )
    _table(f"Binoculars scores, by {wish.performer} and its surprise at {wish.observer}", rows)
    print(
        "The lower, the likelier a language model wrote the text. Where to draw the line differs from pair to pair:"
    )
    print("score texts whose authors you know (for the paper's pair of 7 B models it lies at 0.90).")


def _named(path: str, name: str) -> str:
    """A document's name with the words that its source was given by: two folders may hold files of one name."""
    if Path(path).is_dir():
        return str(Path(path) / name)
    return str(path) + name.removeprefix(Path(path).name) if Path(path).is_file() else name


EVALUATIONS: Mapping[str, tuple[Any, Callable[..., None], str]] = {
    "humaneval": (HumanEval, humaneval, "pass@k on HumanEval's 164 problems, run in a sandbox"),
    "perplexity": (Perplexity, perplexity, "bits per byte of any text"),
    "expert-load": (ExpertLoad, expert_load, "relative load of experts by kind of text, drawn"),
    "binoculars": (Binoculars, binoculars, "how likely a model wrote a text, from two checkpoints"),
    "tasks": (Tasks, tasks, "tasks of lm-eval, with the model in this process"),
}

AMOUNTS = ("samples", "problems", "max_bytes", "max_tokens", "max_documents")
"""Of an evaluation: none is no measurement."""


def require_models(asked: Any) -> None:
    """Refuse what names no model, before torch is imported."""
    from counterflow.train.folder import require_model

    if isinstance(asked, HumanEval) and bool(asked.run) == bool(asked.completions):
        raise ConfigError("name either --run, whose model writes, or --completions.")
    for option in ("run", "observer", "performer"):
        if hasattr(asked, option) and not getattr(asked, "completions", ""):
            require_model(getattr(asked, option), f"--{option}")


def run(arguments: Sequence[str]) -> int:
    """One evaluation."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:13}{says}" for name, (_, _, says) in EVALUATIONS.items())
        print(
            f"usage: counterflow evaluate WHAT ...\n\n{lines}\n\n`counterflow evaluate WHAT --help` says more of one."
        )
        return 0
    what, rest = arguments[0], arguments[1:]
    if what not in EVALUATIONS:
        raise ConfigError(f"'{what}' is no evaluation; {nearest(what, EVALUATIONS)}")
    wish, act, _ = EVALUATIONS[what]
    asked = tyro.cli(wish, prog=f"counterflow evaluate {what}", args=rest, use_underscores=True)
    for name in AMOUNTS:
        if getattr(asked, name, 1) < 1:
            raise ConfigError(f"{name} is {getattr(asked, name)}; it must be at least 1.")
    require_models(asked)

    def measure(mesh: "Mesh") -> None:
        """Reports name the precision that was chosen."""
        named = getattr(asked, "run", True)
        act(replace(asked, precision=precision_on(mesh, asked.precision)) if named else asked, mesh)

    if not isinstance(asked, HumanEval | Perplexity):
        measure(mesh_on(asked.device))
        return 0
    from counterflow.train.launch import on_ranks

    return on_ranks(asked.ranks, asked.device, ["evaluate", *arguments], measure)
