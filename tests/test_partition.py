"""Splits and plans: pure functions, checked by tables."""

import itertools
import json

import pytest

from detransformer.models import preset_config
from detransformer.parallel.methods import METHODS
from detransformer.parallel.partition import Plan, bounds, split
from detransformer.parallel.plan import check_plan, keeps_whole, published_plan


@pytest.mark.parametrize(
    "total, speeds, expected",
    [
        (12, [1, 1, 1, 1], [3, 3, 3, 3]),
        (128, [1, 1, 1], [43, 43, 42]),
        (16, [1, 1, 1], [6, 5, 5]),
        (4, [1, 1, 1], [2, 1, 1]),
        (12, [1, 1, 2, 4], [1, 1, 3, 7]),  # done after 1.75; [2, 1, 3, 6], by largest remainder, after 2
        (4, [1, 1, 2, 4], [0, 0, 1, 3]),
        (2, [1, 1, 1], [1, 1, 0]),
    ],
)
def test_split(total, speeds, expected):
    assert split(total, speeds) == expected
    assert sum(split(total, speeds)) == total
    edges = [bounds(expected, rank) for rank in range(len(expected))]
    assert edges[0][0] == 0 and edges[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(edges, edges[1:], strict=False))


@pytest.mark.parametrize("speeds", [[1, 2], [3, 1, 1], [0.5, 1.7, 2], [1, 1, 2, 4], [4, 1, 3, 0.1]])
@pytest.mark.parametrize("total", [1, 4, 7])
def test_no_split_is_done_earlier(total, speeds):
    """Against all splits there are."""

    def done_at(sizes) -> float:
        return max(size / speed for size, speed in zip(sizes, speeds, strict=True))

    every = (s for s in itertools.product(range(total + 1), repeat=len(speeds)) if sum(s) == total)
    assert done_at(split(total, speeds)) == min(map(done_at, every))


@pytest.mark.parametrize("speeds", [[], [1, 0], [1, -2]])
def test_split_needs_positive_speeds(speeds):
    with pytest.raises(ValueError, match="above 0"):
        split(4, speeds)


@pytest.mark.parametrize(
    "method, expected",
    [
        ("bp+tp", "(2 block + tensor) x4"),
        ("bp+sp", "(2 block + sequence) x4"),
        ("bp+allgather", "(2 block + replicate) x4"),
        ("pp", "stages of 3+3+3+3 layers"),
    ],
)
def test_describe(method, expected):
    plan = published_plan(method, preset_config("bert-base", 4), [1.0] * 4)
    assert plan.describe() == expected
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("method, runs", [("pp", "stages"), ("dp", "copies"), ("dtensor", "dtensor"), ("tp", "layers")])
def test_what_a_plan_runs_is_in_a_field_of_its_own(method, runs):
    plan = published_plan(method, preset_config("bert-base"), [1.0] * 4)
    assert plan.runs == runs and plan.splits_layers == (runs in ("layers", "dtensor"))
    assert not plan.on_one_device().splits_layers and plan.on_one_device().runs == "layers"


def test_the_name_of_a_plan_decides_nothing():
    """A plan of one's own may be called dp: its layers are split all the same."""
    config = preset_config("bert-base", 4)
    fields = published_plan("bp+tp", config, [1.0] * 4).to_dict() | {"method": "dp"}
    del fields["runs"]  # as in files from before there was this field
    plan = Plan.from_dict(fields)
    check_plan(plan, config)
    assert plan.runs == "layers" and plan.splits_layers and not keeps_whole(plan, 0, 1)


@pytest.mark.parametrize(
    "method, changes, words",
    [
        ("tp", {"runs": "whole"}, "the plan's runs is 'whole': input should be 'layers'"),
        ("tp", {"runs": 1}, "the plan's runs is 1: input should be"),
        ("tp", {"runs": "stages"}, r"stages=\[\] and runs='stages' disagree"),
        ("pp", {"runs": "layers"}, r"stages=\[6, 6\] and runs='layers' disagree"),
        ("sp", {"runs": "dtensor"}, "an unmodified BERT by 'tensor'"),
    ],
)
def test_a_plan_that_says_two_things_is_refused(method, changes, words):
    config = preset_config("bert-base")
    with pytest.raises(ValueError, match=words):
        check_plan(Plan.from_dict(published_plan(method, config, [1.0] * 2).to_dict() | changes), config)


@pytest.mark.parametrize(
    "method, nb, devices, words",
    [
        ("bp+tp", None, 4, "needs a decoupled model"),
        ("tp", 4, 4, "this model is decoupled"),
        ("bp+tp", 4, 5, "5 devices cannot share 4 sub-blocks"),
        ("tp", None, 13, "cannot share 12 heads"),
        ("pp", None, 13, "cannot share 12 layers"),
        ("magic", None, 4, "choose from " + METHODS[0]),
    ],
)
def test_plans_that_do_not_fit_are_refused(method, nb, devices, words):
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        published_plan(method, preset_config("bert-base", nb), [1.0] * devices)
