"""cluster.yaml: the devices of a cluster, real or emulated, and the links between them.

Read strictly: a key that is not known, a device listed twice or a number out of range is refused, with the file's name
and the key. Loads without torch, since every host of a cluster reads it before anything else.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from detransformer.cluster.devices import DEVICES, DeviceSpec, cluster_profile
from detransformer.parse import number, one_of, whole_number
from detransformer.planning.profile import ClusterProfile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from detransformer.cluster.session import EmulatedCluster

BANDWIDTH_LIMITS_MBPS = (0.1, 100_000)
DELAY_LIMITS_MS = (0, 10_000)
DEFAULT_PORT = 29400
MAX_DEVICES = 64
KEYS = {  # of each mapping in the file
    "": ("name", "emulated", "link", "devices", "rendezvous", "interface"),
    "link": ("bandwidth_mbps", "delay_ms", "jitter_ms"),
    "device": ("name", "address", "device", "speed", "memory_mib", "bandwidth_mbps", "profile"),
    "rendezvous": ("port",),
}


@dataclass(frozen=True)
class Member:
    """A device of the file. `profile_path` is what `detransformer profile` measured on it, read where it is needed."""

    name: str
    address: str
    spec: DeviceSpec
    profile_path: Path | None = None

    @property
    def is_loopback(self) -> bool:
        return self.address == "localhost" or self.address.startswith("127.")


@dataclass(frozen=True)
class ClusterSpec:
    """What a cluster.yaml says. The order of `members` is that of the devices' ranks; the first one is where all meet.

    Args:
        bandwidth_bps: of each link, times its device's `link_share`.
        port: of the first device, at which the others come; the next one is torchrun's.
        interface: the network interface of every host; empty: the one that has the host's address.
    """

    path: Path
    name: str
    emulated: bool
    members: tuple[Member, ...]
    bandwidth_bps: float = 125e6
    delay_s: float = 0.0
    jitter_s: float = 0.0
    port: int = DEFAULT_PORT
    interface: str = ""

    @classmethod
    def load(cls, path: str | Path) -> "ClusterSpec":
        """Reads a cluster.yaml.

        Raises:
            ValueError: for what is wrong in it, in one sentence that names the file and the key.
        """
        path = Path(path)
        return _Reader(path).cluster(_read_yaml(path))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @cached_property
    def device_specs(self) -> tuple[DeviceSpec, ...]:
        """The devices in rank order, with the profiles that were measured on them."""
        return tuple(self._spec(member) for member in self.members)

    def _spec(self, member: Member) -> DeviceSpec:
        if member.profile_path is None:
            return member.spec
        try:
            (measured, *_) = ClusterProfile.load(member.profile_path).devices
        except ValueError as error:
            raise ValueError(f"{self.path}: device {member.name}: {error}") from None
        return replace(member.spec, profile=measured)

    def profile(self, model: str, config: "PretrainedConfig", pace: str = "measured") -> ClusterProfile:
        """Devices and links on `model` (a preset's name or a folder) of `config`, for the planner."""
        where = self.bandwidth_bps, self.delay_s
        return cluster_profile(self.device_specs, model, config, *where, pace=pace)

    def emulate(self, **overrides) -> "EmulatedCluster":
        """This cluster emulated on one machine, whether the file is of real hosts or not; as in `EmulatedCluster`."""
        from detransformer.cluster.session import EmulatedCluster

        fields = dict(
            num_devices=len(self.members),
            device=self.device_specs,
            bandwidth_bps=self.bandwidth_bps,
            delay_s=self.delay_s,
            jitter_s=self.jitter_s,
        )
        return EmulatedCluster(**fields | overrides)


class _Reader:
    """From YAML's mappings to a `ClusterSpec`; `path` begins every error."""

    def __init__(self, path: Path):
        self.path = path

    def cluster(self, fields) -> ClusterSpec:
        self._keys(fields, "", "")
        link = self._keys(fields.get("link", {}), "link", "link")
        rendezvous = self._keys(fields.get("rendezvous", {}), "rendezvous", "rendezvous")
        listed = fields.get("devices")
        if not isinstance(listed, list) or not listed:
            raise self._error("devices", "is missing or empty; list at least one, such as {name: pi1, device: rpi4b}")
        if len(listed) > MAX_DEVICES:
            raise self._error("devices", f"lists {len(listed)}; at most {MAX_DEVICES} can take part")
        emulated = fields.get("emulated", False)
        if not isinstance(emulated, bool):
            raise self._error("emulated", f"{emulated!r} is not true or false")
        bandwidth_mbps = self._number(link, "link.", "bandwidth_mbps", BANDWIDTH_LIMITS_MBPS, 125)
        members = tuple(self._member(i, entry, bandwidth_mbps, emulated) for i, entry in enumerate(listed))
        self._check_different(members)
        return ClusterSpec(
            path=self.path,
            name=self._text(fields, "", "name", self.path.stem),
            emulated=emulated,
            members=members,
            bandwidth_bps=bandwidth_mbps * 1e6,
            delay_s=self._number(link, "link.", "delay_ms", DELAY_LIMITS_MS, 0) / 1e3,
            jitter_s=self._number(link, "link.", "jitter_ms", DELAY_LIMITS_MS, 0) / 1e3,
            port=whole_number(rendezvous.get("port", DEFAULT_PORT), f"{self.path}: rendezvous.port", 1, 65534),
            interface=self._text(fields, "", "interface", ""),
        )

    def _member(self, index: int, fields, bandwidth_mbps: float, emulated: bool) -> Member:
        key = f"devices[{index}]"
        self._keys(fields, "device", key)
        name = self._text(fields, f"{key}.", "name", f"device{index}" if emulated else "")
        if not name:
            raise self._error(f"{key}.name", "is missing; give the device a name, such as pi1")
        key = f"{key} ({name})"
        address = self._text(fields, f"{key}.", "address", "")
        if not address and not emulated:
            raise self._error(f"{key}.address", "is missing; give its IP address, or set emulated: true")
        if address and not _is_address(address):
            raise self._error(f"{key}.address", f"{address!r} is neither an IPv4 address nor a host name")
        if "device" not in fields and "profile" not in fields:
            raise self._error(f"{key}.device", f"is missing; give one of {', '.join(DEVICES)}, or a profile")
        memory = self._number(fields, f"{key}.", "memory_mib", (1, 2**24), None)
        share = self._number(fields, f"{key}.", "bandwidth_mbps", BANDWIDTH_LIMITS_MBPS, bandwidth_mbps)
        spec = DeviceSpec(
            preset=one_of(
                self._text(fields, f"{key}.", "device", "rpi4b"), f"{self.path}: {key}.device", tuple(DEVICES)
            ),
            speed=self._number(fields, f"{key}.", "speed", (0.001, 10_000), 1),
            memory_bytes=None if memory is None else int(memory * 2**20),
            link_share=share / bandwidth_mbps,
            name="" if emulated and "name" not in fields else name,
        )
        profile = self._text(fields, f"{key}.", "profile", "")
        return Member(name, address, spec, self.path.parent / profile if profile else None)

    def _check_different(self, members: tuple[Member, ...]) -> None:
        for what in ("name", "address"):
            seen: dict[str, str] = {}
            for i, member in enumerate(members):
                value = getattr(member, what)
                if value in seen and not (what == "address" and (member.is_loopback or not value)):
                    raise self._error(f"devices[{i}].{what}", f"{value} is that of {seen[value]} too; give its own")
                seen[value] = f"device {member.name}" if what == "address" else f"devices[{i}]"

    def _keys(self, fields, kind: str, key: str) -> Mapping:
        known = KEYS[kind]
        if not isinstance(fields, Mapping):
            raise self._error(key, f"is not a list of keys and values; give some of {', '.join(known)}")
        for name in fields:
            if name not in known:
                place = f"{key}.{name}" if key else str(name)
                raise self._error(place, f"is not a known key; choose from {', '.join(known)}")
        return fields

    def _text(self, fields: Mapping, prefix: str, name: str, default: str) -> str:
        value = fields.get(name, default)
        if not isinstance(value, str):
            raise self._error(f"{prefix}{name}", f"{value!r} is not text; put it in quotes")
        return value

    def _number(self, fields: Mapping, prefix: str, name: str, limits: tuple[float, float], default: float | None):
        if name not in fields:
            return default
        return number(fields[name], f"{self.path}: {prefix}{name}", *limits)

    def _error(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.path}: {f'{key} {what}' if key else f'the file {what}'}.")


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have each key once."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path: Path):
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506  a SafeLoader
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; examples/ has cluster files to begin with.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a cluster file, such as examples/four-pis.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not readable YAML{place}: {getattr(error, 'problem', error)}.") from None


def _is_address(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv4Address)
    except ValueError:
        numbers_alone = re.fullmatch(r"[\d.]+", text)
        return not numbers_alone and bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", text))
