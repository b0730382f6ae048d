"""A request before and after the devices: text to tokens and a plan, outputs to what a user reads. A function a task.

`prepare` runs where the answer is printed, on the first device; what it returns goes to all. A new task is an entry of
`TASKS` and, where it is another job than `run_plan`, a branch of `prepare`.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from detransformer.checkpoints import VOCABULARY_FILES, has_tokenizer
from detransformer.cluster.jobs import output_errors
from detransformer.cluster.run import Request
from detransformer.models.configuration import layer_kinds
from detransformer.parallel.generation import check_generation
from detransformer.parallel.plan import Plan, is_decoder
from detransformer.planning.cost import predict
from detransformer.planning.generation import place_generation, price_generation
from detransformer.planning.placement import place, place_freely
from detransformer.planning.profile import ClusterProfile

SEED = 0
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Prepared:
    """What is run: `op` of `jobs.JOBS` with the arguments `job` (JSON), on the tensors `inputs`.

    `notes` are sentences about the plan, such as which devices it leaves out.
    """

    op: str
    job: dict
    inputs: dict[str, torch.Tensor]
    plan: Plan
    predicted_s: float
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        batch_size, seq_len = self.inputs["input_ids"].shape
        return batch_size, seq_len


def prepare(
    request: Request,
    folder: str,
    config: PretrainedConfig,
    profile: ClusterProfile,
    inputs: dict[str, torch.Tensor] | None = None,
) -> Prepared:
    """Tokens (`inputs`, where they are there already) and plan of `request` for the model in `folder` on `profile`.

    Raises:
        ValueError: for a text without tokenizer, too many tokens, or a plan that does not fit model or devices.
    """
    inputs = tokens_of(request, folder, config, is_decoder(config)) if inputs is None else inputs
    if is_decoder(config):
        return prepare_text(request, config, profile, inputs)
    plan, notes = plan_of(request, config, profile, *inputs["input_ids"].shape)
    prediction = predict(config, plan, profile, inputs["input_ids"].shape[1], inputs["input_ids"].shape[0])
    return Prepared(
        "run_plan", {"plan": plan.to_dict(), "repeats": request.repeats}, inputs, plan, prediction.latency_s, notes
    )


def prepare_text(request: Request, config: PretrainedConfig, profile: ClusterProfile, inputs: dict) -> Prepared:
    """A prompt's plan and that of the tokens after it."""
    batch_size, seq_len = inputs["input_ids"].shape
    if request.wires != ("float32",):
        raise ValueError("a GPT-2 is run with --wire float32: leave that option out.")
    if request.method == "auto" and request.plan is None:
        chosen = place_generation(
            config, profile, seq_len, request.max_new_tokens, batch_size, request.memory_budget_bytes
        )[0]
    else:
        plan, _ = plan_of(request, config, profile, batch_size, seq_len)
        check_generation(config, plan, plan)
        chosen = price_generation(config, plan, plan, profile, seq_len, request.max_new_tokens, batch_size)
    job = {"prefill": chosen.prefill.to_dict(), "decode": chosen.decode.to_dict()}
    job |= {"max_new_tokens": request.max_new_tokens}
    notes = (f"further tokens: {chosen.decode.describe()}",)
    return Prepared("generate", job, inputs, chosen.prefill, chosen.total_s, notes)


def tokens_of(
    request: Request, folder: str, config: PretrainedConfig, generates: bool = False
) -> dict[str, torch.Tensor]:
    """input_ids and, of a text, attention_mask and token_type_ids, [1, T] each; `generates`: it is gone on with."""
    if request.text is None:
        generator = torch.Generator().manual_seed(SEED)
        inputs = {"input_ids": torch.randint(config.vocab_size, (1, request.num_tokens), generator=generator)}
    else:
        if task_of(config) == "question-answering" and request.context is None:
            raise ValueError(
                "the model answers questions about a passage: give the question by --text, it by --context."
            )
        inputs = encode(tokenizer_of(folder), request.text, request.context, generates)
    check_length(config, inputs["input_ids"].shape[1], request.max_new_tokens if generates else 0)
    return inputs


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None = None, generates: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors [1, T] that a model takes of a text, or of two; `generates`: it is gone on with."""
    encoded = tokenizer(text, pair, return_tensors="pt")
    names = ("input_ids", "attention_mask") if generates else ("input_ids", "attention_mask", "token_type_ids")
    return {name: encoded[name].to(torch.int64) for name in names if name in encoded}


def check_length(config: PretrainedConfig, seq_len: int, max_new_tokens: int = 0) -> None:
    """
    Raises:
        ValueError: where the model has no positions for so many tokens. The last new one is not run.
    """
    limit, words = config.max_position_embeddings, f" and {max_new_tokens} new ones" if max_new_tokens else ""
    if seq_len + max(0, max_new_tokens - 1) > limit:
        raise ValueError(f"the request has {seq_len} tokens{words}, and the model takes {limit}: shorten it.")


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ValueError: where there is none, or a damaged one.
    """
    try:
        if not has_tokenizer(folder):
            raise ValueError(f"no {VOCABULARY_FILES[0]}")
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]}): save it there with the model, "
            "or run on random tokens by --tokens."
        ) from None


def plan_of(
    request: Request, config: PretrainedConfig, profile: ClusterProfile, batch_size: int, seq_len: int
) -> tuple[Plan, tuple[str, ...]]:
    """The plan that `request` asks for, and notes on it."""
    common = dict(memory_budget_bytes=request.memory_budget_bytes)
    if request.plan is not None:
        try:
            plan = Plan.from_dict(request.plan)
        except ValueError as error:
            raise ValueError(f"--plan is no plan ({error}): make it with `detransformer plan`.") from None
        plan.check(config)
        if max(plan.device_ids) >= len(profile.devices):
            raise ValueError(
                f"the plan is for device {max(plan.device_ids)}, and the cluster has {len(profile.devices)} devices, "
                "0 and up: plan for this cluster."
            )
        return plan, ()
    if request.method == "auto":
        placement = place_freely(config, profile, seq_len, batch_size, wires=request.wires, **common)
        method = "bp+auto" if "decoupled" in layer_kinds(config) else "auto"
        plan = placement.plan if placement.plan.num_devices == 1 else replace(placement.plan, method=method)
        return plan, placement.left_out
    methods = None if request.method == "bp+paper" else [request.method]
    (wire, *more) = request.wires
    if more:
        raise ValueError(f"--wire names several formats to choose from, and {request.method} takes one: give one.")
    return place(config, profile, seq_len, batch_size, methods=methods, wire=wire, **common).plan, ()


# --- Answers -----------------------------------------------------------------------------------------------------


def task_of(config: PretrainedConfig) -> str:
    """A key of `TASKS`, by the class that the checkpoint was saved with."""
    (name, *_) = config.architectures or [""]
    if name.endswith("ForSequenceClassification"):
        return "classification"
    return "question-answering" if name.endswith("ForQuestionAnswering") else "base"


def classify(config: PretrainedConfig, inputs: dict, outputs: dict, folder: str) -> tuple[str, dict]:
    """The label of the largest logit, with its probability."""
    (logits,) = outputs["logits"]  # [C]
    best, share = int(logits.argmax()), float(logits.softmax(-1).max())
    label = config.id2label.get(best, str(best)) if config.num_labels > 1 else ""
    listed = ", ".join(f"{value:.3f}" for value in logits.tolist())
    line = f"{label} ({share:.0%})" if label else f"{float(logits[0]):.3f}"
    return f"{line}; logits {listed}", {"label": label, "logits": logits.tolist()}


def find_answer(config: PretrainedConfig, inputs: dict, outputs: dict, folder: str) -> tuple[str, dict]:
    """The span of the passage with the largest sum of start and end logit."""
    start, end = outputs["logits"][0].unbind(-1)  # [T] each
    if "token_type_ids" in inputs:  # the passage is the second part
        outside = inputs["token_type_ids"][0] == 0
        start, end = start.masked_fill(outside, -1e9), end.masked_fill(outside, -1e9)
    spans = (start[:, None] + end[None, :]).triu().tril(MAX_ANSWER_TOKENS - 1)
    allowed = torch.ones_like(spans).triu().tril(MAX_ANSWER_TOKENS - 1).bool()
    first, last = divmod(int(spans.masked_fill(~allowed, -2e9).argmax()), len(start))
    fields = {"start": first, "end": last}
    if "token_type_ids" not in inputs:
        return f"tokens {first} to {last} (random tokens have no text)", fields
    text = tokenizer_of(folder).decode(inputs["input_ids"][0, first : last + 1])
    return text, fields | {"answer": text}


def show_state(config: PretrainedConfig, inputs: dict, outputs: dict, folder: str) -> tuple[str, dict]:
    """A model without a head: the size of what it computes, and the beginning of [CLS]."""
    state = outputs["last_hidden_state"]
    begin = state[0, 0, :8].tolist()
    listed = ", ".join(f"{value:.3f}" for value in begin)
    return f"hidden states {list(state.shape)}; of [CLS] {listed} ...", {"cls": state[0, 0].tolist()}


TASKS: dict[str, Callable] = {"classification": classify, "question-answering": find_answer, "base": show_state}


@torch.inference_mode()
def single_device_outputs(folder: str, config: PretrainedConfig, inputs: dict) -> dict:
    """What the Hugging Face model computes of `inputs` on this host alone."""
    task = task_of(config)
    if task == "classification":
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        return {"logits": model(**inputs).logits}
    if task == "question-answering":
        result = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()(**inputs)
        return {"logits": torch.stack([result.start_logits, result.end_logits], -1)}
    state = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state
    return {"last_hidden_state": state}


def compare(outputs: dict, expected: dict, wire: str) -> tuple[bool, dict]:
    """Whether `outputs` agree with the single device's, as closely as bench rows must; and by how much they differ."""
    from detransformer.cluster.selfcheck import wrong_output

    errors = output_errors(outputs, expected)
    agrees = not wrong_output(wire, errors["max_abs_error"], errors["relative_error"])
    return agrees, errors | {"agrees": agrees}


def until_end(tokens: list[int], config: PretrainedConfig) -> list[int]:
    """The tokens before the first that ends a text."""
    return tokens[: tokens.index(config.eos_token_id)] if config.eos_token_id in tokens else tokens


def report_text(
    request: Request,
    prepared: Prepared,
    config: PretrainedConfig,
    folder: str,
    cluster: str,
    names: Sequence[str],
    results: Sequence[dict | None],
    outputs: dict,
) -> tuple[list[str], dict]:
    """`report` of a text that was generated: `results` are `generate`'s."""
    taking_part = [result for result in results if result is not None]
    token_s = [max(r["token_s"][i] for r in taking_part) for i in range(request.max_new_tokens)]
    tokens = outputs["tokens"][0].tolist()
    kept = until_end(tokens, config)
    written = tokenizer_of(folder).decode(kept) if request.text is not None else f"tokens {kept}"
    held = {name: r["weights_bytes"] for name, r in zip(names, results, strict=True) if r is not None}
    cached = {name: r["cache_bytes"] for name, r in zip(names, results, strict=True) if r is not None}
    further_s = statistics.median(token_s[1:]) if len(token_s) > 1 else float("nan")
    on = ", ".join(names[i] for i in prepared.plan.device_ids)
    lines = [
        f"plan: {prepared.plan.method}, prompt: {prepared.plan.describe()}, on {on}",
        *(f"{note}." for note in prepared.notes),
        "weights and keys and values: "
        + ", ".join(f"{name} {held[name] / 2**20:.0f} + {cached[name] / 2**20:.1f} MiB" for name in held),
        f"{(request.text or f'{prepared.shape[1]} random tokens')!r} -> {written}",
        f"first token {token_s[0]:.4g} s, each further one {further_s:.4g} s (median), {len(token_s)} tokens in "
        f"{sum(token_s):.4g} s; predicted {prepared.predicted_s:.4g} s",
    ]
    record = {
        "cluster": cluster,
        "devices": list(names),
        "model": str(Path(folder).resolve()),
        "task": "generation",
        "request": {"text": request.text, "seq_len": prepared.shape[1], "max_new_tokens": request.max_new_tokens},
        "answer": {"tokens": tokens, "text": written},
        "token_s": token_s,
        "predicted_s": prepared.predicted_s,
        "weights_bytes": held,
        "cache_bytes": cached,
        "plan": prepared.job,
        "notes": list(prepared.notes),
    }
    if request.check:
        expected = single_device_text(folder, prepared.inputs, request.max_new_tokens)
        equal = sum(a == b for a, b in zip(tokens, expected, strict=True))
        record["check"] = {"equal_tokens": equal, "agrees": equal == len(tokens)}
        words = "all tokens are" if equal == len(tokens) else f"only {equal} of {len(tokens)} tokens ARE"
        lines.append(f"check: {words} the single device's")
    return lines, json.loads(json.dumps(record))


@torch.inference_mode()
def single_device_text(folder: str, inputs: dict, max_new_tokens: int) -> list[int]:
    """The tokens that Hugging Face's model goes on with on this host alone, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on to the end
    text = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    return text[0, inputs["input_ids"].shape[1] :].tolist()


def report(
    request: Request,
    prepared: Prepared,
    config: PretrainedConfig,
    folder: str,
    cluster: str,
    names: Sequence[str],
    results: Sequence[dict | None],
    outputs: dict,
) -> tuple[list[str], dict]:
    """Lines to print and the record of `--output`; `results` are the job's, one a device of `names`."""
    if prepared.op == "generate":
        return report_text(request, prepared, config, folder, cluster, names, results, outputs)
    plan, taking_part = prepared.plan, [result for result in results if result is not None]
    samples = [max(r["samples"][i]["latency_s"] for r in taking_part) for i in range(request.repeats)]
    latency_s, sent = statistics.median(samples), max(sum(r["bytes"].values()) for r in taking_part)
    answer, fields = TASKS[task_of(config)](config, prepared.inputs, outputs, folder)
    batch_size, seq_len = prepared.shape
    weights = {name: r["weights_bytes"] for name, r in zip(names, results, strict=True) if r is not None}
    lines = [
        f"plan: {plan.method}, {plan.describe()}, on {', '.join(names[i] for i in plan.device_ids)}; {plan.wire}",
        *(f"{note}." for note in prepared.notes),
        f"weights: {', '.join(f'{name} {num / 2**20:.0f} MiB' for name, num in weights.items())}",
        f"{(request.text or f'{seq_len} random tokens')!r} -> {answer}",
        f"latency: {latency_s:.4g} s, median of {len(samples)} ({min(samples):.4g} to {max(samples):.4g}); "
        f"predicted {prepared.predicted_s:.4g} s; a device sends {sent / 1024:.0f} KiB at most",
    ]
    record = {
        "cluster": cluster,
        "devices": list(names),
        "model": str(Path(folder).resolve()),
        "task": task_of(config),
        "request": {"text": request.text, "context": request.context, "seq_len": seq_len, "batch_size": batch_size},
        "answer": fields,
        "latency_s": latency_s,
        "samples_s": samples,
        "predicted_s": prepared.predicted_s,
        "sent_bytes": sent,
        "weights_bytes": weights,
        "plan": plan.to_dict(),
        "notes": list(prepared.notes),
    }
    if request.check:
        expected = single_device_outputs(folder, config, prepared.inputs)
        agrees, errors = compare(outputs, expected, plan.wire)
        record["check"] = errors
        words = "agrees with" if agrees else "DIFFERS from"
        size = f"{errors['max_abs_error']:.1e} at most, {errors['relative_error']:.1e} RMS"
        lines.append(f"check: the output {words} the single device's ({size})")
    return lines, json.loads(json.dumps(record))  # with lists for tuples, as it will be read


def own_part(plan: Plan, rank: int) -> str:
    """What the device `rank` does in `plan`, in words."""
    if rank not in plan.device_ids:
        return "the plan leaves this device out; it waits"
    place = plan.device_ids.index(rank)
    if plan.stages:
        return f"{plan.stages[place]} of {sum(plan.stages)} layers"
    if plan.num_devices == 1:
        return "the whole model"
    blocks, heads = plan.sub_blocks, plan.heads
    share = plan.tokens_share[place] / sum(plan.tokens_share)
    words = f"{blocks[place]} of {sum(blocks)} sub-blocks, " if sum(blocks) > 1 else ""
    return f"{words}{heads[place]} of {sum(heads)} heads, {share:.0%} of the tokens"
