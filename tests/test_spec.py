"""cluster.yaml: what is read, what is refused and how that is said."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from detransformer.cluster.devices import DeviceSpec
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import repository_root
from detransformer.models import preset_config
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.planning.tape import Start

EXAMPLES = sorted((repository_root() / "examples").glob("*.yaml"))
CONFIG = preset_config("bert-base")
REAL = """
name: cupboard
link: {bandwidth_mbps: 200, delay_ms: 2}
devices:
  - {name: pi1, address: 192.168.1.11, device: rpi4b, memory_mib: 3000}
  - {name: desk, address: desk.local, device: rpi4b, speed: 2, bandwidth_mbps: 100}
  - {name: tx2, address: 192.168.1.13, device: jetson-tx2}
rendezvous: {port: 4000}
"""


def load(tmp_path, text: str) -> ClusterSpec:
    (tmp_path / "cluster.yaml").write_text(text)
    return ClusterSpec.load(tmp_path / "cluster.yaml")


def test_examples_are_the_clusters_they_are_named_for():
    specs = {path.stem: ClusterSpec.load(path) for path in EXAMPLES}
    for name, spec in specs.items():
        assert len(spec.profile(CONFIG).devices) == len(spec.members) >= 3
        assert spec.emulated == (name != "four-pis")
    assert [spec.speed for spec in specs["unequal"].device_specs] == [1, 1, 2, 4]
    assert [spec.preset for spec in specs["jetsons"].device_specs] == ["jetson-nano", "jetson-tx2", "jetson-orin-nano"]
    assert specs["two-pis-and-a-tx2"].profile(CONFIG).link.shares == (1.0, 0.2, 1.0)
    pis = specs["emulated-four-pis"].emulate(transport="loopback")
    assert (pis.profile_name, pis.bandwidth_bps) == ("Raspberry Pi 4B (emulated)", 125e6)
    assert [member.address for member in specs["four-pis"].members][::3] == ["192.168.1.11", "192.168.1.14"]


def test_a_cluster_of_real_hosts(tmp_path):
    spec = load(tmp_path, REAL)
    assert (spec.name, spec.emulated, spec.port, spec.names) == ("cupboard", False, 4000, ("pi1", "desk", "tx2"))
    assert spec.device_specs == (
        DeviceSpec(memory_bytes=3000 * 2**20, name="pi1"),
        DeviceSpec(speed=2.0, link_share=0.5, name="desk"),
        DeviceSpec("jetson-tx2", name="tx2"),
    )
    profile = spec.profile(CONFIG)
    assert [device.name for device in profile.devices] == ["pi1", "desk", "tx2"]
    assert (profile.link.bandwidth_bps, profile.link.shares) == (200e6, (1.0, 0.5, 1.0))
    assert profile.link.delay_s == 2e-3 and profile.link.step_latency_s == LinkProfile(1.0).step_latency_s
    cluster = load(tmp_path, REAL.replace(", delay_ms: 2", "")).emulate(transport="loopback", bandwidth_bps=50e6)
    assert cluster.profile_name.startswith("Raspberry Pi 4B with 3000 MiB, Raspberry Pi 4B at 2x speed on a 0.5x link")
    assert (cluster.bandwidth_bps, cluster.num_devices) == (50e6, 3)


def test_one_air_is_priced_and_emulated_as_one(tmp_path):
    """Four devices take turns: a gather takes as long as all they send, one message as long as itself."""
    spec = load(
        tmp_path,
        "emulated: true\nlink: {bandwidth_mbps: 50, shared: true}\ndevices: [{device: rpi4b}, {device: rpi4b}]",
    )
    cluster, link = spec.emulate(transport="loopback"), spec.profile(CONFIG).link
    assert cluster.shared and cluster.link == "shared modelled" and cluster.profile(CONFIG).link == link
    own = replace(link, shared=False)
    rate = 0.94 * 50e6
    for kind, sent in (("all_gather", [1000, 5000]), ("all_to_all", [4000, 2000])):
        alone_s = own.collective_s(kind, 0, 2)
        starts = [Start(kind, *sent), Start(kind, *sent[::-1])]
        assert link.exchange_s(starts, [0, 1]) - alone_s == pytest.approx(8 * 6000 / rate)
        assert own.exchange_s(starts, [0, 1]) - alone_s == pytest.approx(8 * max(sent) / rate)
    assert link.collective_s("send", 9000, 2) == own.collective_s("send", 9000, 2)
    with pytest.raises(ValueError, match="of a shared medium"):
        replace(link, shares=(1.0, 0.5))


def test_defaults(tmp_path):
    spec = load(tmp_path, "emulated: true\ndevices: [{device: rpi4b}, {device: rpi4b}]")
    assert (spec.name, spec.names, spec.bandwidth_bps) == ("cluster", ("device0", "device1"), 125e6)
    assert spec.profile(CONFIG).devices == (DeviceSpec("rpi4b").on(CONFIG),) * 2


def test_a_device_may_have_been_profiled(tmp_path):
    """Its rates replace the preset's; the file is read only where they are needed."""
    text = "devices: [{name: a, address: 10.0.0.1, profile: a.json, memory_mib: 100}]"
    spec = load(tmp_path, text)
    with pytest.raises(ValueError, match=r"cluster.yaml: device a: profile .*a.json does not exist"):
        spec.profile(CONFIG)
    measured = DeviceProfile("board", 2**30, 3e9, "measured", efficiency=(("block", 0.25, 128, 1, 0.9),))
    ClusterProfile((measured,) * 2, LinkProfile(1e6)).save(tmp_path / "a.json")
    (device,) = load(tmp_path, text).profile(CONFIG).devices
    assert (device.name, device.memory_bytes, device.flops_per_s) == ("a", 100 * 2**20, measured.flops_per_s)
    assert device.efficiency == measured.efficiency


ONE = "devices: [{name: a, address: 10.0.0.1, device: rpi4b}]\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "the file is not a list of keys"),
        ("devices: []", "devices is missing or empty"),
        ("name: 7\n" + ONE, "name 7 is wrong: input should be a valid string"),
        (ONE + "colour: red", "colour is not a known key; choose from name, emulated"),
        (ONE + "link: {bandwidth: 5}", "link.bandwidth is not a known key; choose from bandwidth_mbps"),
        (ONE + "link: {bandwidth_mbps: fast}", "link.bandwidth_mbps 'fast' is wrong: input should be a valid number"),
        (ONE + "link: {bandwidth_mbps: 0}", "link.bandwidth_mbps 0 is wrong: input should be greater"),
        (ONE + "link: {delay_ms: -1}", "link.delay_ms -1 is wrong: input should be greater than or equal to 0"),
        (ONE + "link: {shared: 1}", "link.shared 1 is wrong: input should be a valid boolean"),
        (
            "link: {shared: true}\ndevices: [{name: a, address: 10.0.0.1, device: rpi4b, bandwidth_mbps: 5}]",
            "(a).bandwidth_mbps contradicts link.shared: one medium has one rate",
        ),
        (ONE + "rendezvous: {port: 70000}", "rendezvous.port 70000 is wrong: input should be less"),
        (ONE + "rendezvous: 29400", "rendezvous is not a list of keys and values"),
        (ONE + ONE, "line 2: devices is given twice"),
        ("devices: [{name: a, name: b}]", "line 1: name is given twice"),
        ("devices: [{name: a", "not readable YAML, line 1"),
        ("[" * 100_000, "nested too deeply"),
        ("? [a]\n: b", "line 1: a key is not a word"),
        ("devices: [{address: 10.0.0.1, device: rpi4b}]", r"devices[0].name is missing"),
        ("devices: [{name: a, device: rpi4b}]", r"devices[0] (a).address is missing; give its IP address"),
        ("devices: [{name: a, address: 10.0.0.1}]", r"devices[0] (a).device is missing; give one of rpi4b"),
        ("devices: [{name: a, address: 10.0.0.1, device: pi5}]", r"devices[0] (a).device pi5 is unknown"),
        ("devices: [{name: a, address: 10.0.0.1, device: rpi4b, memory_mib: .nan}]", "(a).memory_mib nan is wrong"),
        ("devices: [{name: a, address: 10.0.0.1, device: rpi4b, cores: 4}]", r"devices[0].cores is not a known key"),
        ("devices: [pi1, pi2]", r"devices[0] is not a list of keys and values"),
        (
            "devices: [{name: a, address: 10.0.0.1, device: rpi4b}, {name: a, address: 10.0.0.2, device: rpi4b}]",
            r"devices[1].name a is that of devices[0] too",
        ),
        (
            "devices: [{name: a, address: 10.0.0.1, device: rpi4b}, {name: b, address: 10.0.0.1, device: rpi4b}]",
            r"devices[1].address 10.0.0.1 is that of device a too",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match="cluster.yaml.*" + re.escape(words)) as caught:
        load(tmp_path, text)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_addresses_are_ipv4_or_host_names(tmp_path):
    addresses = ["worker_1", "pi1", "pi-1.local", "_dns.example", "10.0.0.1"]
    devices = [f"{{name: a{i}, address: {address}, device: rpi4b}}" for i, address in enumerate(addresses)]
    spec = load(tmp_path, f"devices:\r\n  [{', '.join(devices)}]\r\n")
    assert [device.address for device in spec.members] == addresses


@pytest.mark.parametrize("address", ["fe80::1", "10.0.0", "10.0.0.256", "x:1", "a b", "größe", "host.", "-a"])
def test_other_addresses_are_refused(tmp_path, address):
    with pytest.raises(ValueError, match="is neither an IPv4 address nor a host name"):
        load(tmp_path, f"devices: [{{name: a, address: '{address}', device: rpi4b}}]")


def test_loopback_addresses_may_be_shared(tmp_path):
    devices = ", ".join(f"{{name: {name}, address: 127.0.0.1, device: rpi4b}}" for name in "abc")
    assert len(load(tmp_path, f"devices: [{devices}]").members) == 3


def test_a_missing_file_points_to_the_examples(tmp_path):
    with pytest.raises(ValueError, match="does not exist; examples/ has"):
        ClusterSpec.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        ClusterSpec.load(tmp_path)


def test_reading_a_cluster_takes_no_torch():
    """Every host reads it first; on a board torch takes many seconds to load."""
    code = (
        "import sys\nfrom detransformer.cluster.spec import ClusterSpec\n"
        f"ClusterSpec.load({str(EXAMPLES[0])!r})\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
