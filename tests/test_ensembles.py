"""Sub-models over real processes: the single process's answer, a lost device, a late one, times and bytes."""

import os
import signal
import time

import pytest
import torch

from coformer_cases import make_ensemble
from detransformer.cluster.devices import DeviceLost
from detransformer.cluster.session import EmulatedCluster
from detransformer.coformer.aggregator import KINDS
from detransformer.coformer.distributed import run_ensemble
from detransformer.coformer.ensemble import load_ensemble, whole_answer

JETSONS = ["jetson-nano", "jetson-tx2", "jetson-orin-nano"]
CENTRAL = 1


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return make_ensemble("coformer", tmp_path_factory.mktemp("ensemble") / "coformer")


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(1, 60, (2, 12)), "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_an_aggregator_comes_back_from_its_files(kind, tmp_path):
    for _ in range(2):  # the second time over the first
        ensemble = make_ensemble(kind, tmp_path / kind)
    one, two = ensemble.aggregator(), load_ensemble(tmp_path / kind).aggregator()
    assert (one.kind, one.widths, one.num_labels) == (kind, (16, 16, 16), 4) and not one.training
    generator = torch.Generator().manual_seed(2)
    answers = [torch.randn(5, 16 if one.learned else 4, generator=generator) for _ in range(3)]
    present = [True, False, True]
    assert torch.equal(one(answers, present), two(answers, present))
    if one.learned:
        assert all(mean.abs().sum() > 0 for mean in two.mean.split(16))


@pytest.mark.parametrize("kind", ["coformer", "average"])
@pytest.mark.slow
def test_devices_answer_as_one_process_does(kind, inputs, tmp_path):
    ensemble = make_ensemble(kind, tmp_path / kind)
    with EmulatedCluster(3, JETSONS, 100e6) as cluster:
        run = run_ensemble(cluster, ensemble, inputs, repeats=2)
    assert run.present == (True, True, True) and not run.lost and run.sentence == "All 3 sub-models answered."
    torch.testing.assert_close(run.logits, whole_answer(ensemble, inputs), rtol=1e-5, atol=1e-5)
    learned = ensemble.aggregator().learned
    for number, record in enumerate(run.records):
        width = ensemble.policy.widths[number] if learned else 4
        if number != CENTRAL:  # one message, pooled features or logits of two samples
            assert record["counts"] == {"gather": 1} and record["bytes"] == {"gather": 2 * 4 * width}
    assert len(run.samples_s) == 2 and 0 < run.latency_s < 1


@pytest.mark.slow
@pytest.mark.parametrize("device, end, words", [(2, signal.SIGKILL, "SIGKILL"), (0, signal.SIGSTOP, "device 0")])
def test_a_lost_or_late_device_is_left_out_and_named(ensemble, inputs, device, end, words):
    with EmulatedCluster(3, JETSONS, 100e6) as cluster:
        run_ensemble(cluster, ensemble, inputs)
        os.kill(cluster.pids[device], end)
        start_s = time.monotonic()
        run = run_ensemble(cluster, ensemble, inputs)
        assert time.monotonic() - start_s < 20
        present = [number != device for number in range(3)]
        assert list(run.present) == present and f"device {device}" in run.sentence
        assert "2 of 3 sub-models answered" in run.sentence and words in run.sentence
        expected = whole_answer(ensemble, inputs, present)
        torch.testing.assert_close(run.logits, expected, rtol=1e-5, atol=1e-5)
        again = run_ensemble(cluster, ensemble, inputs)  # and from then on
        torch.testing.assert_close(again.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_the_central_device_there_is_no_answer(ensemble, inputs):
    with EmulatedCluster(3, JETSONS, 100e6) as cluster:
        run_ensemble(cluster, ensemble, inputs)
        os.kill(cluster.pids[CENTRAL], signal.SIGKILL)
        with pytest.raises(DeviceLost, match="device 1"):
            run_ensemble(cluster, ensemble, inputs)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no ensemble.json"):
        load_ensemble(tmp_path)
    (tmp_path / "ensemble.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_ensemble(tmp_path)
    made = make_ensemble("senet", tmp_path / "senet")
    weights, described = made.folder / "aggregator.safetensors", made.folder / "ensemble.json"
    kept = weights.read_bytes()
    for content in (kept[:40], b""):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="aggregator.safetensors is missing, damaged"):
            made.aggregator()
    weights.write_bytes(kept)
    described.write_text(described.read_text().replace('"num_labels": 4', '"num_labels": 5'))
    with pytest.raises(ValueError, match="aggregator.safetensors is missing, damaged or of other sizes"):
        load_ensemble(made.folder).aggregator()
