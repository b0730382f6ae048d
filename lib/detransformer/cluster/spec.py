"""cluster.yaml: the devices of a cluster, real or emulated, and the links between them.

Reading is strict: an unknown key, a device listed twice or a number out of range is refused, with the file's name and
the key. Imports without torch, since every host of a cluster reads the file first.
"""

import ipaddress
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, StrictBool, StrictStr, ValidationError

from detransformer.cluster.devices import BANDWIDTH_LIMITS_MBPS, DEVICES, MAX_DEVICES, DeviceSpec, cluster_profile
from detransformer.planning.profile import ClusterProfile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from detransformer.cluster.session import EmulatedCluster

Number = Annotated[float, BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)]  # not true
Bandwidth = Annotated[Number, Field(ge=BANDWIDTH_LIMITS_MBPS[0], le=BANDWIDTH_LIMITS_MBPS[1])]
Delay = Annotated[Number, Field(ge=0, le=10_000)]


class _Keys(BaseModel):
    """A mapping of the file, with known keys only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Link(_Keys):
    """The links between the devices, alike except for a device's `bandwidth_mbps`.

    `shared`: all devices share the rate of one medium, such as Wi-Fi or a hub.
    """

    bandwidth_mbps: Bandwidth = 125
    delay_ms: Delay = 0
    jitter_ms: Delay = 0
    shared: StrictBool = False


class Rendezvous(_Keys):
    """The first device's port, to which all devices connect. The process group's store has the next port."""

    port: Annotated[int, Field(ge=1, le=65_534, strict=True)] = 29_400


class Device(_Keys):
    """One entry of `devices`. `profile` is a file that `detransformer profile` wrote on the device."""

    name: StrictStr = ""
    address: StrictStr = ""
    device: StrictStr = ""
    speed: Annotated[Number, Field(ge=0.001, le=10_000)] = 1
    memory_mib: Annotated[Number, Field(ge=1, le=2**24)] | None = None
    bandwidth_mbps: Bandwidth | None = None
    profile: StrictStr = ""


class ClusterSpec(_Keys):
    """The contents of a cluster.yaml. `devices` are in the order of their ranks; all connect to the first one.

    `interface` is the network interface of every host; empty: the one that has the host's address.
    """

    name: StrictStr = ""
    emulated: StrictBool = False
    link: Link = Link()
    devices: Annotated[list[Device], Field(min_length=1, max_length=MAX_DEVICES)]
    rendezvous: Rendezvous = Rendezvous()
    interface: StrictStr = ""
    _path: Path = PrivateAttr()

    @classmethod
    def load(cls, path: str | Path) -> "ClusterSpec":
        """Reads a cluster.yaml.

        Raises:
            ValueError: for a faulty file, naming the file and the key.
        """
        path = Path(path)
        fields = _read_yaml(path)
        try:
            spec = cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"{path}: {_sentence(error, fields)}.") from None
        if wrong := spec._wrong():
            raise ValueError(f"{path}: {wrong}.")
        spec._path = path
        return spec.model_copy(update={"name": spec.name or path.stem})

    @property
    def path(self) -> Path:
        return self._path

    @cached_property
    def members(self) -> tuple[Device, ...]:
        """The devices in rank order, each with a name."""
        return tuple(d.model_copy(update={"name": d.name or f"device{i}"}) for i, d in enumerate(self.devices))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def bandwidth_bps(self) -> float:
        """The rate of each link, times its device's `link_share`."""
        return self.link.bandwidth_mbps * 1e6

    @property
    def port(self) -> int:
        return self.rendezvous.port

    @cached_property
    def device_specs(self) -> tuple[DeviceSpec, ...]:
        """The devices in rank order, with the profiles measured on them."""
        return tuple(map(self._device_spec, self.devices))

    def _device_spec(self, device: Device) -> DeviceSpec:
        spec = DeviceSpec(
            preset=device.device or "rpi4b",
            speed=device.speed,
            memory_bytes=None if device.memory_mib is None else int(device.memory_mib * 2**20),
            link_share=(device.bandwidth_mbps or self.link.bandwidth_mbps) / self.link.bandwidth_mbps,
            name=device.name,
        )
        if not device.profile:
            return spec
        try:
            (measured, *_) = ClusterProfile.load(self.path.parent / device.profile).devices
        except ValueError as error:
            raise ValueError(f"{self.path}: device {device.name}: {error}") from None
        return replace(spec, profile=measured)

    def profile(
        self, config: "PretrainedConfig", pace: str = "measured", bandwidth_bps: float | None = None
    ) -> ClusterProfile:
        """The profile of devices and links for a model of `config`; `bandwidth_bps` replaces the file's."""
        link = dict(delay_s=self.link.delay_ms / 1e3, shared=self.link.shared)
        return cluster_profile(self.device_specs, config, bandwidth_bps or self.bandwidth_bps, pace=pace, **link)

    def emulate(self, **overrides) -> "EmulatedCluster":
        """This cluster, real or not, emulated on one machine; `overrides` are arguments of `EmulatedCluster`."""
        from detransformer.cluster.session import EmulatedCluster

        links = dict(delay_s=self.link.delay_ms / 1e3, jitter_s=self.link.jitter_ms / 1e3, shared=self.link.shared)
        links["bandwidth_bps"] = self.bandwidth_bps
        return EmulatedCluster(len(self.devices), self.device_specs, **links | overrides)

    def _wrong(self) -> str:
        """A fault that no single field shows, such as a device without name or address, or listed twice; else empty."""
        for i, device in enumerate(self.devices):
            key = f"devices[{i}] ({device.name})"
            if not device.name and not self.emulated:
                return f"devices[{i}].name is missing; give the device a name, such as pi1"
            if not device.address and not self.emulated:
                return f"{key}.address is missing; give its IP address, or set emulated: true"
            if device.address and not _is_address(device.address):
                return f"{key}.address {device.address!r} is neither an IPv4 address nor a host name"
            if not device.device and not device.profile:
                return f"{key}.device is missing; give one of {', '.join(DEVICES)}, or a profile"
            if self.link.shared and device.bandwidth_mbps:
                return f"{key}.bandwidth_mbps contradicts link.shared: one medium has one rate; leave one out"
            if device.device and device.device not in DEVICES:
                return f"{key}.device {device.device} is unknown; choose one of {', '.join(DEVICES)}"
            for j, other in enumerate(self.members[:i]):
                if self.members[i].name == other.name:
                    return f"devices[{i}].name {other.name} is that of devices[{j}] too; give its own"
                is_loopback = device.address == "localhost" or device.address.startswith("127.")
                if device.address and device.address == other.address and not is_loopback:
                    return f"devices[{i}].address {other.address} is that of device {other.name} too; give its own"
        return ""


def _sentence(error: ValidationError, fields: Any) -> str:
    """The first fault, by its key, in pydantic's words."""
    found = error.errors(include_url=False)[0]
    *above, last = place = found["loc"] or ("the file",)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if found["type"] == "extra_forbidden":
        model = {"link": Link, "rendezvous": Rendezvous, "devices": Device}.get(*above[:1] or ("",), ClusterSpec)
        return f"{key} is not a known key; choose from {', '.join(model.model_fields)}"
    if found["type"] == "model_type":
        return f"{key} is not a list of keys and values"
    if last == "devices" and len(place) == 1:
        return f"devices is missing or empty, or lists more than {MAX_DEVICES}; such as [{{name: pi1, device: rpi4b}}]"
    words = found["msg"][0].lower() + found["msg"][1:]
    if len(above) == 2 and (name := fields["devices"][above[1]].get("name")):
        key = f"devices[{above[1]}] ({name}).{last}"
    return " ".join(f"{key} {found['input']!r} is wrong: {words}".split())


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have each key once."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506  a SafeLoader
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; examples/ has cluster files to start from.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a cluster file, such as examples/four-pis.yaml.") from None
    except RecursionError:
        raise ValueError(f"{path} is not a cluster file: its brackets are nested too deeply.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not readable YAML{place}: {getattr(error, 'problem', error)}.") from None


def _is_address(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv4Address)
    except ValueError:
        numbers_alone = re.fullmatch(r"[\d.]+", text)
        return not numbers_alone and bool(re.fullmatch(r"\w([\w.-]*\w)?", text, re.ASCII))  # _ as in Docker's names
