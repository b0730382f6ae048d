"""`detransformer serve`: a model behind HTTP on a cluster's devices, for as long as it is let."""

import os
import secrets
import socket
import sys
import time
from pathlib import Path

from detransformer.cluster.hosts import Hosts, interface_of, own_interfaces, own_rank
from detransformer.cluster.run import read_plan
from detransformer.cluster.spec import ClusterSpec
from detransformer.parse import number, whole_number

TOKEN = "DETRANSFORMER_TOKEN"  # environment variable: what who asks must show


def serve_command(
    cluster: str,
    model: str,
    host: str | None,
    listen: str,
    port: str,
    token_file: str | None,
    secret_file: str | None,
    method: str,
    plan: str | None,
    seq_len: str,
    queue: str,
    batch: str,
    threads: str | None,
    time_scale: str,
) -> None:
    """Serves until it is interrupted; on a host that is not the file's first, takes part."""
    asked = dict(
        plan=read_plan(plan) if plan else None,
        method=method,
        max_waiting=whole_number(queue, "--queue", 1, 100_000),
        max_batch=whole_number(batch, "--batch", 1, 1024),
        on_event=_say,
    )
    asked["seq_len"] = whole_number(seq_len, "--seq-len", 1, 8192)
    options = dict(
        time_scale=number(time_scale, "--time-scale", 0.1, 64),
        threads=whole_number(threads, "--threads", 1, 1024) if threads else 1,
    )
    http_port = whole_number(port, "--port", 1, 65_535)
    spec = ClusterSpec.load(cluster)
    if not spec.emulated:
        interfaces = own_interfaces()
        own = own_rank(spec, host, interfaces)
        if secret_file is None:
            raise ValueError(f"{cluster} is of real hosts: give --secret-file, a file with the same secret on all.")
        options |= {"own": own, "secret": _secret(secret_file), "interface": interface_of(spec, own, interfaces)}
        if threads is None:
            options["threads"] = os.cpu_count() or 1
    elif host:
        raise ValueError(f"--host {host} is for real hosts, and {cluster} is of emulated devices; leave it out.")

    from detransformer.cluster.checkpoints import open_folder
    from detransformer.service.http import build_app, path_of, server_config
    from detransformer.service.session import Session

    path = path_of(model, open_folder(model).config)
    if options.get("own"):
        with Hosts(spec, model, **options) as hosts:
            hosts.start()
            _say(f"{spec.names[own]} takes part; {spec.names[0]} answers")
            while True:
                time.sleep(3600)
    import uvicorn

    token = _token(token_file)
    with _listener(listen, http_port) as listener, Session(spec, model, **asked, **options) as session:
        shown = f"[{listen}]" if ":" in listen else listen
        _say(f"listening on http://{shown}:{http_port}{path}")
        uvicorn.Server(server_config(build_app(session, token))).run(sockets=[listener])


def _listener(address: str, port: int) -> socket.socket:
    """
    Raises:
        ValueError: where this host has no such address, or something listens there already.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"cannot listen at {address} port {port} ({why}): choose another --listen or --port."
        ) from None


def _token(path: str | None) -> str:
    """From a file, the environment, or made anew and shown once."""
    if path:
        return _secret(path)
    if os.environ.get(TOKEN):
        return os.environ[TOKEN]
    token = secrets.token_urlsafe(24)
    _say(f"token: {token}")
    return token


def _secret(path: str) -> str:
    """
    Raises:
        ValueError: where the file is missing, short, or readable by others.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path} is no file: make one, such as by `openssl rand -hex 32 > {path}; chmod 600 {path}`.")
    if file.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others: chmod 600 {path}.")
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if len(text) < 16 or not text.isascii():
        raise ValueError(f"{path} has {len(text)} characters; give 16 or more, all ASCII.")
    return text


def _say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)
