"""`counterflow serve`: a trained run behind OpenAI's API."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from counterflow.errors import ConfigError

KEY_VARIABLE = "COUNTERFLOW_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Serve a trained run by OpenAI's completions and chat completions, with a page to try it."""

    run: str
    """The run's folder, such as runs/tiny, or its name."""
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
    """Texts that are written at once."""
    max_queue: int = 1024
    """Texts that may wait; more are refused with 429."""
    max_body_bytes: int = 2**20
    cache_bytes: float = 2**30
    """At most so much for the cache of latents."""
    drafts: int = -1
    """Tokens drafted ahead by the multi-token modules, at most; 0: none; −1: one by each."""
    grace_s: int = 30
    """How long texts under way may go on once the server is told to stop."""
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    precision: str = "fp32"
    """fp32 or bf16."""


def run(arguments: Sequence[str]) -> int:
    """Serve until told to stop."""
    shown = Annotated[Serve, tyro.conf.FlagCreatePairsOff]
    serve(tyro.cli(shown, prog="counterflow serve", args=arguments, use_underscores=True))
    return 0


def serve(wish: Serve) -> None:
    """Load the run, say where it is served, and serve."""
    try:
        from counterflow.serve.app import Service
        from counterflow.serve.listen import ServerSettings, listening, server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed; install it: pip install 'counterflow[serve]'."
        ) from None
    from counterflow.infer.engine import Engine, EngineSettings
    from counterflow.infer.place import placed
    from counterflow.train.restore import folder_of, model_of

    key = wish.api_key or os.environ.get(KEY_VARIABLE, "")
    listen = ServerSettings(wish.host, wish.port, key, wish.max_queue, wish.max_body_bytes, wish.grace_s)
    settings = EngineSettings(
        max_sequences=wish.max_sequences, cache_bytes=wish.cache_bytes, drafts=wish.drafts
    )
    folder = folder_of(wish.run)
    model, tokenizer = model_of(folder, wish.averaged)
    engine = Engine(placed(model, wish.device, wish.precision, settings), settings, tokenizer.decode)
    name = wish.name or folder.resolve().name
    with listening(listen) as socket:
        print(
            f"Serving '{name}' on http://{wish.host}:{socket.getsockname()[1]} (Ctrl-C stops it).", flush=True
        )
        server(Service(engine, tokenizer, name, wish.max_queue), listen).run(sockets=[socket])
