"""Meshes, channels, dispatch. Here only how a backend is opened; their table is in `config/backends.py`."""

from importlib import import_module

from counterflow.comm.dispatch import Dispatcher, Terms
from counterflow.comm.exchange import GroupExchange
from counterflow.comm.peers import Peers
from counterflow.config.backends import BACKENDS, backends
from counterflow.errors import ConfigError


def open_dispatcher(name: str, peers: Peers, terms: Terms) -> Dispatcher:
    """This rank's dispatcher of a backend's name.   Fails: ConfigError where the backend cannot be used."""
    row, whole = BACKENDS[name], peers.whole
    if (
        isinstance(whole, GroupExchange)
        and whole.group is not None
        and row.device not in ("", whole.device.type)
    ):
        error = ConfigError(
            f"dispatch is {name} and the device is {whole.device.type}; it needs {row.device}: set dispatch to "
            f"{' or '.join(backends(lambda row: not row.device))}."
        )
        error.shared = True
        raise error
    module, _, function = row.opens.partition(":")
    return getattr(import_module(module), function)(peers, terms)
