"""`detransformer run` of an ensemble: text, picture or random input goes to the sub-models, which answer together."""

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.utils import logging

from detransformer.answers import SEED, check_length, classify, encode
from detransformer.cluster.devices import DeviceError
from detransformer.cluster.request import Request
from detransformer.cluster.selfcheck import host_time_scale, lateness, warn_if_late
from detransformer.cluster.spec import ClusterSpec
from detransformer.coformer.distributed import EnsembleRun, run_ensemble
from detransformer.coformer.ensemble import Ensemble, load_ensemble, whole_answer
from detransformer.coformer.predictor import latency
from detransformer.opening import load_tokenizer

MAX_ABS_ERROR = 1e-5  # between devices and one process, which compute the same


def run_emulated(
    spec: ClusterSpec, model: str, request: Request, transport: str, time_scale: float | None, threads: int
) -> dict:
    """Runs one request on the ensemble in folder `model` on the emulated devices of `spec`; prints, returns the record.

    Raises:
        ValueError: for input that the sub-models do not take, or another number of devices.
        DeviceError: if the aggregating device is lost, or the answer differs from the single process's.
    """
    _refuse(request)
    logging.disable_progress_bar()  # of loading weights
    ensemble = load_ensemble(model)
    if len(spec.members) != ensemble.num_devices:
        raise ValueError(
            f"{model} has {ensemble.num_devices} sub-models, and {spec.path} lists {len(spec.members)} devices: "
            "decompose the model for this cluster."
        )
    config = ensemble.sub_model(ensemble.central).config
    inputs = inputs_of(request, ensemble, config)
    profile = spec.profile(config)
    predicted_s = latency(ensemble.policy, ensemble.original, profile, central=ensemble.central).total_s
    with spec.emulate(transport=transport, threads=threads) as cluster:
        scale = time_scale or host_time_scale(cluster, config, profile, range(ensemble.num_devices))
        cluster.set_link(spec.bandwidth_bps, scale)
        run = run_ensemble(cluster, ensemble, inputs, request.repeats)
        name = f"{spec.name} ({cluster.profile_name}, {cluster.link} link)"
    _, answer = classify(config, {"logits": run.logits}, None)
    record = _record(run, ensemble, spec, request, predicted_s) | {"answer": answer}
    print("\n".join([name, *_lines(record, request, run)]))
    late = lateness(run.records)
    warn_if_late(late, scale)
    if request.check:
        error = float((run.logits - whole_answer(ensemble, inputs, run.present)).abs().max())
        record["check"] = {"max_abs_error": error, "agrees": error <= MAX_ABS_ERROR}
        words = "agrees with" if error <= MAX_ABS_ERROR else "DIFFERS from"
        print(f"check: the output {words} the single process's ({error:.1e} at most)")
        if error > MAX_ABS_ERROR:
            raise DeviceError(ensemble.central, f"the output differs from the single process's: {record['check']}")
    return record | {"time_scale": scale, "pacing_overrun": late}


def _refuse(request: Request) -> None:
    """Raises ValueError for options that cut one model over devices, which sub-models do not have."""
    given = {
        "--method": request.method != "auto",
        "--plan": request.plan is not None,
        "--wire": request.wires != ("float32",),
        "--memory": request.memory_budget_bytes is not None,
        "--context": request.context is not None,
    }
    for name, there in given.items():
        if there:
            raise ValueError(f"{name} is for one model over all devices, and an ensemble has its own: leave it out.")


def inputs_of(request: Request, ensemble: Ensemble, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The sub-models' inputs: tokens [1, T] and their mask, or pixel_values [1, 3, H, W]; random ones unless given.

    Raises:
        ValueError: for text to a model of images or vice versa, or a file that is not a picture.
    """
    folder = ensemble.folder
    if ensemble.model_type == "vit":
        if request.text is not None:
            raise ValueError(f"{folder} looks at images: give one by --image, not --text.")
        return {"pixel_values": _pixels(request.image, folder, config)}
    if request.image is not None:
        raise ValueError(f"{folder} reads text: give it by --text, not --image.")
    if request.text is None:
        generator = torch.Generator().manual_seed(SEED)
        inputs = {"input_ids": torch.randint(config.vocab_size, (1, request.num_tokens), generator=generator)}
    else:
        inputs = encode(config, load_tokenizer(folder), request.text)
    check_length(config, inputs["input_ids"].shape[1])
    return inputs


def _pixels(image: str | None, folder: Path, config: PretrainedConfig) -> torch.Tensor:
    """A picture preprocessed by the processor of `folder`, or ViT's own if there is none."""
    size = config.image_size
    if image is None:
        return torch.randn(1, config.num_channels, size, size, generator=torch.Generator().manual_seed(SEED))
    from PIL import Image, UnidentifiedImageError
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    has_own = (folder / "preprocessor_config.json").is_file()
    processor = ViTImageProcessorPil.from_pretrained(folder) if has_own else ViTImageProcessorPil()
    try:
        with Image.open(image) as picture:
            sizes = {"height": size, "width": size}
            return processor(picture.convert("RGB"), size=sizes, return_tensors="pt")["pixel_values"]
    except FileNotFoundError:
        raise ValueError(f"--image {image} is not there: give a picture file.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--image {image} is no picture ({error}): give a PNG or JPEG file.") from None


def _record(run: EnsembleRun, ensemble: Ensemble, spec: ClusterSpec, request: Request, predicted_s: float) -> dict:
    reported = {name: record for name, record in zip(spec.names, run.records, strict=True) if record is not None}
    return {
        "cluster": spec.name,
        "devices": list(spec.names),
        "model": str(ensemble.folder.resolve()),
        "request": {"text": request.text, "image": request.image},
        "present": [name for name, here in zip(spec.names, run.present, strict=True) if here],
        "sentence": run.sentence,
        "central": spec.names[ensemble.central],
        "latency_s": run.latency_s,
        "samples_s": run.samples_s,
        "predicted_s": predicted_s,
        "sent_bytes": {name: sum(record["bytes"].values()) for name, record in reported.items()},
        "weights_bytes": {name: record["weights_bytes"] for name, record in reported.items()},
        "policy": asdict(ensemble.policy),
    }


def _lines(record: dict, request: Request, run: EnsembleRun) -> list[str]:
    samples, logits = record["samples_s"], run.logits[0]
    best = logits.softmax(-1).topk(min(3, len(logits)))
    classes = ", ".join(f"{int(number)}: {float(share):.0%}" for share, number in zip(*best, strict=True))
    asked = repr(request.text) if request.text else request.image or "random input"
    weights = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in record["weights_bytes"].items())
    return [
        f"{len(record['devices'])} sub-models, aggregated on {record['central']}",
        f"weights: {weights}",
        f"{asked} -> {record['answer']['label']} (classes {classes})",
        record["sentence"],
        f"latency: {record['latency_s']:.4g} s, median of {len(samples)} ({min(samples):.4g} to "
        f"{max(samples):.4g}); predicted {record['predicted_s']:.4g} s; "
        f"a device sends {max(record['sent_bytes'].values()) / 1024:.1f} KiB at most",
    ]
