"""The fitted link: how much of Table IV it explains, with how few numbers, and links of every kind of collective."""

import math

import pytest

from detransformer.cluster.devices import preset_profile
from detransformer.models import preset_config
from detransformer.models.configuration import PRESET_SIZES
from detransformer.parallel.plan import PAPER_METHODS, published_plan
from detransformer.planning.cost import predict
from detransformer.planning.fitting import fit_parameters, fit_rows, fitted_link, summary
from detransformer.planning.profile import COLLECTIVE_KINDS, ClusterProfile, LinkProfile


def test_fit_explains_table_iv_but_for_its_outlier():
    rows = fit_rows()
    cells = rows[rows["baseline"] != "single"]
    assert len(cells) == 20 and len(rows) == 22
    off = cells[(cells["ratio"] - 1).abs() > 0.10]  # 10%, so that measured rows may scatter and stay within 15%
    assert list(off[["bandwidth_mbps", "model", "baseline"]].itertuples(index=False, name=None)) == [
        (1000, "bert-base", "sp")
    ]
    assert ((rows[rows["baseline"] == "single"]["ratio"] - 1).abs() < 0.10).all()
    assert "19 of Table IV's 20 cells" in summary(rows) and "4 parameters" in summary(rows)
    assert "bert-base over sp at 1000 Mbps" in summary(rows)


@pytest.mark.parametrize("model", PRESET_SIZES)
@pytest.mark.parametrize("baseline", ["tp", "sp"])
def test_rows_are_what_the_cost_model_predicts_on_the_preset_device(model, baseline):
    """Fitting knows no presets of `cluster`; its own device must be the same one."""
    rows = fit_rows().query("model == @model and baseline == @baseline")
    for row in rows.itertuples():
        link = fitted_link(model, row.bandwidth_mbps * 1e6)

        def latency_s(method, link=link):
            config = preset_config(model, 4 if method.startswith("bp") else None)
            profile = ClusterProfile((preset_profile("rpi4b", config),) * 4, link)
            return predict(config, published_plan(method, config, [1.0] * 4), profile).latency_s

        speedup = latency_s(baseline) / min(latency_s(method) for method in PAPER_METHODS)
        assert row.fitted == pytest.approx(speedup, rel=1e-9)


def test_efficiencies_are_a_line_that_tcp_could_have():
    parameters = fit_parameters()
    assert parameters["efficiency"].between(0.05, 0.94, inclusive="right").all()
    assert list(parameters["origin"].str.startswith("fitted")).count(True) == 4
    taken = parameters.set_index(["model", "collective"])["efficiency"]
    assert taken["bert-base", "all_to_all"] == taken["bert-base", "all_gather"]


def test_the_fit_is_a_minimum():
    """No pair beside the fitted one has smaller errors on BERT-Base (BERT-Large's all_reduce lies on the limit)."""
    from detransformer.planning import fitting

    def loss(efficiency):
        errors = [
            math.log(fitting._speedup("bert-base", mbps, slower, faster, efficiency) / value)
            for mbps, slower, faster, value in fitting._published("bert-base")
        ]
        return sum(math.sqrt(1 + (e / fitting.ERROR_SCALE) ** 2) for e in errors)

    fitted = {kind: fitted_link("bert-base", 1e9).efficiency[kind] for kind in fitting.FITTED_KINDS}
    for kind in fitted:
        for factor in (0.9, 0.95, 1.05, 1.1):
            assert loss({**fitted, kind: factor * fitted[kind]}) > loss(fitted)


def test_other_models_take_the_nearest_preset(tmp_path):
    config = preset_config("bert-base")
    config.hidden_size = 960
    config.save_pretrained(tmp_path)
    link = fitted_link(str(tmp_path), 125e6)
    assert link.efficiency == fitted_link("bert-large", 125e6).efficiency
    assert "bert-large" in link.source and tmp_path.name in link.source
    with pytest.raises(ValueError, match="neither a preset .* nor a checkpoint's folder"):
        fitted_link("bert-huge", 125e6)


@pytest.mark.parametrize(
    "kind, steps",
    [("all_reduce", 6), ("all_gather", 3), ("all_to_all", 1), ("reduce_scatter", 1), ("send", 1), ("receive", 1)],
)
def test_collectives_wait_for_their_steps_and_their_bytes(kind, steps):
    link = LinkProfile(100e6, {"*": 1e-3}, {kind: 0.5, "*": 1.0})
    assert link.collective_s(kind, 0, 4) == pytest.approx(steps * 1e-3)
    assert link.collective_s(kind, 1e6, 4) == pytest.approx(steps * 1e-3 + 0.16)
    assert kind in COLLECTIVE_KINDS


def test_an_unknown_collective_is_named():
    with pytest.raises(ValueError, match="collective 'broadcast' is unknown: choose one of all_reduce"):
        LinkProfile(100e6).collective_s("broadcast", 1, 4)
