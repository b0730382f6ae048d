"""`detransformer decompose`: a classifier and a cluster in, an ensemble's folder out."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer, PreTrainedModel

from detransformer.checkpoints import has_tokenizer
from detransformer.cluster.spec import ClusterSpec
from detransformer.coformer.aggregator import KINDS
from detransformer.coformer.booster import RULES, TARGETS, BoostConfig, predict, weights_hash
from detransformer.coformer.calibration import Calibrated, calibrate_policy
from detransformer.coformer.ensemble import save_ensemble
from detransformer.coformer.evaluator import make_evaluator
from detransformer.coformer.fusion import AggregatorConfig, missing_table
from detransformer.coformer.policy import Limits, Original, Policy, flops, memory_bytes
from detransformer.coformer.predictor import Latency, fastest_device, latency, roofline_s
from detransformer.coformer.sampling import filled
from detransformer.coformer.search import METHODS, SearchConfig, search_policy
from detransformer.coformer.tasks import BoostTask, ImageTask, TextTask
from detransformer.files import atomic_write
from detransformer.parse import number, one_of, whole_number
from detransformer.planning.profile import ClusterProfile
from detransformer.training.config import FinetuneConfig, config_hash
from detransformer.training.data import SOURCES, open_data
from detransformer.training.data.images import IMAGE_SIZE, open_images
from detransformer.training.data.text import retokenized

PLAN_FILE = "plan.json"
IMAGE_FILE = "preprocessor_config.json"
POOLING = {"bert": "first", "vit": "first", "gpt2": "last"}  # the token that the model's own head reads
FAMILIES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "vit": "ViTForImageClassification",
}


def decompose_command(
    checkpoint: str,
    cluster: str,
    output: str,
    task: str | None,
    source: str,
    budget: str | None,
    memory: str | None,
    search: str,
    fill: bool,
    evaluations: str,
    latency_weight: str,
    seq_len: str,
    train_rows: str | None,
    steps: str,
    batch_size: str,
    learning_rate: str,
    rule: str,
    targets: str,
    aggregator: str,
    seed: str,
    force: bool,
) -> None:
    """Searches a policy, calibrates its sub-models on the task, and writes sub-models, aggregator and plan."""
    spec = ClusterSpec.load(cluster)
    share = None if budget is None else number(budget, "--budget", 0.01, 1)
    most_bytes = None if memory is None else number(memory, "--memory", 1) * 2**20
    number_of = whole_number(evaluations, "--evaluations", 1)
    batch = whole_number(batch_size, "--batch-size", 1)
    start = whole_number(seed, "--seed", 0)
    searching = SearchConfig(num_initial=min(10, number_of), num_iterations=max(0, number_of - 10), seed=start)
    weight = number(latency_weight, "--latency-weight", 0)
    boosting = BoostConfig(
        num_steps=whole_number(steps, "--steps", 1),
        global_batch_size=batch,
        micro_batch_size=batch,
        learning_rate=number(learning_rate, "--learning-rate"),
        rule=one_of(rule, "--rule", RULES),
        target=one_of(targets, "--targets", TARGETS),
        checkpoint_every_s=120.0,
        seed=start,
    )
    kind, method = one_of(aggregator, "--aggregator", KINDS), one_of(search, "--search", METHODS)
    length = whole_number(seq_len, "--seq-len", 16, 512)
    rows = None if train_rows is None else whole_number(train_rows, "--train-rows", 1)
    target, folder = Path(output), Path(checkpoint)
    if target.exists() and not (force and target.is_dir()):
        raise ValueError(f"{target} exists already; choose another folder, or replace it with --force.")
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the checkpoint itself; choose another folder.")
    family = _family(folder)
    model = _load(folder, family)
    work = target.with_name(f"{target.name}.work")
    learned = _task(folder, family, task, one_of(source, "--source", SOURCES), work / "data", length, rows)
    if learned.num_classes != model.config.num_labels:
        raise ValueError(
            f"{checkpoint} tells {model.config.num_labels} classes apart, and {learned.name} has "
            f"{learned.num_classes}: give a model that was fine-tuned on it."
        )
    original = Original.of(model.config, None if family == "vit" else length)
    profile = spec.profile(checkpoint, model.config)
    limits = _limits(original, profile, share, most_bytes)
    print(f"Task: {learned.name}. Until it is done, {work} holds what an interrupted run goes on from.")
    key = config_hash(method, start, limits, profile, learned.fingerprint, weights_hash(model), searching, weight)
    evaluator = make_evaluator(model, learned, profile, weight, searching.num_rows, start, seq_len=original.seq_len)
    history = work / f"search-{key[:8]}.json"
    found = search_policy(evaluator, original, len(profile.devices), searching, limits, method, history, progress=True)
    policy, grown = found.best_policy, fill and bool(share or most_bytes)
    if grown:  # the loss that is searched by says little of a size's loss after calibration (notebook 11)
        policy = filled(policy, original, limits)
    times = latency(policy, original, profile)
    print(f"\n{method} search, {len(found.policies)} policies{', the best filled up' if grown else ''}:\n")
    print(sub_model_table(policy, original, times, spec.names).to_markdown(index=False, floatfmt=".4g"))
    fastest = fastest_device(profile.devices)
    whole_s = roofline_s(original.whole, original, profile.devices[fastest])
    slower = "" if times.total_s < whole_s else ": to decompose this model does not make it faster here"
    print(
        f"\npredicted: {1e3 * times.total_s:.4g} ms a request; the whole model {1e3 * whole_s:.4g} ms on "
        f"{spec.names[fastest]}, the fastest device{slower}.\n"
    )
    aggregation = AggregatorConfig(drop=0.1)  # some answers come without a device
    made = calibrate_policy(
        *(model, policy, learned, boosting, aggregation, work / "sub-models", kind, POOLING[family], limits),
        seq_len=original.seq_len,
    )
    large = learned.score(predict(model, learned, "test").argmax(-1))
    lost = missing_table(made.aggregator, made.test)
    tokenizer_of = None if family == "vit" else folder
    save_ensemble(target, made.sub_models, made.aggregator, policy, original, times.central, tokenizer_of)
    if (folder / IMAGE_FILE).is_file():
        shutil.copyfile(folder / IMAGE_FILE, target / IMAGE_FILE)
    with atomic_write(target / PLAN_FILE) as file:
        json.dump(_plan(made, times, spec, learned, large, lost), file, indent=1)
    shutil.rmtree(work)
    print(_scores(made, learned, large, lost, spec.names).to_markdown(index=False, floatfmt=".2f"))
    print(f"\nWritten to {target}; ask it by `detransformer run --cluster {cluster} --model {target}`.")


def _family(folder: Path) -> str:
    """`bert`, `gpt2` or `vit`; ValueError for what is no classifier of these."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no checkpoint (no config.json): give a folder of a trained classifier.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family, made_as = config.get("model_type"), (config.get("architectures") or [""])[0]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy the checkpoint again.") from error
    if FAMILIES.get(family) != made_as:
        raise ValueError(
            f"{folder} holds a {made_as or 'model without a head'} ({family}), which is not decomposed: give a "
            f"classifier that was trained, one of {', '.join(FAMILIES.values())}."
        )
    return family


def _load(folder: Path, family: str) -> PreTrainedModel:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return getattr(transformers, FAMILIES[family]).from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # safetensors, torch and transformers each have their own
        raise ValueError(f"the weights of {folder} cannot be read ({error}): copy the checkpoint again.") from error


def _task(
    folder: Path, family: str, task: str | None, source: str, cache: Path, seq_len: int, rows: int | None
) -> BoostTask:
    if family == "vit":
        if task not in (None, "CIFAR-100"):
            raise ValueError(f"--task {task} is read, and {folder} looks at images: leave it out, or give CIFAR-100.")
        size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("image_size")
        if size != IMAGE_SIZE:
            raise ValueError(
                f"{folder} looks at images of {size} pixels and CIFAR-100's are {IMAGE_SIZE}: train one on these "
                "(`detransformer.training.images.train_vit`)."
            )
        return ImageTask(open_images(source, cache).cut(rows))
    if task is None:
        raise ValueError("--task is missing: say what the model was fine-tuned on, CoLA, SST-2, MRPC or MNLI.")
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} has no tokenizer: copy its files there.")
    data = open_data(source, cache)
    data = retokenized(data, AutoTokenizer.from_pretrained(folder).backend_tokenizer, cache)
    names = ("input_ids", "attention_mask") + (("token_type_ids",) if family == "bert" else ())
    return TextTask(data, task, FinetuneConfig(seq_len=seq_len, max_train_rows=rows), names)


def _limits(original: Original, profile: ClusterProfile, share: float | None, most_bytes: float | None) -> Limits:
    """The devices' own memory, or less, and a share of the large model's FLOPs."""
    most_flops = Limits.share(original, share or math.inf, len(profile.devices)).flops
    return Limits(most_flops, tuple(min(device.memory_bytes, most_bytes or math.inf) for device in profile.devices))


def sub_model_table(policy: Policy, original: Original, times: Latency, names: tuple[str, ...]) -> pd.DataFrame:
    """C_n by device, what it costs, and the predicted milliseconds of each phase."""
    whole = flops(original.whole, original)
    rows = [
        {
            "device": names[n] + (" (aggregates)" if n == times.central else ""),
            "layers": c.num_layers,
            "width": c.hidden_size,
            "heads (mean)": round(c.mean_heads, 1),
            "FFN (mean)": round(c.mean_ffn_size),
            "% of FLOPs": 100 * flops(c, original) / whole,
            "MiB": memory_bytes(c, original) / 2**20,
            "compute ms": 1e3 * times.backbone_s[n],
            "send ms": 1e3 * times.send_s[n],
            "idle ms": 1e3 * times.idle_s[n],
        }
        for n, c in enumerate(policy.sub_models)
    ]
    return pd.DataFrame(rows)


def _scores(
    made: Calibrated, task: BoostTask, large: float, lost: pd.DataFrame, names: tuple[str, ...]
) -> pd.DataFrame:
    """Scores of the large model and of each sub-model alone, and the accuracies of `missing_table`."""
    rows = [("the large model", task.metric, large)]
    rows += [(f"{name} alone", task.metric, r.score) for name, r in zip(names, made.boosted, strict=True)]
    for row in lost.itertuples():
        who = f"all but {names[row.missing - 1]}" if row.missing else f"all {len(names)}, aggregated"
        rows.append((who, "accuracy", row.accuracy))
    return pd.DataFrame(rows, columns=["who answers", "metric", "test score"])


def _plan(
    made: Calibrated, times: Latency, spec: ClusterSpec, task: BoostTask, large: float, lost: pd.DataFrame
) -> dict:
    """The policy, its predicted times and its scores, for plan.json."""
    return {
        "cluster": spec.name,
        "devices": list(spec.names),
        "central": spec.names[times.central],
        "policy": made.policy.to_dict(),
        "predicted": asdict(times) | {"total_s": times.total_s},
        "task": task.name,
        "scores": {
            "metric": task.metric,
            "large_model": large,
            "sub_models": [result.score for result in made.boosted],
            "ensemble_accuracy": made.accuracy,
            "without_each": lost["accuracy"].tolist()[1:],
        },
    }
