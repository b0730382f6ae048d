"""Clients that ask a `detransformer serve` over HTTP, all at once and one request in ten malformed."""

import contextlib
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import torch
from tests.chaos.rounds import GIVE_UP_S, TOLERANCE, small_model

from detransformer.service.session import START_S

NUM_CLIENTS = 30
ONE_IN = 10  # requests: malformed
NUM_INPUTS = 60
LONG = "9" * 2**20
MALFORMED: tuple[tuple[str, bytes, int], ...] = (  # path, body, the status that says so
    ("/classify", b"", 422),
    ("/classify", b'{"input_ids": [1, 2', 422),
    ("/classify", b"\xff\xfe\x00", 400),
    ("/classify", b'{"input_ids": []}', 422),
    ("/classify", b'{"input_ids": [101]}', 422),  # the vocabulary has 101 tokens
    ("/classify", b'{"input_ids": [-1]}', 422),
    ("/classify", b'{"input_ids": [1e400]}', 422),
    ("/classify", b'{"input_ids": [[1, 2], [3]]}', 422),
    ("/classify", b'{"input_ids": [%s]}' % b",".join([b"1"] * 65), 422),  # the model has 64 positions
    ("/classify", b'{"input_ids": [1], "deadline_s": -1}', 422),
    ("/classify", b'{"text": "words for a model without a tokenizer"}', 422),
    ("/classify", f'{{"input_ids": [{LONG}]}}'.encode(), 413),
    ("/generate", b'{"input_ids": [1]}', 404),
    ("/embed", b'{"inputs": [[1, 2]]}', 424),
)


class Tally:
    """What became of the requests of all clients."""

    def __init__(self):
        self.asked = self.answered = self.refused = self.full = self.wrong = 0
        self.unexpected: list[str] = []  # a 500, a malformed request that was answered, a connection that broke
        self.seconds: list[float] = []  # of those answered
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(cluster: str, model: Path) -> Iterator[tuple[str, str]]:
    """A process of `detransformer serve`, from when it answers on: its address, and its token."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, token = f"http://127.0.0.1:{port}", secrets.token_urlsafe(24)
    command = [sys.executable, "-m", "detransformer.cli", "serve", "--cluster", cluster, "--model", str(model)]
    started = subprocess.Popen(
        [*command, "--method", "tp", "--port", str(port)], env=os.environ | {"DETRANSFORMER_TOKEN": token}
    )
    try:
        deadline = time.monotonic() + START_S + GIVE_UP_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("`detransformer serve` did not start; its words are above.")
            time.sleep(0.2)
        yield url, token
    finally:
        started.terminate()
        started.wait(GIVE_UP_S)


def run_load(cluster: str, minutes: float, num_clients: int = NUM_CLIENTS, say: Callable[[str], None] = print) -> dict:
    """Load for `minutes`, each client asking again when it is answered; counts and latencies as a row."""
    tally, stop = Tally(), threading.Event()
    model, generator = small_model(), torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 65, (NUM_INPUTS,), generator=generator).tolist()
    inputs = [torch.randint(101, (1, length), generator=generator) for length in lengths]
    with torch.inference_mode():
        expected = [model(input_ids=ids).logits[0] for ids in inputs]
    with tempfile.TemporaryDirectory(prefix="detransformer-load-") as folder:
        model.save_pretrained(folder)
        with serving(cluster, Path(folder)) as (url, token):

            def ask_on(number: int) -> None:
                chosen = random.Random(number)
                with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=120) as http:
                    while not stop.is_set():
                        which = chosen.randrange(NUM_INPUTS)
                        malformed = chosen.randrange(ONE_IN) == 0 and chosen.choice(MALFORMED)
                        ask(http, tally, malformed or None, inputs[which], expected[which])

            began = time.monotonic()
            threads = [threading.Thread(target=ask_on, args=(number,), daemon=True) for number in range(num_clients)]
            for thread in threads:
                thread.start()
            stop.wait(60 * minutes)
            stop.set()
            for thread in threads:
                thread.join(130)
            lasted_s = time.monotonic() - began
    for words in dict.fromkeys(tally.unexpected):
        say(words)
    seconds = sorted(tally.seconds)
    return {
        "minutes": minutes,
        "clients": num_clients,
        "asked": tally.asked,
        "answered": tally.answered,
        "refused": tally.refused,
        "full": tally.full,
        "unexpected": len(tally.unexpected),
        "wrong": tally.wrong,
        "answered_per_s": tally.answered / lasted_s,
        "p50_s": seconds[len(seconds) // 2],
        "p99_s": seconds[int(0.99 * (len(seconds) - 1))],
        "slowest_s": seconds[-1],
        "held": not tally.wrong and not tally.unexpected,
    }


def ask(
    http: httpx.Client,
    tally: Tally,
    malformed: tuple[str, bytes, int] | None,
    ids: torch.Tensor,
    expected: torch.Tensor,
) -> None:
    """Asks what is malformed, or else for the logits of `ids`, and counts what comes."""
    path, body, status = malformed or ("/classify", f'{{"input_ids": {ids[0].tolist()}}}'.encode(), 200)
    started = time.monotonic()
    try:
        reply = http.post(path, content=body)
    except httpx.TransportError as error:
        with tally.lock:
            tally.asked += 1
            tally.unexpected.append(f"{path} {body[:40]!r}: {type(error).__name__}: {error}")
        return
    took_s, full = time.monotonic() - started, reply.status_code == 503 and "Retry-After" in reply.headers
    with tally.lock:
        tally.asked += 1
        tally.full += full
        if full:
            pass
        elif reply.status_code != status:
            tally.unexpected.append(f"{path} {body[:40]!r}: {reply.status_code} and not {status}: {reply.text[:200]}")
        elif malformed:
            tally.refused += 1
        else:
            tally.answered += 1
            tally.seconds.append(took_s)
            tally.wrong += float((torch.tensor(reply.json()["logits"]) - expected).abs().max()) > TOLERANCE
    if full:
        time.sleep(float(reply.headers["Retry-After"]))
