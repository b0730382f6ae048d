"""A session: its parts, and one over real processes in namespaces that loses a device and gets it back."""

import contextlib
import os
import socket
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from safetensors.torch import load, save
from tests.chaos.faults import DAMAGE, FAULTS, STEP, Field, can_damage, can_step_clock, clock_variables, set_ingress
from tests.chaos.load import run_load
from tests.chaos.rounds import Clients, play, small_model
from tests.chaos.soak import soak_result
from transformers import BertForMultipleChoice, BertForSequenceClassification

from conftest import wait_until
from detransformer.cluster import answering
from detransformer.cluster.devices import DeviceLost
from detransformer.cluster.network import INTERFACE, can_emulate
from detransformer.cluster.request import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import repository_root
from detransformer.parallel.plan import Plan
from detransformer.service import http, speeds
from detransformer.service.http import MAX_BODY_BYTES, build_app
from detransformer.service.session import Session
from detransformer.service.speeds import Patience, Speeds
from detransformer.service.waiting import MAX_ATTEMPTS, Asked, Expired, QueueFull, Unanswered, join_rows

CLUSTER = """
name: three for tests
emulated: true
link: {bandwidth_mbps: 1000}
devices:
  - {name: first, device: jetson-nano}
  - {name: second, device: jetson-nano}
  - {name: third, device: jetson-nano}
"""


@pytest.mark.parametrize("left", [False, True])
def test_requests_are_joined_with_padding_that_is_masked(left):
    parts = [{"input_ids": torch.ones(2, n, dtype=torch.int64)} for n in (3, 5)]
    joined = join_rows(parts, left)
    assert joined["input_ids"].shape == (4, 5)
    assert joined["attention_mask"].tolist() == [[0, 0, 1, 1, 1] if left else [1, 1, 1, 0, 0]] * 2 + [[1] * 5] * 2


def steady(seen: Speeds, *spent_s: float, batch_s: float = 0.1, num_batches: int = 40) -> dict:
    """What was found slow while each batch took `spent_s`; the profile says 0.01 s of each device."""
    found = {}
    for _ in range(num_batches):
        found |= seen.observe(batch_s, {device: (seconds, 0.01) for device, seconds in enumerate(spent_s)})
    return found


def test_a_device_is_slow_against_its_own_usual_and_not_when_all_are():
    seen = Speeds()
    assert steady(seen, 0.01, 0.02, 0.015) == {}
    assert steady(seen, 0.05, 0.10, 0.075) == {}  # the host is busy
    found = steady(seen, 0.05, 0.60, 0.075)
    assert list(found) == [1] and found[1] > 3 and seen.factors == found
    assert steady(seen, 0.05, 0.10) == {1: 1.0} and seen.factors == {}  # the third has no part


def test_a_device_that_stands_still_now_and_then_is_slow_and_one_that_was_held_up_once_is_not():
    seen = Speeds()
    assert steady(seen, 0.01, 0.01, 0.01) == {}
    assert steady(seen, 0.01, 0.21, 0.01, batch_s=0.3, num_batches=1) == steady(seen, 0.01, 0.01, 0.01) == {}
    found = {}
    for number in range(30):  # in every third batch, which a median would not see
        found |= steady(seen, 0.01, 0.1 if number % 3 == 0 else 0.01, 0.01, num_batches=1)
    assert list(found) == [1]


def test_slow_devices_are_found_within_a_window_of_long_batches_too_and_forgotten():
    seen = Speeds()
    assert steady(seen, 0.5, 0.5, batch_s=1.5, num_batches=speeds.IGNORED + speeds.BATCHES) == {}
    assert list(steady(seen, 0.5, 5.0, batch_s=6.0, num_batches=speeds.BATCHES)) == [1]
    assert seen.forget() == [1] and seen.factors == {}


def test_patience_grows_with_what_batches_of_a_kind_took_and_with_their_tokens():
    patience = Patience()
    for seconds in [50.0] * speeds.FIRST + [0.5, 0.25, 7.0]:  # the first load weights
        assert patience.limit_s("a", 10) >= speeds.STALL_S
        patience.took("a", 10, seconds)
    assert patience.limit_s("a", 10) == patience.limit_s("a", 1) == speeds.STALL_S + speeds.TIMES * 0.5
    assert patience.limit_s("a", 30) == speeds.STALL_S + speeds.TIMES * 1.5
    assert patience.limit_s("b", 1) == speeds.FIRST_S


def test_a_second_answer_is_counted_and_one_to_who_has_given_up_is_not():
    asked = Asked(Request(), {"input_ids": torch.ones(1, 1)}, deadline=0.0)
    assert asked.settle({"logits": 1}) and not asked.settle({"logits": 2})
    assert asked.future.result() == {"logits": 1}
    given_up = Asked(Request(), {"input_ids": torch.ones(1, 1)}, deadline=0.0)
    given_up.future.cancel()
    assert given_up.settle({"logits": 1})


def test_tokens_are_told_once_and_an_answer_that_begins_otherwise_is_none():
    heard: list[list[int]] = []
    asked = Asked(Request(), {"input_ids": torch.ones(2, 1)}, deadline=0.0, on_token=heard.append)
    for step, tokens in enumerate([[1, 2], [3, 4]]):
        asked.hear(step, tokens)
    for step, tokens in enumerate([[1, 2], [3, 4], [5, 6]]):  # asked again of the devices that are left
        asked.hear(step, tokens)
    assert heard == [[1, 2], [3, 4], [5, 6]]
    asked.hear(0, [7, 2])
    assert asked.settle({"tokens": torch.ones(2, 3)})
    with pytest.raises(Unanswered, match="differ from those sent already"):
        asked.future.result()


class Workers:
    """A fleet whose workers say what a test wants: `plans` in turn, and logits of zeros."""

    def __init__(self, *plans: dict):
        self.plans, self.devices, self.number, self.asked = list(plans), (0, 1), 1, []

    def run(self, job: str, arguments: dict, payload: bytes = b"", *, number: int, **options) -> dict:
        if number != self.number:
            raise DeviceLost(0, "they have met anew")
        self.asked.append(job)
        if job.endswith(":plan"):
            return {0: (self.plans.pop(0), b"")}
        rows = len(load(payload)["input_ids"])
        result = {"compute_s": None}
        return {0: (result, b""), 1: (result, save({"logits": torch.zeros(rows, 3)}))}

    def close(self, **options) -> None:
        self.devices = ()


PLAN = {"job": {"plan": {}}, "last": 1}


@pytest.fixture
def idle(tmp_path, model):
    """Makes a session that serves, over workers that are made up."""
    sessions = []

    def start(workers: Workers) -> Session:
        (tmp_path / "cluster.yaml").write_text(CLUSTER)
        model.save_pretrained(tmp_path / "model")
        session = Session(ClusterSpec.load(tmp_path / "cluster.yaml"), tmp_path / "model")
        session.fleet = workers
        session._thread = threading.Thread(target=session._serve, daemon=True)
        session._thread.start()
        sessions.append(session)
        return session

    yield start
    for session in sessions:
        session.close()


def test_requests_wait_for_devices_that_are_needed_and_do_not_run_out_of_attempts(idle):
    workers = Workers(*[{"postponed": "nothing fits"}] * 2 * MAX_ATTEMPTS, PLAN)
    session = idle(workers)
    future = session.submit({"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    late = session.submit({"input_ids": torch.ones(1, 5, dtype=torch.int64)}, deadline_s=0.5)
    for _ in range(2 * MAX_ATTEMPTS):  # so often two of three devices meet
        wait_until(lambda: not session.serving, 5)
        assert not future.done()
        time.sleep(0.1)
        workers.number += 1
    assert "requests wait for the devices that are away: nothing fits" in [event.sentence for event in session.events]
    with pytest.raises(Expired):
        late.result(5)
    assert torch.equal(future.result(5)["logits"], torch.zeros(1, 3))


def test_a_plan_is_made_once_for_requests_of_a_kind_and_anew_for_other_devices(idle):
    workers = Workers(PLAN, PLAN)
    session = idle(workers)
    ids = torch.ones(1, 4, dtype=torch.int64)
    for _ in range(3):
        session({"input_ids": ids})
    workers.devices, workers.number = (0, 1, 2), 2
    session({"input_ids": ids})
    assert [job.rpartition(":")[2] for job in workers.asked] == ["plan", *["answer"] * 3, "plan", "answer"]


TIGHT = CLUSTER.replace("jetson-nano", "jetson-nano, memory_mib: 2")


def state_of(folder: Path, cluster: str, config, devices=(0, 1, 2)) -> SimpleNamespace:
    """A worker's, of the first device in a group of `devices`."""
    (folder / "cluster.yaml").write_text(cluster)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    home = {"cluster": str(folder / "cluster.yaml"), "model": str(folder / "model"), "group": list(devices)}
    return SimpleNamespace(home=home, kept={}, rank=0, device=0)


@pytest.mark.parametrize(
    ("devices", "request_", "word"),
    [
        ((0, 1, 2), Request(repeats=1), "job"),
        ((0, 1), Request(repeats=1), "postponed"),  # together they have 4 MiB, and the model wants more
        ((0, 1), Request(repeats=1, method="single"), "refused"),  # on all three it would not fit either
    ],
)
def test_what_only_all_devices_can_hold_is_postponed(tmp_path, devices, request_, word):
    config = small_model().config
    config.update({"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 10})
    state = state_of(tmp_path, TIGHT, config, devices)
    assert word in answering.plan(state, asdict(request_), seq_len=4)


def test_a_plan_names_ranks_of_the_group(tmp_path, model):
    for devices in ((0, 1, 2), (0, 2)):
        state = state_of(tmp_path, CLUSTER, model.config, devices)
        told = answering.plan(state, asdict(Request(method="tp", repeats=1)), seq_len=16)
        made = Plan.from_dict(told["job"]["plan"])
        assert made.num_devices == len(devices) and max(made.device_ids) < len(devices) and told["last"] in devices


def test_memory_grows_by_what_the_last_samples_have_over_the_first_warm_ones():
    samples = pd.DataFrame({"seconds": [10.0 * n for n in range(101)]})
    samples["front_mib"] = [100.0] * 21 + [200.0] * 60 + [203.0] * 20  # the warm-up does not count
    samples["devices_mib"] = 900.0
    clients = SimpleNamespace(
        seconds=array("d", [0.1] * 99 + [7.0]), asked=100, answered=100, full=0, expired=0, lost=0, wrong=0, twice=0
    )
    result = soak_result(samples, clients)
    assert result["front_growth"] == pytest.approx(0.015) and result["devices_growth"] == 0
    assert (result["p50_s"], result["p99_s"], result["slowest_s"]) == (0.1, 0.1, 7.0)


@pytest.mark.slow
@pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])
def test_many_clients_at_once_get_their_own_answers_and_refusals():
    said: list[str] = []
    row = run_load(str(repository_root() / "examples/jetsons.yaml"), 0.1, num_clients=12, say=said.append)
    assert row["held"], said
    assert row["answered"] + row["refused"] + row["full"] == row["asked"] and min(row["answered"], row["refused"]) > 5


# --- Real processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def session(tmp_path_factory, model):
    can, why = can_emulate()
    if not can:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("service")
    (folder / "cluster.yaml").write_text(CLUSTER)
    model.save_pretrained(folder / "model")
    spec = ClusterSpec.load(folder / "cluster.yaml")
    variables = {2: clock_variables(folder / "clock")} if can_step_clock()[0] else {}
    options = dict(method="tp", paced=False, max_waiting=4, max_batch=3, variables=variables)
    with Session(spec, folder / "model", **options) as session:
        assert session.wait_for_all(120)
        yield session


def answers(session: Session, model, count: int, first: int = 0) -> list[float]:
    """The error of each of `count` different requests, asked by two threads at once."""
    generator = torch.Generator().manual_seed(first)
    lengths = [1 + (first + i) % 17 for i in range(count)]
    asked = [torch.randint(model.config.vocab_size, (1, n), generator=generator) for n in lengths]
    with torch.inference_mode():
        expected = [model(input_ids=ids).logits for ids in asked]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda ids: session({"input_ids": ids}, deadline_s=90)["logits"], asked))
    return [float((own - other).abs().max()) for own, other in zip(found, expected, strict=True)]


def test_a_session_answers_as_one_device_does_also_in_batches(session, model):
    assert session.present == (0, 1, 2)
    assert max(answers(session, model, 20)) < 1e-4
    assert session.counts["answered"] == 20
    ids = torch.randint(101, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
    found = session({"input_ids": ids, "attention_mask": mask})["logits"]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "out of memory", DAMAGE, "slow", STEP])
def test_a_fault_is_named_and_nothing_is_lost_wrong_or_answered_twice(session, model, name, tmp_path):
    """Some of the faults of `make chaos`, in as much time as a busy machine needs."""
    fault = FAULTS[name]
    can, why = fault.possible()
    if not can:
        pytest.skip(why)
    clock = session.hosts.variables.get(2, {}).get("CLOCK_STEP_FILE")
    with Clients(session, model) as clients:
        row = play(fault, Field(session, 2, tmp_path, clock and Path(clock)), clients)
    assert (row["lost"], row["wrong"], row["twice"]) == (0, 0, 0) and row["requests"] > 10, clients.errors
    assert row["served_s"] is not None and (row["named_s"] is not None or not fault.names), list(session.events)
    assert session.wait_for_all(60), "the device is back"


LARGE = "meta length > 1300 drop"  # frames of nearly full size are lost, as where a path takes only smaller ones


@pytest.mark.skipif(not can_damage()[0], reason=can_damage()[1])
def test_a_message_that_never_comes_although_all_live_is_given_up_and_the_request_answered(session, model):
    assert session.wait_for_all(60)
    namespace = session.hosts.network.namespaces[2]
    ids = torch.randint(model.config.vocab_size, (1, model.config.max_position_embeddings))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    for _ in range(speeds.RECENT):
        session({"input_ids": ids}, deadline_s=60)
    before, retried = len(session.events), session.counts["retried"]
    set_ingress(namespace, INTERFACE, LARGE)
    began = time.monotonic()
    try:
        future = session.submit({"input_ids": ids}, deadline_s=90)

        def told() -> list:
            return list(session.events)[before:]

        wait_until(lambda: any("has not come" in event.sentence for event in told()), 30, told)
        assert not future.done() and time.monotonic() - began > speeds.STALL_S
    finally:
        set_ingress(namespace, INTERFACE, "")
    assert (future.result(90)["logits"] - expected).abs().max() < 1e-4
    assert session.counts["retried"] == retried + 1
    assert not any(event.kind == "lost" for event in told())


def test_a_session_refuses_what_it_cannot_take(session):
    ids = torch.ones(1, 4, dtype=torch.int64)
    for inputs, words in (
        ({"input_ids": ids + 200}, "vocabulary"),
        ({"input_ids": ids.repeat(9, 1)}, "at most"),
        ({"input_ids": ids, "position_ids": ids}, "not known"),
    ):
        with pytest.raises(ValueError, match=words):
            session.submit(inputs)
    with pytest.raises(Expired):
        session({"input_ids": ids}, deadline_s=0.0)


def test_a_full_queue_refuses_and_says_when_to_come_again(session):
    ids = torch.ones(1, 50, dtype=torch.int64)
    futures = []
    with pytest.raises(QueueFull, match="ask again in") as refused:
        for _ in range(200):
            futures.append(session.submit({"input_ids": ids}))
    assert refused.value.retry_after_s >= 1
    assert all("logits" in future.result(60) for future in futures)


@pytest.fixture
def client(session):
    return TestClient(build_app(session, "the token of this test"), raise_server_exceptions=False)


TOKEN = {"Authorization": "Bearer the token of this test", "Content-Type": "application/json"}


def test_http_answers_as_the_model_does(client, model):
    body = {"input_ids": [1, 2, 3], "model": "what clients send", "user": "and is not known"}
    reply = client.post("/classify", json=body, headers=TOKEN)
    assert reply.status_code == 200
    with torch.inference_mode():
        (logits,) = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert reply.json()["logits"] == pytest.approx(logits.tolist(), abs=1e-4)
    assert sum(reply.json()["probabilities"]) == pytest.approx(1)
    assert reply.json()["label"] == model.config.id2label[int(logits.argmax())]


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({"json": {}}, 422, "either text or input_ids"),
        ({"json": {"input_ids": [1], "text": "both"}}, 422, "either"),
        ({"json": {"text": "there is no tokenizer"}}, 422, "tokenizer"),
        ({"json": {"input_ids": [1, -1]}}, 422, "input_ids.1"),
        ({"json": {"input_ids": [1, 100_000]}}, 422, "vocabulary"),
        ({"json": {"input_ids": [1] * 65}}, 422, "shorten"),
        ({"json": {"input_ids": [1], "deadline_s": 1e9}}, 422, "deadline_s"),
        ({"json": {"input_ids": [1], "text_pair": "both"}}, 422, "text_pair goes with text"),
        ({"json": {"input_ids": [1], "deadline_s": 1e-9}}, 504, "deadline"),
        ({"content": b"{"}, 422, "not JSON"),
        ({"content": b"x" * (MAX_BODY_BYTES + 1)}, 413, "bytes at most"),
    ],
)
def test_http_says_what_is_wrong(client, sent, status, words):
    reply = client.post("/classify", headers=TOKEN, **sent)
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]


def test_http_wants_its_token_and_tells_nothing_without(client):
    for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic dXNlcjpwdw=="}):
        for reply in (client.post("/classify", json={"input_ids": [1]}, headers=headers), client.get("/metrics")):
            assert reply.status_code == 401
            assert list(reply.json()) == ["error", "error_type"]
    assert client.get("/nothing").status_code == 404
    assert "/classify" in client.get("/nothing").json()["error"]


def test_http_does_not_wait_for_who_says_nothing_or_only_begins(session, monkeypatch):
    monkeypatch.setattr(http, "HEAD_S", 0.5)
    monkeypatch.setattr(http, "BODY_S", 0.5)
    server = uvicorn.Server(http.server_config(build_app(session, "the token of this test")))
    request = b"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    request += f"Authorization: {TOKEN['Authorization']}\r\nContent-Length: 17\r\n".encode()
    body = b'{"input_ids":[1]}'
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        running = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        running.start()
        silent, begun, bodiless, whole = (
            stack.enter_context(socket.create_connection(listener.getsockname(), 10)) for _ in range(4)
        )
        begun.sendall(request)
        bodiless.sendall(request + b"\r\n" + body[:4])
        whole.sendall(request + b"\r\n" + body)
        assert whole.recv(4096).startswith(b"HTTP/1.1 200"), "answered although others hold connections"
        whole.sendall(request)  # another one, begun on the same connection
        assert bodiless.recv(4096).startswith(b"HTTP/1.1 408")
        for connection in (silent, begun, whole):
            while left := connection.recv(4096):  # of the answer
                assert connection is whole and b"HTTP/1.1" not in left
        server.should_exit = True
        running.join(10)


def test_http_tells_health_and_metrics(client, session):
    health = client.get("/health", headers=TOKEN)
    assert health.status_code == 200
    assert health.json()["devices"] == ["first", "second", "third"]
    assert client.get("/health").json() == {"status": "serving"}, "who has no token learns no names"
    text = client.get("/metrics", headers=TOKEN).text
    assert f"detransformer_answered_total {session.counts['answered']:.1f}" in text
    assert 'detransformer_device{name="third"} 1.0' in text


def test_no_process_and_no_namespace_outlive_a_session(session):
    """The last to use it: it ends here."""
    import psutil

    trees = [psutil.Process(agent.pid) for agent in session.hosts.agents.values()]
    trees += [child for tree in trees for child in tree.children(recursive=True)]
    assert len(trees) >= 9  # an agent, its fork server and a worker each
    namespaces = list(session.hosts.network.namespaces)
    ids = torch.ones(1, 1, dtype=torch.int64)
    assert session({"input_ids": ids})["logits"].shape == (1, 3)
    session.close()
    time.sleep(0.5)
    assert not [process for process in trees if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not [name for name in namespaces if os.path.exists(f"/var/run/netns/{name}")]
    assert not session.hosts.folder.exists()
    with pytest.raises(Unanswered, match="ended"):
        session.submit({"input_ids": ids})


# --- The command -------------------------------------------------------------------------------------------------

REAL = """
name: two hosts
devices:
  - {name: first, device: rpi4b, address: 127.0.0.1}
  - {name: second, device: rpi4b, address: 10.99.0.2}
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "0"], "--port"),
        (["--queue", "none"], "--queue"),
        (["--host", "first"], "real hosts"),
        (["--token-file", "{folder}/nothing"], "is not a file"),
        (["--token-file", "{folder}/open"], "can be read by others"),
        (["--token-file", "{folder}/short"], "characters"),
        (["--model", "{folder}/choices"], "BertForMultipleChoice"),
        (["--cluster", "{folder}/real.yaml"], "--secret-file"),
    ],
)
def test_serve_says_what_is_wrong_before_anything_starts(tmp_path, model, capsys, arguments, words):
    from detransformer.cli import main

    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "real.yaml").write_text(REAL)
    model.save_pretrained(tmp_path / "model")
    BertForMultipleChoice(model.config).save_pretrained(tmp_path / "choices")
    for name, text, mode in (("open", "x" * 32, 0o644), ("short", "x", 0o600)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    given = {"--cluster": str(tmp_path / "cluster.yaml"), "--model": str(tmp_path / "model")}
    given |= {arguments[0]: arguments[1].format(folder=tmp_path)}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["serve", *(word for pair in given.items() for word in pair)])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0]
