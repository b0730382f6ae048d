"""`detransformer run`: real processes on hosts that are network namespaces (or loopback), and on emulated devices."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from conftest import random_model, save_with_words, wait_until
from detransformer.cluster import hosts as hosts_module
from detransformer.cluster.hello import model_facts
from detransformer.cluster.hosts import interface_of, own_rank
from detransformer.cluster.network import EmulatedNetwork, can_emulate, enter_namespace, inside
from detransformer.cluster.spec import ClusterSpec
from detransformer.commands.options import read_plan
from detransformer.models import decouple
from detransformer.parallel.plan import published_plan

GOLDEN = json.loads((Path(__file__).parent / "golden/run.json").read_text())  # of the commit before the one worker
HANG_S = 150.0  # no process of a test lives so long, also where three import everything on a slow machine
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a film of great charm who made it the studio in rome".split()
SIZES = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=70, vocab_size=len(WORDS))


def save_model(folder: Path, kind: type, **fields) -> Path:
    """A small decoupled model with a head and a tokenizer."""
    model = random_model(kind, BertConfig(**SIZES | fields))
    save_with_words(decouple(model, num_original_layers=2, num_divisions=4), WORDS, folder)
    return folder


def save_decoder(folder: Path) -> Path:
    """A small decoupled GPT-2 and a tokenizer; its weights are large enough for texts to vary."""
    sizes = dict(n_embd=48, n_layer=4, n_head=6, n_inner=70, vocab_size=len(WORDS), n_positions=64)
    model = random_model(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=None, eos_token_id=3), std=0.3)
    save_with_words(decouple(model, num_original_layers=2, num_divisions=4), WORDS, folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return save_model(tmp_path_factory.mktemp("models") / "classifier", BertForSequenceClassification, **labels)


# --- Hosts -------------------------------------------------------------------------------------------------------


class Hosts:
    """Hosts pi1, pi2, ... of a cluster file: a network namespace each, or all on loopback."""

    def __init__(self, folder: Path, addresses: list[str], namespaces: list[str] | None):
        self.namespaces = namespaces
        self.names = [f"pi{i + 1}" for i in range(len(addresses))]
        self.file = folder / "cluster.yaml"
        devices = [
            {"name": name, "address": address, "device": "rpi4b"}
            for name, address in zip(self.names, addresses, strict=True)
        ]
        where = {"link": {"bandwidth_mbps": 100}, "rendezvous": {"port": 29400 if namespaces else free_ports()}}
        self.file.write_text(yaml.safe_dump({"name": "shelf", **where, "devices": devices}))
        self.running: list[subprocess.Popen] = []

    def start(self, number: int, model: Path, *options, command: str = "run") -> subprocess.Popen:
        """The command on host `number`, 0 being pi1."""
        words = [command, "--cluster", self.file, "--model", model, *options]
        words += [] if self.namespaces else ["--host", self.names[number]]
        process = subprocess.Popen(
            [sys.executable, "-m", "detransformer.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            preexec_fn=self.namespaces and (lambda: enter_namespace(self.namespaces[number])),
        )
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


def free_ports() -> int:
    """A port that is free, and so is the next one."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@contextmanager
def hosts(folder: Path, count: int, backwards: bool = False):
    """`count` hosts on a switch at 100 Mbps, or on loopback where namespaces are not permitted.

    `backwards`: the first one's address is the last.
    """
    with EmulatedNetwork(count, 100e6) if can_emulate()[0] else nullcontext() as network:
        step = -1 if backwards else 1
        addresses = network.addresses[::step] if network else ["127.0.0.1"] * count
        made = Hosts(folder, addresses, network and network.namespaces[::step])
        try:
            yield made
        finally:
            made.stop()


@contextmanager
def computing(folder: Path, count: int, model: Path):
    """The commands on `count` hosts in the middle of requests that do not end by themselves."""
    with hosts(folder, count) as shelf:
        running = [shelf.start(i, model, "--method", "bp+tp", "--repeats", "1000000") for i in range(count)]
        for process in running:
            wait_for(process.stderr, "of 6 heads")
        time.sleep(1)
        yield running


def ended(process: subprocess.Popen, timeout_s: float = HANG_S) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=timeout_s)
    return process.returncode, stdout, stderr


def last_sentence(stderr: str) -> str:
    """The only line of an error, after what was said before."""
    lines = stderr.strip().splitlines()
    assert lines[-1].startswith("detransformer: ") and lines[-1].endswith("."), stderr
    assert sum(line.startswith("detransformer: ") for line in lines) == 1 and "Traceback" not in stderr, stderr
    return lines[-1]


def children_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Processes below `process`, at any depth, as they were started."""
    return sorted(psutil.Process(process.pid).children(recursive=True), key=psutil.Process.create_time)


@pytest.mark.slow
def test_three_hosts_answer_as_one_does(classifier, tmp_path):
    """A worker a host over shaped links, by a plan of a file; each has its own copy of the model; all end well."""
    copies = [shutil.copytree(classifier, tmp_path / f"copy{i}") for i in range(3)]
    plan = published_plan("bp+tp", AutoConfig.from_pretrained(classifier), [1.0] * 3)
    (tmp_path / "plan.json").write_text(json.dumps({"plan": plan.to_dict()}))
    options = ["--text", "a film of great charm", "--plan", tmp_path / "plan.json", "--repeats", "2", "--check"]
    with hosts(tmp_path, 3) as shelf:
        running = [shelf.start(i, copies[i], *options, "--output", tmp_path / f"{i}.json") for i in (2, 1, 0)]
        results = [ended(process) for process in reversed(running)]
    for code, _, stderr in results:
        assert code == 0, stderr
    (_, shown, _), (_, other, told), _ = results
    assert "on pi1, pi2, pi3; float32" in shown and "'a film of great charm' -> " in shown
    assert "agrees with the single device's" in shown and "latency: " in shown and "predicted" in shown
    assert other == "" and "pi2: 1 of 4 sub-blocks, 2 of 6 heads" in told and "the answer is on pi1" in told
    record = json.loads((tmp_path / "0.json").read_text())
    assert record["check"]["max_abs_error"] < 1e-4 and len(record["samples_s"]) == 2
    assert record["answer"]["label"] in ("bad", "good") and set(record["weights_bytes"]) == {"pi1", "pi2", "pi3"}
    assert not (tmp_path / "1.json").exists()


@pytest.mark.slow
def test_a_text_goes_on_over_two_hosts_as_on_one(tmp_path):
    """The tokens that transformers generates; the request crosses JSON on its way to the workers."""
    folder = save_decoder(tmp_path / "gpt2")
    prompt = BertTokenizer.from_pretrained(folder)("a film of", return_tensors="pt")
    prompt.pop("token_type_ids")
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = model.generate(**prompt, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = ["--text", "a film of", "--new-tokens", "9", "--method", "bp+tp"]
    with hosts(tmp_path, 2) as shelf:
        running = [shelf.start(i, folder, *options, "--output", tmp_path / f"{i}.json") for i in range(2)]
        for process in running:
            code, _, stderr = ended(process)
            assert code == 0, stderr
    record = json.loads((tmp_path / "0.json").read_text())
    assert record["answer"]["tokens"] == text[0, prompt["input_ids"].shape[1] :].tolist()
    assert record["plan"]["decode"]["method"] == "bp+tp" and set(record["weights_bytes"]) == {"pi1", "pi2"}


def wait_for(stream, words: str, timeout_s: float = HANG_S) -> list[str]:
    """Reads lines until one has `words`; ends the wait by failing."""
    lines: list[str] = []
    timer = threading.Timer(timeout_s, stream.close)
    timer.start()
    try:
        for line in stream:
            lines.append(line)
            if words in line:
                return lines
    except ValueError:  # closed by the timer
        pass
    finally:
        timer.cancel()
    raise AssertionError(f"no {words!r} in {timeout_s} s: {lines}")


@pytest.mark.slow
def test_a_killed_host_ends_all_and_is_named(classifier, tmp_path):
    """In the middle of requests: within seconds one sentence on each of the others, and no process is left."""
    with computing(tmp_path, 3, classifier) as running:
        below = [child for process in running for child in children_of(process)]
        assert len(below) >= 9  # the agent, its fork server and the worker on each
        for process in running:  # a board's memory is not for torch a third time
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "python" in loaded and "libtorch" not in loaded and "tokenizers" not in loaded
        running[2].send_signal(signal.SIGKILL)
        start = time.monotonic()
        for process in running[:2]:
            code, _, stderr = ended(process)
            assert code == 1 and "pi3 (" in last_sentence(stderr) and "is gone" in last_sentence(stderr)
        assert time.monotonic() - start < 10
        wait_until(lambda: not any(child.is_running() for child in below), 10)


@pytest.mark.slow
def test_a_killed_worker_is_told_from_those_who_lose_their_connection(classifier, tmp_path):
    """As when the kernel takes a process for want of memory: its host is named, by all."""
    with computing(tmp_path, 2, classifier) as running:
        children_of(running[1])[-1].kill()  # the worker
        for process in running:
            code, _, stderr = ended(process)
            assert code == 1
            assert "pi2 (" in last_sentence(stderr) and "was killed by SIGKILL" in last_sentence(stderr)


@pytest.mark.slow
def test_a_host_that_does_not_come_is_named(classifier, tmp_path):
    with hosts(tmp_path, 3) as shelf:
        running = [shelf.start(i, classifier, "--wait", "9") for i in range(2)]
        for process in running:
            code, _, stderr = ended(process)
            assert code == 1 and "waiting for " in stderr
            for words in ("pi3 (", "did not come within 9 s", "start the same command there"):
                assert words in last_sentence(stderr)
    with hosts(tmp_path, 2) as shelf:
        code, _, stderr = ended(shelf.start(1, classifier, "--wait", "2"))
        assert code == 1 and "waiting for pi1 (" in stderr
        assert "), the first device, does not answer at port" in last_sentence(stderr)


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))


def change_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_it, words",
    [
        (shutil.rmtree, "cannot take part: model folder .* does not exist on this host"),
        (change_weights, "has weights whose digest is .*, and pi1 .*: copy the model's folder anew"),
    ],
    ids=["no-folder", "weights"],
)
def test_another_model_on_a_host_is_refused(classifier, tmp_path, break_it, words):
    copy = shutil.copytree(classifier, tmp_path / "copy")
    break_it(copy)
    with hosts(tmp_path, 2) as shelf:
        running = [shelf.start(0, classifier), shelf.start(1, copy)]
        for process in running:
            code, _, stderr = ended(process)
            assert code == 2 and re.search(r"pi2 \(\S+\) " + words, last_sentence(stderr)), stderr


@pytest.mark.slow
def test_an_interrupted_host_is_named(classifier, tmp_path):
    with hosts(tmp_path, 2) as shelf:
        waiting = shelf.start(1, classifier)
        wait_for(waiting.stderr, "waiting for pi1 (")
        waiting.send_signal(signal.SIGINT)
        assert ended(waiting)[0] == 130
    with computing(tmp_path, 2, classifier) as running:
        running[1].send_signal(signal.SIGINT)
        assert ended(running[1])[0] == 130
        code, _, stderr = ended(running[0])
        assert code == 1 and "pi2 (" in last_sentence(stderr) and "it was interrupted" in last_sentence(stderr)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_ends_all(classifier, tmp_path):
    """What the first device was told counts, not what the others were."""
    with hosts(tmp_path, 2) as shelf:
        running = [shelf.start(i, classifier, "--method", method) for i, method in enumerate(("tp", "bp+tp"))]
        for process in running:
            code, _, stderr = ended(process)
            assert code == 2 and "tp runs original layers only" in last_sentence(stderr)


# --- What loads what --------------------------------------------------------------------------------------------------


def test_the_command_on_a_host_loads_no_torch():
    """Nor do the front and the cluster's file: its worker does."""
    code = (
        "import sys\nimport detransformer.cli, detransformer.cluster.run, detransformer.cluster.session\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


@pytest.mark.slow
def test_the_models_are_known_to_transformers_once_they_are_imported(classifier):
    code = (
        "import detransformer.models\nfrom transformers import AutoModel\n"
        f"print(type(AutoModel.from_pretrained({str(classifier)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=200, capture_output=True, text=True)
    assert done.stdout.strip() == "DecoupledBertModel"


# --- This host ---------------------------------------------------------------------------------------------------


def test_a_host_finds_itself_in_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "devices:\n  - {name: a, address: 10.0.0.1, device: rpi4b}\n  - {name: b, address: 10.0.0.2, device: rpi4b}"
    )
    spec = ClusterSpec.load(path)
    board = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]}
    assert own_rank(spec, None, board) == own_rank(spec, "b", board) == 1
    for host, interfaces, words in [
        (None, {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7"]}, r"\(10.0.0.7\) are not in .*a \(10.0.0.1\) and b .*--host"),
        (None, {"lo": ["127.0.0.1"]}, "none but loopback"),
        ("a", board, "--host a has the address 10.0.0.1 .* this host has 10.0.0.2"),
        ("x", board, "--host x is not in"),
    ]:
        with pytest.raises(ValueError, match=words):
            own_rank(spec, host, interfaces)
    assert interface_of(spec, 1, board) == "eth0"
    path.write_text("interface: wg0\n" + path.read_text())
    spec = ClusterSpec.load(path)
    assert own_rank(spec, "a", board) == 0  # such as behind a tunnel
    assert interface_of(spec, 0, board | {"wg0": ["10.9.0.1"]}) == "wg0"
    for interfaces in (board, board | {"wg0": []}):
        with pytest.raises(ValueError, match=r"c.yaml: interface wg0 .* this host, which has lo and eth0: correct it"):
            interface_of(spec, 0, interfaces)
    path.write_text(path.read_text().replace("10.0.0.1", "127.0.0.1").replace("10.0.0.2", "127.0.0.1"))
    with pytest.raises(ValueError, match="several devices .* --host"):
        own_rank(ClusterSpec.load(path), None, board)
    path.write_text(f"devices: [{{name: a, address: {'x' * 70}.invalid, device: rpi4b}}]")
    with pytest.raises(ValueError, match="the host name x+.invalid is not known on this host"):
        own_rank(ClusterSpec.load(path), "a", board)


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_in_use_is_named_before_anything_starts(classifier, tmp_path, taken):
    """The port where all meet, and the next one, which is the store's."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        path = tmp_path / "c.yaml"
        path.write_text(
            f"rendezvous: {{port: {port - taken}}}\ndevices: [{{name: a, address: 127.0.0.1, device: rpi4b}}]"
        )
        options = dict(own=0, stays=False)
        with hosts_module.Hosts(ClusterSpec.load(path), str(classifier), **options) as hosts:
            with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 is in use.*rendezvous.port"):
                hosts.listen()


def test_model_facts_tell_copies_from_other_models(classifier, tmp_path):
    copy = shutil.copytree(classifier, tmp_path / "copy")
    assert model_facts(str(copy)) == model_facts(str(classifier))
    for change, key in [(change_config, "config"), (change_weights, "weights")]:
        change(copy)
        assert model_facts(str(copy))[key] != model_facts(str(classifier))[key]
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        model_facts(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        model_facts(str(copy))


@pytest.mark.parametrize("text", ["{", "[]", '{"method": "tp"}'])
def test_what_is_no_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is not a plan .*make one with `detransformer plan`"):
        read_plan(tmp_path / "plan.json")


# --- Emulated devices --------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, tmp_path):
    """`detransformer run` on two unequal devices over modelled links: exit code, what is shown, and the error."""
    from detransformer import cli

    path = tmp_path / "c.yaml"
    path.write_text(
        "name: pair\nemulated: true\ndevices: [{name: a, device: rpi4b}, {name: b, device: rpi4b, speed: 3}]"
    )

    def call(model: Path, *options) -> tuple[int, str, str]:
        capsys.readouterr()
        words = ["run", "--cluster", path, "--model", model, "--transport", "loopback", *options]
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, words)))
        return end.value.code, *capsys.readouterr()

    return call


def is_golden(record: dict, name: str) -> bool:
    """Whether answer, bytes and weights are those of earlier commits."""
    return {field: record.get(field) for field in GOLDEN[name]} == GOLDEN[name]


@pytest.mark.slow
def test_the_same_command_over_emulated_devices(run, tmp_path):
    """A question, answered by two unequal devices; the plan it kept is run again."""
    folder = save_model(tmp_path / "qa", BertForQuestionAnswering)
    options = ["--text", "who made it", "--repeats", "2", "--check"]
    code, shown, error = run(folder, *options, "--method", "bp+sp", "--output", tmp_path / "out.json",
                             "--context", "the studio in rome made it")  # fmt: skip
    assert code == 0, error
    for words in ("pair (Raspberry Pi 4B, Raspberry Pi 4B at 3x speed (emulated), modelled link)", "on a, b; float32"):
        assert words in shown
    assert "agrees with the single device's" in shown and "'who made it' -> " in shown
    record = json.loads((tmp_path / "out.json").read_text())
    assert 0 < record["answer"].pop("score") < 1 and is_golden(record, "qa")
    assert record["plan"]["sub_blocks"] == [1, 3] and record["latency_s"] >= record["predicted_s"]
    code, shown, error = run(folder, *options, "--plan", tmp_path / "out.json", "--context", "a film of charm")
    assert code == 0 and "plan: bp+sp" in shown, error


@pytest.mark.slow
def test_text_goes_on_over_emulated_devices(run, tmp_path):
    """A GPT-2 over two unequal devices: the single device's tokens, and the text that they are."""
    folder = save_decoder(tmp_path / "gpt2")
    options = ["--text", "a film of", "--check"]
    asked = ["--new-tokens", "9", "--method", "bp+tp", "--output", tmp_path / "out.json"]
    code, shown, error = run(folder, *options, *asked)
    assert code == 0 and "check: all tokens are the single device's" in shown, error
    record = json.loads((tmp_path / "out.json").read_text())
    assert is_golden(record, "gpt2") and len(record["token_s"]) == 9 and record["answer"]["text"] in shown
    code, _, error = run(folder, *options, "--new-tokens", "80")
    assert code == 2 and "5 tokens and 80 new ones, and the model takes 64" in error
    code, _, error = run(folder, *options, "--new-tokens", "9", "--wire", "int8")
    assert code == 2 and "GPT-2 is run with --wire float32" in error


@pytest.mark.parametrize(
    "options, words",
    [
        (["--text", "a", "--tokens", "3"], "--tokens 3 cannot be combined with --text"),
        (["--context", "a"], "--context needs --text"),
        (["--host", "a"], "--host a is for real hosts"),
        (["--tokens", "600"], "has 600 tokens, and the model takes 512"),
        (["--plan", "/nowhere/p.json"], "/nowhere/p.json does not exist"),
        (["--method", "magic"], "'magic' is unknown"),
        (["--method", "tp"], "tp runs original layers only"),
        (["--wire", "float32,int8", "--method", "bp+tp"], "several formats"),
        (["--wait", "0"], "--wait 0 is out of range"),
        (["--model", "bert-base"], "--model bert-base is a preset"),
        (["--output", "/"], "--output / is a folder"),
    ],
)
@pytest.mark.slow
def test_wrong_requests_are_one_sentence(run, classifier, options, words):
    code, _, stderr = run(classifier, *options)
    assert code == 2 and words in last_sentence(stderr)


# --- Serving -----------------------------------------------------------------------------------------------------


def asked(namespace: str, path: str, body: dict | None = None) -> tuple[int, dict]:
    """Status and answer of a request from inside a host."""
    headers = {"Authorization": f"Bearer {TOKEN}"}

    def ask() -> httpx.Response:
        method = "GET" if body is None else "POST"
        return httpx.request(method, f"http://127.0.0.1:8000{path}", json=body, headers=headers, timeout=90)

    try:
        reply = inside(namespace, ask)
    except httpx.TransportError as error:
        return 0, {"error": str(error)}
    return reply.status_code, reply.json()


TOKEN = "a token that nobody guesses"


@pytest.mark.slow
@pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])
def test_two_hosts_serve_over_http_and_one_goes_and_returns(classifier, tmp_path):
    for name, text in (("token", TOKEN), ("secret", "the same on all hosts")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    request = {"text": "a film of great charm"}
    tokens = BertTokenizer.from_pretrained(classifier)(request["text"], return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModelForSequenceClassification.from_pretrained(classifier)(**tokens).logits[0].tolist()
    with hosts(tmp_path, 2, backwards=True) as shelf:  # torch counts hosts by address: its first is not ours
        options = ["--token-file", tmp_path / "token", "--secret-file", tmp_path / "secret", "--threads", "1"]

        def serve(number: int) -> subprocess.Popen:
            return shelf.start(number, classifier, "--host", shelf.names[number], *options, command="serve")

        def wait_for(*names: str) -> None:
            def seen() -> tuple[int, dict]:
                assert shelf.running[0].poll() is None
                return asked(shelf.namespaces[0], "/health")

            wait_until(lambda: seen()[0] == 200 and seen()[1].get("devices") == list(names), HANG_S, seen)

        def check_answer() -> None:
            status, answer = asked(shelf.namespaces[0], "/classify", request)
            assert status == 200 and answer["logits"] == pytest.approx(expected, abs=1e-4)

        serve(0)
        other = serve(1)
        wait_for("pi1", "pi2")
        check_answer()
        other.kill()
        wait_for("pi1")
        check_answer()
        serve(1)
        wait_for("pi1", "pi2")
        check_answer()
        shelf.running[0].send_signal(signal.SIGINT)
        code, _, said = ended(shelf.running[0], 30)
        assert code in (0, 130)
        sentences = [line.partition(" ")[2] for line in said.splitlines()]
        (lost,) = [sentence for sentence in sentences if " gone" in sentence or "silent" in sentence]
        assert lost.startswith("pi2 "), said
