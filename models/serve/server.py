"""The process of ``cen serve``."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.sources import note
from models.training.errors import UsageError

if TYPE_CHECKING:
    from models.serve.app import Limits, Service


def serve(checkpoint: Path, overrides: Sequence[str], host: str, port: int, **limits: Any) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then those that were taken before it; a second one quits.

    The address is printed once requests are answered.

    Args:
        checkpoint: run folder, checkpoint, or exported file.
        overrides: ``field=value`` assignments.
        host: the address to listen at.
        port: 0: a free one.
        limits: some of ``models.serve.app.Limits``.

    Raises:
        UsageError: the network is none to serve; a limit is no positive number; nobody may listen there; the
            extra ``serve`` is not installed.
    """
    try:
        import uvicorn

        from models.serve.app import Limits, Service
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'cen_ext[serve]'") from None
    from models.serve.scenes import Scenes

    chosen = _checked(replace(Limits(), **limits))
    listening = _listen(host, port)
    with listening:
        service = Service(Scenes.open(checkpoint, overrides, chosen.pixels), chosen)
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}/"
        config = uvicorn.Config(
            _saying(f"serving {checkpoint} at {url}", service.app()),
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
        )
        server = uvicorn.Server(config)
        _run(server, service, listening)
        if not server.force_exit:
            service.worker.close()


def _run(server: Any, service: Service, listening: socket.socket) -> None:
    """Run until the service has stopped.

    uvicorn closes its socket at a signal; here health checks and new requests are told 503 meanwhile.
    """

    def finish() -> None:
        server.should_exit = True

    def handle(number: int, frame: object) -> None:
        if stopping and number == signal.SIGINT:
            server.force_exit = server.should_exit = True
        stopping.append(number)
        service.stop()

    stopping: list[int] = []
    service.on_idle = finish
    server.handle_exit = handle
    server.run(sockets=[listening])


def _saying(text: str, app: Any) -> Any:
    """The application, which prints a line once signals are handled and the socket is answered."""

    async def lifespan(receive: Any, send: Any) -> None:
        await receive()
        print(text, flush=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def saying(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        else:
            await app(scope, receive, send)

    return saying


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address, with a note where others than this machine reach it."""
    if not 0 <= port < 2**16:  # getaddrinfo takes the rest of a division
        raise UsageError(f"--port must be 0 to {2**16 - 1}, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error})") from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        note(f"--host {host}: whoever reaches this machine can use the network, without a password")
    return listening


def _checked(limits: Limits) -> Limits:
    """Refuse limits under which nothing could be answered."""
    for name, least in (("upload_mb", 0), ("megapixels", 0), ("queue", -1)):
        value = getattr(limits, name)
        if not least < value < float("inf"):
            option = f"--{'max-' * (name != 'queue')}{name.replace('_', '-')}"
            raise UsageError(f"{option} must be {'at least 0' if least else 'positive'}, got {value:g}")
    return limits
