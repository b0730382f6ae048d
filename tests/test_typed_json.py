"""What crosses JSON (files, pipes, sockets) comes back equal: each dataclass that does is here."""

import json
from dataclasses import asdict

import pytest

from detransformer.cluster.request import Request
from detransformer.coformer.policy import Original, Policy, SubModelConfig
from detransformer.models import preset_config
from detransformer.parallel.plan import Plan, published_plan
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.typed_json import from_json

PLAN = published_plan("pp", preset_config("bert-base"), [1.0, 2.0], "int8")
DEVICE = DeviceProfile("board", 2**30, 1e9, "made up", 4.8e9, (("tensor", 0.25, 128, 1, 0.9),))
LINK = LinkProfile(1e8, shares=(1.0, 0.5))


@pytest.mark.parametrize(
    "record",
    [
        Request(wires=("float32", "int8"), plan=json.loads(json.dumps(PLAN.to_dict())), memory_budget_bytes=2**20),
        Request(text="a film"),
        PLAN,
        DEVICE,
        LINK,
        ClusterProfile((DEVICE, DEVICE), LINK),
        SubModelConfig(2, 48, (2, 3), (70, 80)),
        Policy((SubModelConfig(1, 48, (2,), (70,)), SubModelConfig(2, 24, (1, 1), (8, 9)))),
        Original(num_layers=4, hidden_size=48, num_heads=6, ffn_size=70, seq_len=16, embedding_rows=101),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_that_crossed_json_is_the_one_that_was_sent(record):
    assert from_json(type(record), json.loads(json.dumps(asdict(record)))) == record


@pytest.mark.parametrize(
    "kind, fields, words",
    [
        (Plan, PLAN.to_dict() | {"heads": 12}, "the Plan's heads is 12: input should be a valid tuple"),
        (ClusterProfile, {"devices": [3], "link": asdict(LINK)}, "devices.0 is 3: input should be a dictionary"),
        (Request, {"colour": 1}, "a Request has no field 'colour': it has text, image"),
    ],
)
def test_what_cannot_be_restored_is_refused(kind, fields, words):
    with pytest.raises(ValueError, match=words):
        from_json(kind, fields)
