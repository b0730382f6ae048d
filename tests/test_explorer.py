"""The control panel of notebooks 05 and 06: what it shows is the planner's, live or not."""

import math
import sys

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from detransformer.cluster.devices import cluster_profile, device_specs
from detransformer.models.configuration import preset_config
from detransformer.parallel.plan import published_plan
from detransformer.planning.cost import predict
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import LinkProfile
from detransformer.report import explorer as module
from detransformer.report.explorer import Settings, about, explorer, panel, plans, shown
from report_frames import latency_rows

SLOW = LinkProfile(1e6, step_latency_s={"*": 0.01}, efficiency={"*": 0.5})


def profile(model: str, num_devices: int, bandwidth_mbps: float, link: LinkProfile | None = None, decoupled=True):
    config = preset_config(model, 4 if decoupled else None, 4)
    return config, cluster_profile(device_specs(num_devices, "rpi4b"), model, config, bandwidth_mbps * 1e6, link=link)


@pytest.mark.parametrize("link", [None, SLOW], ids=["assumed link", "profiled link"])
@pytest.mark.parametrize("model, num_devices, mbps, seq_len", [("bert-base", 4, 125, 128), ("gpt2", 3, 20, 64)])
def test_plans_are_those_of_the_planner(model, num_devices, mbps, seq_len, link):
    table = plans(Settings(model, mbps, num_devices, seq_len=seq_len), link).set_index("method")
    best = place_freely(*profile(model, num_devices, mbps, link), seq_len).chosen
    assert table.loc["bp+auto", "predicted_s"] == best.latency_s
    assert table.loc["bp+auto", "plan"] == best.plan.describe()
    assert table.loc["bp+auto", "memory_mib"] == max(best.prediction.memory_bytes) / 2**20
    config, known = profile(model, num_devices, mbps, link, decoupled=False)
    for method, count in (("single", 1), ("tp", num_devices)):
        expected = predict(config, published_plan(method, config, [1.0] * count), known, seq_len)
        assert table.loc[method, "predicted_s"] == pytest.approx(expected.latency_s, rel=1e-9)
        assert table.loc[method, "compute_s"] + table.loc[method, "comm_s"] == pytest.approx(expected.latency_s)
    assert table.loc["single", "speedup"] == 1 and table.loc["single", "comm_s"] == 0
    assert table.loc["tp", "speedup"] == pytest.approx(
        table.loc["single", "predicted_s"] / table.loc["tp", "predicted_s"]
    )


def test_a_budget_changes_the_plan_and_says_what_the_others_lack():
    roomy = plans(Settings("bert-large", 10, memory_mib=2000)).set_index("method")
    tight = plans(Settings("bert-large", 10, memory_mib=450)).set_index("method")
    assert (roomy["lacks"] == "").all()
    assert tight.loc["single", "lacks"].startswith("needs ") and "450 MiB" in tight.loc["single", "lacks"]
    assert tight.loc["bp+auto", "lacks"] == "" and tight.loc["bp+auto", "memory_mib"] <= 450
    assert tight.loc["bp+auto", "predicted_s"] > roomy.loc["bp+auto", "predicted_s"]


def test_devices_that_are_left_out_are_named():
    settings = Settings(num_devices=5)
    table = plans(settings)
    assert table.set_index("method").loc["bp+auto", "devices"] == 4
    assert "device 4 (Raspberry Pi 4B) is left out: the model has no more sub-blocks" in about(settings, table)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(model="bert-huge"), "model bert-huge is unknown; choose one of bert-base, "),
        (dict(bandwidth_mbps=0), "bandwidth in Mbps 0 is out of range; give one from 0.1 to 100000"),
        (dict(num_devices=9), "number of devices 9 is out of range; give one from 1 to 8"),
        (dict(seq_len=513), "sequence length 513 is out of range; give one from 1 to 512"),
        (dict(memory_mib=-5), "memory budget in MiB -5 is out of range; give 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**wrong)


def test_an_impossible_budget_is_the_planners_sentence():
    with pytest.raises(ValueError, match="no plan fits: even the smallest, .* Give the devices more memory"):
        plans(Settings(memory_mib=50))


def test_measured_rows_stand_beside_only_where_they_are_of_the_same_settings():
    latency = latency_rows()
    at = latency[(latency["link"] == "line-rate") & (latency["num_devices"] == 4) & (latency["method"] == "tp")]
    row = at[(at["model"] == "bert-base") & at["valid"]].iloc[0]
    settings = dict(model="bert-base", bandwidth_mbps=float(row["bandwidth_mbps"]))
    table = plans(Settings(**settings), measured=latency).set_index("method")
    assert table.loc["tp", "measured_s"] == row["latency_s"]
    assert table.loc["single", "measured_s"] > 0
    for other in (dict(seq_len=64), dict(memory_mib=3000), dict(device="jetson-tx2")):
        assert plans(Settings(**settings, **other), measured=latency)["measured_s"].isna().all(), other
    elsewhere = plans(Settings("bert-base", 33.0), measured=latency).set_index("method")
    assert math.isnan(elsewhere.loc["tp", "measured_s"])


def test_without_a_front_end_it_is_the_table_of_the_first_settings():
    table = explorer(num_devices=2, bandwidth_mbps=50)
    html = table.to_html()
    assert table.caption.startswith("BERT-Base, 2 x Raspberry Pi 4B of its own memory each, 50 Mbps, seq 128, batch 1")
    predicted = plans(Settings(num_devices=2, bandwidth_mbps=50))["predicted_s"]
    assert all(f"{value:.3f}" in html for value in predicted)
    assert "lacks" not in html and "measured_s" not in html, "columns without an entry are left out"


def test_without_ipywidgets_a_live_notebook_shows_the_table_too(monkeypatch):
    monkeypatch.setattr(module, "is_watched", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(explorer(), pd.io.formats.style.Styler)


def test_in_a_live_notebook_it_is_the_panel(monkeypatch):
    monkeypatch.setattr(module, "is_watched", lambda: True)
    box = explorer(bandwidth_mbps=250, memory_mib=600)
    assert [child.value for child in box.children[:-1]] == ["bert-base", 250, 4, "600", 128]


def controls(box) -> dict:
    return {child.description: child for child in box.children[:-1]}


def test_moving_a_control_plans_anew():
    box = panel(Settings())
    answer = box.children[-1]
    at = controls(box)
    assert set(at) == {"model", "bandwidth_mbps", "num_devices", "memory_mib", "seq_len"}

    def shows(settings: Settings) -> bool:
        table = plans(settings)
        return about(settings, table) in answer.value and all(f"{v:.3f}" in answer.value for v in table["predicted_s"])

    assert shows(Settings())
    at["bandwidth_mbps"].value = 10.0
    assert shows(Settings(bandwidth_mbps=10.0))
    at["num_devices"].value = 2
    assert shows(Settings(bandwidth_mbps=10.0, num_devices=2))
    at["memory_mib"].value = " 900 "
    at["model"].value = "gpt2"
    at["seq_len"].value = 32
    assert shows(Settings("gpt2", 10.0, 2, 900.0, 32))


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("memory_mib", "50", "no plan fits: even the smallest, "),
        ("memory_mib", "much", "memory budget in MiB much is not a number; give 1 or more."),
        ("seq_len", 0, "sequence length 0 is out of range; give one from 1 to 512."),
        ("bandwidth_mbps", float("nan"), "bandwidth in Mbps nan is not a finite number; give one from 0.1 to 100000."),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_and_put_right_again(field, value, sentence):
    box = panel(Settings())
    at, before = controls(box)[field], controls(box)[field].value
    at.value = value
    assert box.children[-1].value.startswith(f"<p>{sentence}") and "Traceback" not in box.children[-1].value
    at.value = before
    assert "BP+Auto" in box.children[-1].value and "<p>" not in box.children[-1].value


def executed(allow_stdin: bool) -> dict:
    """The output of a cell with the explorer, executed with or without somebody to ask."""
    source = "from detransformer.report.explorer import explorer\nexplorer(num_devices=2)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client = NotebookClient(notebook, kernel_name="python3", timeout=200)
    with client.setup_kernel():
        client.kc.allow_stdin = allow_stdin
        client.execute_cell(notebook.cells[0], 0)
    (output,) = notebook.cells[0].outputs
    return output["data"]


def test_an_executed_notebook_has_the_table_and_no_widget():
    data = executed(allow_stdin=False)
    assert "BP+Auto" in data["text/html"]
    assert not any("widget" in kind for kind in data) and "widget" not in data["text/html"].lower()


def test_a_front_end_that_answers_gets_the_widgets():
    assert "application/vnd.jupyter.widget-view+json" in executed(allow_stdin=True)


def test_shown_names_methods_and_what_they_lack():
    html = shown(plans(Settings("bert-large", 10, memory_mib=700))).to_html()
    assert "Single" in html and "BP+Auto" in html and "lacks" in html
