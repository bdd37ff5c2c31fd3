"""Meshes, lanes, channels, dispatch. Here only the table of backends: to add one, a file and a line."""

from collections.abc import Callable, Mapping

from counterflow.comm.dispatch import Dispatcher
from counterflow.comm.local import Local
from counterflow.config.model import ModelConfig

DISPATCHERS: Mapping[str, Callable[[ModelConfig], Dispatcher]] = {"local": lambda config: Local()}
