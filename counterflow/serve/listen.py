"""The server's settings, and uvicorn with them: it listens, and ends what is under way before it stops."""

import re
import socket
from dataclasses import dataclass

import uvicorn

from counterflow.errors import ConfigError
from counterflow.serve.app import Service, application
from counterflow.serve.guard import is_loopback
from counterflow.serve.receive import receiving

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+|null")
"""A web page's origin."""


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    """What clients must bring as a bearer token; empty: none, on a loopback address only."""
    max_queue: int = 1024
    """Texts that may wait; more are refused with 429."""
    max_body_bytes: int = 2**20
    grace_s: int = 30
    """How long texts under way may go on once the server is told to stop."""
    receive_s: float = 30
    """How long a request may take to arrive whole."""
    origins: tuple[str, ...] = ()
    """Web pages' origins that may ask, such as https://chat.example; * for all."""

    def __post_init__(self) -> None:
        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host} and there is no API key; whoever reaches that address could use the model: "
                "set an API key, or listen on 127.0.0.1."
            )
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}; it must lie between 0 (any) and 65535.")
        for name in ("max_queue", "max_body_bytes", "grace_s", "receive_s"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for origin in self.origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allow_origin is '{origin}'; it must be as browsers send it, such as https://chat.example or "
                    "http://localhost:3000, or *."
                )


def listening(settings: ServerSettings) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free.   Fails: ConfigError where that cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]  # Python adds the address to the system's words
        raise ConfigError(
            f"{settings.host} port {settings.port} cannot be listened on ({why}); choose another port or host."
        ) from None


def server(service: Service, settings: ServerSettings) -> uvicorn.Server:
    """The server, to `run` on sockets that listen; SIGINT, SIGTERM and a failed engine end it gracefully."""
    config = uvicorn.Config(
        application(service, settings.api_key, settings.max_body_bytes, settings.origins),
        http=receiving(settings.receive_s),
        log_level="warning",
        timeout_graceful_shutdown=settings.grace_s,
    )
    web = uvicorn.Server(config)

    def end() -> None:
        web.should_exit = True

    service.when_failed = end
    return web
