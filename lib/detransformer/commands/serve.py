"""`detransformer serve`: serves a model over HTTP on a cluster's devices until it is stopped."""

import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from detransformer.commands import options

TOKEN = "DETRANSFORMER_TOKEN"  # environment variable with the token that clients must show


def serve(
    cluster: options.Cluster,
    model: options.Folder,
    host: options.Host = None,
    listen: Annotated[str, typer.Option(help="Address of the HTTP server, on the file's first device.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of the HTTP server.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            parser=options.path, help=f"File with the token that requests show; default: {TOKEN}, else a new one."
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(parser=options.path, help="Real hosts: file with the cluster's secret, the same on all."),
    ] = None,
    method: Annotated[str, typer.Option(help="auto (the fastest plan), or one by name, as for run.")] = "auto",
    plan: options.Plan = None,
    seq_len: Annotated[int, typer.Option(min=1, max=8192, help="Tokens of a usual request, for planning.")] = 128,
    queue: Annotated[
        int, typer.Option(min=1, max=100_000, help="Maximum of waiting requests; further ones are refused with 503.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Maximum of requests answered together.")] = 8,
    threads: options.Threads = None,
    time_scale: Annotated[float, typer.Option(min=0.1, max=64, help="Emulated: factor of slowdown.")] = 1,
) -> None:
    """Serve a model over HTTP on a cluster's devices, and replan when devices come or go.

    On real hosts, start the same command on every one. The first device of the file has the HTTP server; while it is
    up, the remaining devices answer every accepted request.
    """
    from detransformer.cluster.hosts import Hosts, interface_of, own_interfaces, own_rank
    from detransformer.cluster.spec import ClusterSpec

    asked = dict(plan=plan, method=method, max_waiting=queue, max_batch=batch, seq_len=seq_len, on_event=_say)
    options = dict(time_scale=time_scale, threads=threads or 1)
    spec = ClusterSpec.load(cluster)
    if not spec.emulated:
        interfaces = own_interfaces()
        own = own_rank(spec, host, interfaces)
        if secret_file is None:
            raise ValueError(f"{cluster} lists real hosts: give --secret-file, a file with the same secret on all.")
        options |= {"own": own, "secret": _secret(secret_file), "interface": interface_of(spec, own, interfaces)}
        options["threads"] = threads or os.cpu_count() or 1
    elif host:
        raise ValueError(f"--host {host} is for real hosts, and {cluster} lists emulated devices; leave it out.")

    from detransformer.opening import find_folder, open_checkpoint
    from detransformer.service.http import build_app, server_config
    from detransformer.service.session import Session
    from detransformer.service.tasks import path_of

    model = str(find_folder(model))
    path = path_of(open_checkpoint(model).config)
    if options.get("own"):
        with Hosts(spec, model, **options) as hosts:
            hosts.start()
            _say(f"{spec.names[own]} takes part; {spec.names[0]} answers")
            while True:
                time.sleep(3600)
    import uvicorn

    token = _token(token_file)
    with _listener(listen, port) as listener, Session(spec, model, **asked, **options) as session:
        shown = f"[{listen}]" if ":" in listen else listen
        _say(f"listening on http://{shown}:{port}{path}")
        uvicorn.Server(server_config(build_app(session, token))).run(sockets=[listener])


def _listener(address: str, port: int) -> socket.socket:
    """
    Raises:
        ValueError: if this host has no such address, or something listens there already.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: the host name is too long
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot listen at {address} port {port} ({why}): choose another --listen or --port."
        ) from None


def _token(file: Path | None) -> str:
    """The token from a file or the environment, or a new one, which is shown once."""
    if file:
        return _secret(file)
    if given := os.environ.get(TOKEN):
        return _checked(given, TOKEN)
    token = secrets.token_urlsafe(24)
    _say(f"token: {token}")
    return token


def _secret(file: Path) -> str:
    """
    Raises:
        ValueError: if the file is missing, short, or readable by others.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file: make one, as by `openssl rand -hex 32 > {file}; chmod 600 {file}`.")
    if file.stat().st_mode & 0o077:
        raise ValueError(f"{file} can be read by others: chmod 600 {file}.")
    return _checked(file.read_text(encoding="utf-8", errors="replace"), file)


def _checked(text: str, place: str | Path) -> str:
    """A secret from `place`, without white space around it; ValueError if it is short or not ASCII."""
    secret = text.strip()
    if len(secret) < 16 or not secret.isascii():
        raise ValueError(f"{place} has {len(secret)} characters; give 16 or more, all ASCII.")
    return secret


def _say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)
