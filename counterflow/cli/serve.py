"""`counterflow serve`: a trained run behind OpenAI's API."""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from socket import socket
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import tyro

from counterflow.cli.loading import loaded, settings_of
from counterflow.config.run import Parallel
from counterflow.errors import ConfigError, installing

if TYPE_CHECKING:
    from counterflow.comm.mesh import Mesh
    from counterflow.data.tokenizer import Tokenizer
    from counterflow.infer.engine import Engine
    from counterflow.serve.listen import ServerSettings

KEY_VARIABLE = "COUNTERFLOW_API_KEY"
TOLD_TO_STOP = (128 + signal.SIGINT, 128 + signal.SIGTERM)
CLOSING_S = 15
"""What ranks may take beside the grace of their texts to end."""


@dataclass(frozen=True)
class Serve:
    """Serve a trained run by OpenAI's completions and chat completions, with a page to try it."""

    run: str
    """The run's folder, such as runs/tiny, or its name; or the folder of an exported model."""
    host: str = "127.0.0.1"
    """Where to listen; another than a loopback address needs an API key."""
    port: int = 8000
    """0 takes any that is free."""
    api_key: str = ""
    """What clients must bring as a bearer token; better set by the variable COUNTERFLOW_API_KEY, since others see the
    words of a command."""
    name: str = ""
    """What clients call the model; empty: the run's name."""
    max_sequences: int = 32
    """Texts that are written at once, by each rank."""
    max_queue: int = 1024
    """Texts that may wait; more are refused with 429."""
    max_body_bytes: int = 2**20
    cache_bytes: float = 2**30
    """At most so much for the cache of latents, of each rank."""
    positions: int = 0
    """Tokens of one text at most, prompt and all; 0: the model's positions, or as many of them as the cache holds."""
    drafts: int = -1
    """Tokens drafted ahead by the multi-token modules in every step; 0: none; −1: at most one by each module, and fewer
    or none where that is measured to be faster."""
    grace_s: int = 30
    """How long texts under way may go on once the server is told to stop."""
    receive_s: float = 30
    """How long a request may take to arrive whole."""
    allow_origin: tuple[str, ...] = ()
    """Origins of web pages that may ask the server from a browser, such as https://chat.example; * for all."""
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    ranks: int = 0
    """Processes that share each layer's experts between them, for a model that is too large for one; the first listens
    and deals out what is asked. 0: as many as torchrun or Slurm has started, else one."""
    dispatch: str = Parallel.dispatch
    """How they reach each other's experts: collective, nvlink, copy_engine or deep_ep."""


def run(arguments: Sequence[str]) -> int:
    """Serve until told to stop; 0 then."""
    shown = Annotated[Serve, tyro.conf.FlagCreatePairsOff]
    wish = tyro.cli(shown, prog="counterflow serve", args=arguments, use_underscores=True)
    began = perf_counter()
    from counterflow.train.environment import started
    from counterflow.train.folder import require_model

    require_model(wish.run)
    listening_of(wish)  # both said once, before torch is imported and ranks are started
    if wish.ranks > 1 and started() is None:
        print(f"Starting {wish.ranks} ranks.", flush=True)
    from counterflow.train.launch import on_ranks

    # Their agent kills ranks that outlive a signal by so much; the first ends texts under way and then the others.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(wish.grace_s + CLOSING_S))
    code = on_ranks(wish.ranks, wish.device, ["serve", *arguments], lambda mesh: serve(wish, mesh, began))
    return 0 if code in TOLD_TO_STOP else code


def serve(wish: Serve, mesh: "Mesh", began: float) -> None:
    """Load the run; the first of `mesh`'s ranks says where it is served and serves, the others write with it. `began`
    is when the command did."""
    from counterflow.interrupt import stop_signals
    from counterflow.serve.app import Service
    from counterflow.serve.links import connect, follow
    from counterflow.serve.listen import listening, server
    from counterflow.serve.metrics import Metrics
    from counterflow.train.folder import folder_of

    listen = listening_of(wish)
    folder = folder_of(wish.run)
    if mesh.first:
        print(f"Loading {folder}.", flush=True)
    engine, tokenizer = engine_of(wish, folder, mesh)
    links = connect(mesh)
    with ExitStack() as stack:
        taken: list[socket] = []
        mesh.first_does(lambda: taken.append(stack.enter_context(listening(listen))))
        made_ready(engine, mesh)
        stack.enter_context(
            stop_signals(say_stopping(wish.grace_s, mesh))
        )  # the first tells the others when to end
        if not mesh.first:
            follow(engine, links[0])
            return
        metrics = Metrics(perf_counter() - began)
        name = wish.name or folder.resolve().name
        service = Service(engine, tokenizer, name, wish.max_queue, links, metrics=metrics)
        print(f"Chats are written {service.chats.form}.", flush=True)
        web, port = server(service, listen), taken[0].getsockname()[1]
        print(f"Serving '{service.name}' on http://{wish.host}:{port} (Ctrl-C stops it).", flush=True)
        web.run(sockets=taken)
        if service.worker.failure is not None:
            raise service.worker.failure


def say_stopping(grace_s: int, mesh: "Mesh") -> Callable[[], object]:
    """Says on the first rank that texts under way are let end."""
    word = f"Stopping; texts under way may end within {grace_s} s. Ctrl-C again stops at once."
    return lambda: print(word, flush=True) if mesh.first else None


def made_ready(engine: "Engine", mesh: "Mesh") -> None:
    """Compile and record before anyone waits for it, with a line that says how far it is.

    Prompts of an even and an odd length, since libraries take other kernels for either.
    """
    from counterflow.infer.request import Sampling
    from counterflow.progress import watched

    few = Sampling(max_tokens=4, temperature=0)

    def write(length: int) -> None:
        """All ranks step together."""
        mesh.first_does(lambda: engine.add([0] * min(length, engine.batch.positions), few))
        while not engine.finished():
            engine.step()

    sizes = [1 << power for power in range(engine.batch.max_sequences.bit_length())]
    acts = [partial(write, length) for length in (48, 37)]
    acts += engine.recordings([*sizes, engine.batch.max_sequences], (True, False))
    for act in watched(acts, "compiling and recording", len(acts)) if mesh.first else acts:
        act()
    engine.forget()


def listening_of(wish: Serve) -> "ServerSettings":
    """Where the server listens and what it takes.   Fails: ConfigError, also where its packages are missing."""
    try:
        from counterflow.serve.listen import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed: {installing('serve')}."
        ) from None
    key = wish.api_key or os.environ.get(KEY_VARIABLE, "")
    limits = (wish.max_queue, wish.max_body_bytes, wish.grace_s, wish.receive_s)
    return ServerSettings(wish.host, wish.port, key, *limits, wish.allow_origin)


def engine_of(wish: Serve, folder: Path, mesh: "Mesh") -> "tuple[Engine, Tokenizer]":
    """This rank's engine and the run's tokenizer.   Fails: CounterflowError, on every rank alike."""
    from counterflow.infer.engine import Engine, held_by_cache, pass_rows
    from counterflow.infer.ranks import share_experts
    from counterflow.units import bytes_

    settings = mesh.all_do(
        lambda: settings_of(wish.max_sequences, wish.drafts, wish.positions, wish.cache_bytes)
    )
    model, tokenizer = loaded(folder, wish.averaged, wish.precision, mesh, settings)
    held = held_by_cache(model, settings)
    if not wish.positions and 0 < held < model.config.max_positions:
        settings = replace(settings, positions=held)
        if mesh.first:
            print(
                f"One text may have {held:,} of the model's {model.config.max_positions:,} positions: more do not fit "
                f"into a cache of {bytes_(wish.cache_bytes)} (--cache_bytes).",
                flush=True,
            )

    def made() -> Engine:
        ranks = share_experts(model, mesh, pass_rows(model, settings), wish.dispatch)
        return Engine(model, settings, tokenizer.bytes_of, ranks)

    return mesh.all_do(made), tokenizer
