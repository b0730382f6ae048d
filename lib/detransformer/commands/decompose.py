"""`detransformer decompose`: makes an ensemble's folder from a classifier and a cluster."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detransformer.commands import options

if TYPE_CHECKING:
    import pandas as pd

    from detransformer.coformer.calibration import Calibrated
    from detransformer.coformer.policy import Original, Policy
    from detransformer.coformer.predictor import Latency

PLAN_FILE = "plan.json"
IMAGE_FILE = "preprocessor_config.json"
NUM_INITIAL = 10  # policies tried before the search chooses


def decompose(
    checkpoint: Annotated[
        Path, typer.Argument(parser=options.path, help="Folder of a trained classifier: a BERT, GPT-2 or ViT.")
    ],
    cluster: options.Cluster,
    output: Annotated[
        Path, typer.Option(parser=options.path, help="Folder to write sub-models, aggregator and plan to.")
    ],
    task: Annotated[
        str | None, typer.Option(help="Task it was trained on: CoLA, SST-2, MRPC or MNLI; a ViT: CIFAR-100.")
    ] = None,
    source: options.Source = "auto",
    budget: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Largest share of the model's FLOPs on one device.")
    ] = None,
    memory: options.Memory = None,
    search: Annotated[
        Literal["bayesian", "random", "uniform"], typer.Option(help="How to choose policies to try.")
    ] = "bayesian",
    fill: Annotated[
        bool, typer.Option("--fill/--no-fill", help="Enlarge the found policy to --budget or --memory, if given.")
    ] = True,
    evaluations: Annotated[int, typer.Option(min=1, help="Policies to try.")] = 50,
    latency_weight: Annotated[
        float, typer.Option(min=0, max=1e6, help="Loss that the whole model's time on the fastest device counts as.")
    ] = 1,
    seq_len: Annotated[int, typer.Option(min=16, max=512, help="Tokens per request, if the model reads text.")] = 128,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Maximum of training samples; default: all.")] = None,
    steps: options.Steps = 2000,
    batch_size: options.Samples = 64,
    learning_rate: options.LearningRate = 5e-4,
    rule: Annotated[
        Literal["boosting", "published", "none"], typer.Option(help="Sample weights; published is Eq. 13 as printed.")
    ] = "boosting",
    targets: Annotated[
        Literal["hard", "soft"], typer.Option(help="Teach the model's decisions (hard, Eq. 14) or its probabilities.")
    ] = "hard",
    aggregator: Annotated[
        Literal["coformer", "attention", "senet", "average", "majority"], typer.Option(help="Combines the answers.")
    ] = "coformer",
    seed: options.Seed = 0,
    force: options.Force = False,
) -> None:
    """Decompose a classifier into a sub-model for each device, calibrate them, and train the aggregator.

    Each sub-model is calibrated by --steps optimizer steps. Until all is done, OUTPUT.work beside the output keeps the
    progress; an interrupted run resumes.
    """
    from detransformer.checkpoints import check_output
    from detransformer.cluster.spec import ClusterSpec
    from detransformer.coformer.booster import BoostConfig
    from detransformer.coformer.calibration import AggregatorConfig, calibrate_policy, missing_table
    from detransformer.coformer.ensemble import save_ensemble
    from detransformer.coformer.outputs import collect_outputs, weights_hash
    from detransformer.coformer.policy import Limits, Original
    from detransformer.coformer.predictor import fastest_device, latency, roofline_s
    from detransformer.coformer.sampling import filled
    from detransformer.coformer.search import Evaluator, SearchConfig, search_policy, training_batches
    from detransformer.commands.classifiers import learned_task, open_classifier
    from detransformer.files import atomic_write
    from detransformer.opening import find_folder
    from detransformer.training.config import config_hash

    spec = ClusterSpec.load(cluster)
    searching = SearchConfig(
        num_initial=min(NUM_INITIAL, evaluations), num_iterations=max(0, evaluations - NUM_INITIAL), seed=seed
    )
    boosting = BoostConfig(
        num_steps=steps,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        learning_rate=learning_rate,
        rule=rule,
        target=targets,
        checkpoint_every_s=120.0,
        seed=seed,
    )
    checkpoint = find_folder(checkpoint)
    check_output(output, checkpoint, force)
    model = open_classifier(checkpoint)
    is_vit = model.config.model_type == "vit"
    work = output.with_name(f"{output.name}.work")
    learned = learned_task(checkpoint, model.config, task, source, work / "data", seq_len, train_rows)
    if learned.num_classes != model.config.num_labels:
        raise ValueError(
            f"{checkpoint} has {model.config.num_labels} classes, and {learned.name} has "
            f"{learned.num_classes}: give a model that was fine-tuned on it."
        )
    original = Original.of(model.config, None if is_vit else seq_len)
    profile = spec.profile(model.config)
    most_bytes = math.inf if memory is None else memory * 2**20
    limits = Limits(
        Limits.share(original, budget or math.inf, len(profile.devices)).flops,
        tuple(min(device.memory_bytes, most_bytes) for device in profile.devices),
    )
    print(f"Task: {learned.name}. Until it is done, {work} keeps the progress of an interrupted run.")
    key = config_hash(
        *(search, seed, limits, profile, learned.fingerprint, weights_hash(model), searching, latency_weight)
    )
    fastest = fastest_device(profile.devices)
    whole_s = roofline_s(original.whole, original, profile.devices[fastest])
    batches = training_batches(learned, searching.num_rows, seed)
    predicted = partial(latency, original=original, cluster=profile)
    evaluator = Evaluator(model, batches, predicted, latency_weight / whole_s)
    history = work / f"search-{key[:8]}.json"
    found = search_policy(evaluator, original, len(profile.devices), searching, limits, search, history, progress=True)
    policy, grown = found.best_policy, fill and bool(budget or memory)
    if grown:  # the search's loss says little about a size's loss after calibration (notebook 11)
        policy = filled(policy, original, limits)
    times = latency(policy, original, profile)
    print(f"\n{search} search, {len(found.policies)} policies{', the best filled up' if grown else ''}:\n")
    print(latency_table(policy, original, times, spec.names).to_markdown(index=False, floatfmt=".4g"))
    slower = "" if times.total_s < whole_s else ": to decompose this model does not make it faster here"
    print(
        f"\npredicted: {1e3 * times.total_s:.4g} ms a request; the whole model {1e3 * whole_s:.4g} ms on "
        f"{spec.names[fastest]}, the fastest device{slower}.\n"
    )
    aggregation = AggregatorConfig(drop=0.1)  # trains for answers without some device
    made = calibrate_policy(model, policy, learned, boosting, aggregation, work / "sub-models", aggregator)
    (said,) = collect_outputs([model], learned, "test", work / "sub-models").logits
    large = learned.score(said.argmax(-1).numpy())
    lost = missing_table(made.aggregator, made.test)
    tokenizer_of = None if is_vit else checkpoint
    save_ensemble(
        output, [part.model for part in made.boosted], made.aggregator, policy, original, times.central, tokenizer_of
    )
    if (checkpoint / IMAGE_FILE).is_file():
        shutil.copyfile(checkpoint / IMAGE_FILE, output / IMAGE_FILE)
    plan = {
        "cluster": spec.name,
        "devices": list(spec.names),
        "central": spec.names[times.central],
        "policy": asdict(policy),
        "predicted": asdict(times) | {"total_s": times.total_s},
        "task": learned.name,
        "scores": {
            "metric": learned.metric,
            "large_model": large,
            "sub_models": made.scores,
            "ensemble_accuracy": made.accuracy,
            "without_each": lost["accuracy"].tolist()[1:],
        },
    }
    with atomic_write(output / PLAN_FILE) as file:
        json.dump(plan, file, indent=1)
    shutil.rmtree(work)
    print(score_table(made, learned.metric, large, lost, spec.names).to_markdown(index=False, floatfmt=".2f"))
    print(f"\nWritten to {output}; ask it by `detransformer run --cluster {cluster} --model {output}`.")


def latency_table(policy: "Policy", original: "Original", times: "Latency", names: Sequence[str]) -> "pd.DataFrame":
    """One row per device: its sub-model C_n, the costs of C_n, and the predicted milliseconds of each phase."""
    import pandas as pd

    from detransformer.coformer.policy import flops, memory_bytes

    whole = flops(original.whole, original)
    return pd.DataFrame(
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
    )


def score_table(
    made: "Calibrated", metric: str, large: float, lost: "pd.DataFrame", names: Sequence[str]
) -> "pd.DataFrame":
    """Scores of the large model and each sub-model alone, and the accuracies of `missing_table`."""
    import pandas as pd

    rows = [("the large model", metric, large)]
    rows += [(f"{name} alone", metric, score) for name, score in zip(names, made.scores, strict=True)]
    for row in lost.itertuples():
        who = f"all but {names[row.missing - 1]}" if row.missing else f"all {len(names)}, aggregated"
        rows.append((who, "accuracy", row.accuracy))
    return pd.DataFrame(rows, columns=["who answers", "metric", "test score"])
