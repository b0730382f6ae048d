"""What is malformed gets a sentence, never a traceback: cluster files, plans, checkpoints, requests over HTTP.

A few dozen cases each here; `make fuzz` runs ten thousand.
"""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.chaos.rounds import small_model
from transformers import BertConfig

from detransformer.cluster.answering import plan_of
from detransformer.cluster.devices import cluster_profile, device_specs
from detransformer.cluster.hello import model_facts
from detransformer.cluster.network import can_emulate
from detransformer.cluster.request import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.commands.options import read_plan
from detransformer.opening import open_checkpoint
from detransformer.parallel.plan import published_plan
from detransformer.parallel.weights import WeightSource
from detransformer.service.session import Session

CASES = int(os.environ.get("DETRANSFORMER_FUZZ", "40"))
many = settings(
    max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


def places(value, path=()) -> list[tuple]:
    """The path of every item of nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(*path, key) for key, _ in items]
    return found + [deeper for key, item in (items and list(items)) for deeper in places(item, (*path, key))]


@st.composite
def mutated(draw, original):
    """`original` with a few items replaced, removed or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        listed = places(value)
        if not listed:
            break
        *way, last = draw(st.sampled_from(listed))
        holder = value
        for key in way:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            holder[last] = draw(VALUES)
        elif what == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return value


CLUSTER = {
    "name": "three",
    "emulated": True,
    "link": {"bandwidth_mbps": 125, "delay_ms": 0},
    "rendezvous": {"port": 29400},
    "devices": [
        {"name": "a", "device": "rpi4b", "speed": 1, "memory_mib": 1024},
        {"name": "b", "address": "10.0.0.2", "device": "jetson-nano", "bandwidth_mbps": 100},
    ],
}


@many
@given(value=mutated(CLUSTER))
def test_a_mutated_cluster_file_is_read_or_refused_in_a_sentence(tmp_path, value):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    refuse_or_take(lambda: ClusterSpec.load(path), "cluster.yaml")


@many
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_a_cluster_file_of_anything_is_refused_in_a_sentence(tmp_path, data):
    path = tmp_path / "cluster.yaml"
    path.write_bytes(data)
    refuse_or_take(lambda: ClusterSpec.load(path), "cluster.yaml")


def refuse_or_take(action, name: str = "") -> None:
    """`action` works, or raises a ValueError of one sentence; any other error is a defect, and fails the test."""
    try:
        action()
    except ValueError as error:
        assert type(error) is ValueError, repr(error)  # not a UnicodeDecodeError that slipped through, say
        assert name in str(error) and "Traceback" not in str(error) and str(error).strip()


CONFIG = BertConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=96, vocab_size=101
)  # fmt: skip
PROFILE = cluster_profile(device_specs(3, "rpi4b"), CONFIG, 125e6)
PLAN = published_plan("tp", CONFIG, [1.0, 1.0, 1.0]).to_dict()


@many
@given(value=mutated(PLAN))
def test_a_mutated_plan_is_taken_or_refused_in_a_sentence(tmp_path, value):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value), encoding="utf-8")

    def use() -> None:
        plan_of(Request(plan=read_plan(str(path))), CONFIG, PROFILE, 1, 16)

    refuse_or_take(use)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return folder


@many
@given(seed=st.integers(0, 2**32), of_header=st.booleans())
def test_a_damaged_checkpoint_is_refused_in_a_sentence(tmp_path, checkpoint, seed, of_header):
    folder = copied(checkpoint, tmp_path)
    path, chosen = folder / "model.safetensors", random.Random(seed)
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if of_header else len(data)
    for _ in range(chosen.randint(1, 8)):
        data[chosen.randrange(end)] = chosen.randrange(256)
    path.write_bytes(data[: chosen.randrange(len(data))] if chosen.random() < 0.3 else data)
    refuse_or_take(lambda: read_all(folder))


@many
@given(data=st.data())
def test_a_mutated_config_is_taken_or_refused_in_a_sentence(tmp_path, checkpoint, data):
    folder = copied(checkpoint, tmp_path)
    value = data.draw(mutated(json.loads((checkpoint / "config.json").read_text())))
    (folder / "config.json").write_text(json.dumps(value), encoding="utf-8")
    refuse_or_take(lambda: read_all(folder))


WEIGHTS = ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight", "pooler.dense.bias")


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "model", dirs_exist_ok=True))


def read_all(folder: Path) -> None:
    """What a host does with a model's folder before it computes."""
    model_facts(str(folder))
    checkpoint = open_checkpoint(folder)
    source = WeightSource(folder)
    for name in WEIGHTS:
        source.take(name)
    assert checkpoint.config.num_hidden_layers > 0


@pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])
@pytest.mark.timeout(0)
@pytest.mark.slow
def test_http_survives_whatever_its_description_allows_and_forbids(tmp_path, checkpoint):
    import schemathesis
    from fastapi.testclient import TestClient
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    from detransformer.service.http import build_app

    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | {"devices": [CLUSTER["devices"][0]]}))
    with Session(ClusterSpec.load(tmp_path / "cluster.yaml"), str(checkpoint), paced=False) as session:
        app = build_app(session, "token")
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)

        seen: set[int] = set()

        def ask(case) -> None:
            response = case.call(headers={"Authorization": "Bearer token"})
            # a description cannot say how many tokens this model takes, and of which vocabulary
            excluded = [positive_data_acceptance, *([negative_data_rejection] if response.status_code == 413 else [])]
            case.validate_response(response, excluded_checks=excluded)
            seen.add(response.status_code)
            assert response.status_code < 500 or response.status_code in (503, 504), response.text

        for mode, status in (("POSITIVE", 200), ("NEGATIVE", 422)):
            cases = schema.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
            seen.clear()
            few = settings(max_examples=max(CASES // 2, 10), deadline=None, suppress_health_check=list(HealthCheck))
            few(given(cases)(ask))()
            assert status in seen, (mode, seen)
        assert TestClient(app).get("/health").json()["status"] == "serving"
        assert session.counts["unanswered"] == 0
