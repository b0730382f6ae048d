"""Options that several commands share, and the sentence for a value that an option does not take.

A command declares an option once, as a typed argument. typer reads and checks it: numbers by `min` and `max`, words by
a `Literal`. Other values have a parser here, whose ValueError begins with the faulty word.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from detransformer.cluster.devices import BANDWIDTH_LIMITS_MBPS, DEVICES, PACES
from detransformer.files import atomic_write, with_home
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.presets import PLANNING_ONLY, PRESETS, AttentionWidth, OriginalPlacement

MAX_MEMORY_MIB = 2**24


class Words(tuple[str, ...]):
    """Words given with commas between them."""


FLOAT32 = Words(("float32",))


class Rates(tuple[float, ...]):
    """Link rates in Mbps given with commas between them."""


# --- Parsers ------------------------------------------------------------------------------------------------------


def path(text: str) -> Path:
    """Parses a path; ~ is the home folder."""
    return Path(with_home(text))


def utf8(text: str) -> str:
    """Parses text for a model; ValueError for another encoding, whose bytes Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(text)} is not UTF-8 text; convert it first.") from None
    return text


def words_of(choices: tuple[str, ...], everything: str | None = None) -> Callable[[str | Words], Words]:
    """A parser of words separated by commas, each one of `choices`; the word `everything` means all of them."""

    def parse(text: str | Words) -> Words:
        found = [word.strip() for word in text.split(",") if word.strip()] if isinstance(text, str) else text
        if not found:
            raise ValueError("is empty; give words separated by commas.")
        for word in found:
            if word not in choices and word != everything:
                raise ValueError(f"{word} is unknown; choose one of {', '.join(choices)}.")
        return Words(choices if everything in found else found)

    return parse


def number_in(text: str, least: float, most: float) -> float:
    """`text` as a number from `least` to `most`."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text} is not a number; {_range(least, most)}.") from None
    if not least <= value <= most:
        raise ValueError(f"{text} is out of range; {_range(least, most)}.")
    return value


def rates(text: str) -> Rates:
    """Parses link rates in Mbps, separated by commas."""
    found = [number_in(word, *BANDWIDTH_LIMITS_MBPS) for word in text.split(",") if word.strip()]
    if not found:
        raise ValueError("is empty; give numbers separated by commas.")
    return Rates(found)


def scale_or_auto(text: str) -> float | None:
    """Parses a time scale; None is `auto`."""
    return None if text == "auto" else number_in(text, 0.1, 64)


def file_to_write(text: str) -> Path:
    """Parses a file's path; fails at once, not after an hour of measuring, if it cannot be written."""
    file = path(text)
    if file.is_dir():
        raise ValueError(f"{text} is a folder; give a file name.")
    probe = file.with_name(f"{file.name}.probe")
    try:
        with atomic_write(probe) as written:
            written.write("x")
    except OSError as error:
        error.filename = text
        raise
    os.unlink(probe)
    return file


def read_plan(text: str) -> dict:
    """Parses a file of `detransformer plan --output` or `run --output`, or of a plan's fields alone."""
    try:
        fields = json.loads(path(text).read_text(encoding="utf-8"))
        fields = fields.get("plan", fields)
        if not {"strategies", "heads"} <= set(fields):
            raise ValueError("no strategies or heads in it")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{text} is not a plan ({error}): make one with `detransformer plan`.") from None
    return fields


def in_bytes(mib: float | None) -> int | None:
    """`--memory` in bytes."""
    return None if mib is None else int(mib * 2**20)


# --- Errors -------------------------------------------------------------------------------------------------------


def sentence(error: typer.BadParameter) -> str | None:
    """Such as `--devices 0 is out of range; give 1 or more.`; None if the error is not about an option's value."""
    if not hasattr(error.__cause__, "errors"):  # pydantic's ValidationError, by which typer reads values
        return None
    (found, *_) = error.__cause__.errors(include_url=False)
    param, kind = error.param, found["type"]
    name = f"{param.opts[0]} {found['input']}"
    if choices := param.type_descriptor.choices:
        return f"{name} is unknown; choose one of {', '.join(choices)}."
    if kind == "value_error":
        return f"{param.opts[0]} {found['ctx']['error']}"
    wrong = {"int": "is not a whole number", "float": "is not a number"}.get(kind.partition("_")[0], "is out of range")
    return f"{name} {wrong}; {_range(param.min, param.max)}."


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return "give a number such as 4"
    return f"give {least} or more" if most is None else f"give one from {least} to {most}"


# --- Options that several commands have -----------------------------------------------------------------------------

Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")]
Memory = Annotated[float | None, typer.Option(min=1, max=MAX_MEMORY_MIB, help="MiB per device; default: its own.")]
Layers = Annotated[int, typer.Option(min=1, help="Nb, the layers that stay original.")]
Divisions = Annotated[int, typer.Option(min=1, help="Ndiv, the sub-blocks of a decoupled layer.")]
Width = Annotated[AttentionWidth, typer.Option(help="Attention width of a sub-block; full is published.")]
Placement = Annotated[OriginalPlacement, typer.Option(help="Which layers stay original; published: last of a group.")]

# of bench, plan and profile
_MADE = [name for name in PRESETS if name not in PLANNING_ONLY]
Model = Annotated[str, typer.Option(parser=with_home, help=f"One of {', '.join(_MADE)}, or a checkpoint folder.")]
ClusterFile = Annotated[
    Path | None, typer.Option(parser=path, help="Cluster file, in place of --devices, --device, --bandwidth.")
]
Devices = Annotated[int | None, typer.Option(min=1, help="Number of equal devices; default: 4.")]
Bandwidth = Annotated[
    Rates | None,
    typer.Option(parser=rates, help="Link rates in Mbps, separated by commas; default: of --cluster, else 125."),
]
Preset = Annotated[Literal[tuple(DEVICES)] | None, typer.Option(help="Preset of the devices; default: rpi4b.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens per request.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences per request.")]
Pace = Annotated[
    Literal[PACES],
    typer.Option(help="Time of a layer's share: as measured on a core, or by its operations and bytes."),
]

# of commands on a cluster
Cluster = Annotated[Path, typer.Option(parser=path, help="Cluster file; examples/ has some to start from.")]
Folder = Annotated[str, typer.Option(parser=with_home, help="Folder of the checkpoint; every host needs a copy.")]
Host = Annotated[str | None, typer.Option(help="Which device of the file this host is; default: by its addresses.")]
Plan = Annotated[dict | None, typer.Option(parser=read_plan, help="JSON file of `plan --output` with the plan.")]
Wires = Annotated[
    Words, typer.Option(parser=words_of(WIRE_FORMATS), help=f"Formats of messages: some of {','.join(WIRE_FORMATS)}.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Compute threads per device; default: all cores of a host, 1 if emulated."),
]
Transport = Annotated[
    Literal["auto", "namespaces", "loopback"], typer.Option(help="How emulated devices reach each other.")
]
TimeScale = Annotated[
    float | None,
    typer.Option(parser=scale_or_auto, show_default="auto", help="Emulated: auto, or the factor of slowdown."),
]
Output = Annotated[Path | None, typer.Option(parser=file_to_write, help="File to save the result to.")]

# of training
Source = Annotated[
    Literal["auto", "mirror", "hub", "built-in"], typer.Option(help="Source of the data, if not --text.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(parser=path, help="Text file (one article per line) or folder of them; may be repeated."),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Samples = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences or samples per step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data's order and of random draws.")]
