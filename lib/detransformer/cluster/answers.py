"""A request before and after the devices: text to tokens and a plan, outputs to what a user reads. A function a task.

A new task is an entry of `TASKS` and, where it is another job than `run_plan`, a branch of `prepare`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
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
from detransformer.cluster.request import Request
from detransformer.cluster.selfcheck import wrong_output
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
    """What is run: `op` of `cluster.jobs` with the arguments `job` (JSON), on the tensors `inputs`.

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
    if is_decoder(config):
        return "generation"
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


def continue_text(config: PretrainedConfig, inputs: dict, outputs: dict, folder: str) -> tuple[str, dict]:
    """The tokens that a text goes on with, up to its end, as text where the folder has a tokenizer."""
    tokens = outputs["tokens"][0].tolist()
    kept = until_end(tokens, config)
    text = tokenizer_of(folder).decode(kept) if has_tokenizer(folder) else None
    return f"tokens {kept}" if text is None else text, {"tokens": tokens, "text": text}


TASKS: dict[str, Callable] = {
    "classification": classify,
    "question-answering": find_answer,
    "generation": continue_text,
    "base": show_state,
}


def until_end(tokens: list[int], config: PretrainedConfig) -> list[int]:
    """The tokens before the first that ends a text."""
    return tokens[: tokens.index(config.eos_token_id)] if config.eos_token_id in tokens else tokens


@torch.inference_mode()
def single_device_outputs(folder: str, config: PretrainedConfig, inputs: dict, request: Request) -> dict:
    """What the Hugging Face model computes of `inputs` on this host alone."""
    task = task_of(config)
    if task == "generation":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # go on to the end
        text = model.generate(**inputs, max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0)
        return {"tokens": text[:, inputs["input_ids"].shape[1] :]}
    if task == "classification":
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        return {"logits": model(**inputs).logits}
    if task == "question-answering":
        result = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()(**inputs)
        return {"logits": torch.stack([result.start_logits, result.end_logits], -1)}
    state = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state
    return {"last_hidden_state": state}


def compare(outputs: dict, expected: dict, wire: str) -> tuple[dict, str]:
    """How far `outputs` are from the single device's and whether they agree, as fields and in words."""
    if "tokens" in expected:
        equal, total = int((outputs["tokens"] == expected["tokens"]).sum()), expected["tokens"].numel()
        words = "all tokens are" if equal == total else f"only {equal} of {total} tokens ARE"
        return {"equal_tokens": equal, "agrees": equal == total}, f"check: {words} the single device's"
    errors = output_errors(outputs, expected)
    agrees = not wrong_output(wire, errors["max_abs_error"], errors["relative_error"])
    size = f"{errors['max_abs_error']:.1e} at most, {errors['relative_error']:.1e} RMS"
    words = "agrees with" if agrees else "DIFFERS from"
    return errors | {"agrees": agrees}, f"check: the output {words} the single device's ({size})"


def report(
    request: Request,
    prepared: Prepared,
    config: PretrainedConfig,
    folder: str,
    names: Sequence[str],
    results: Sequence[dict | None],
    outputs: dict,
) -> tuple[list[str], dict]:
    """Lines to print and the record of `--output`; `results` are the job's, one a device of `names`."""
    plan, task = prepared.plan, task_of(config)
    taking_part = {name: result for name, result in zip(names, results, strict=True) if result is not None}
    answer, fields = TASKS[task](config, prepared.inputs, outputs, folder)
    batch_size, seq_len = prepared.shape
    timed, times = (
        _generation_times(request, prepared, taking_part)
        if task == "generation"
        else _times(request, prepared, taking_part)
    )
    weights = {name: result["weights_bytes"] for name, result in taking_part.items()}
    lines = [
        f"plan: {plan.method}, {plan.describe()}, on {', '.join(names[i] for i in plan.device_ids)}; {plan.wire}",
        *(f"{note}." for note in prepared.notes),
        f"weights: {', '.join(f'{name} {size / 2**20:.0f} MiB' for name, size in weights.items())}",
        f"{(request.text or f'{seq_len} random tokens')!r} -> {answer}",
        timed,
    ]
    record = {
        "devices": list(names),
        "model": str(Path(folder).resolve()),
        "task": task,
        "request": {"text": request.text, "context": request.context, "seq_len": seq_len, "batch_size": batch_size},
        "answer": fields,
        **({"max_new_tokens": request.max_new_tokens} if task == "generation" else {}),
        "predicted_s": prepared.predicted_s,
        "weights_bytes": weights,
        "plan": prepared.job if task == "generation" else plan.to_dict(),
        "notes": list(prepared.notes),
        **times,
    }
    if request.check:
        record["check"], words = compare(
            outputs, single_device_outputs(folder, config, prepared.inputs, request), plan.wire
        )
        lines.append(words)
    return lines, record


def _times(request: Request, prepared: Prepared, results: Mapping[str, dict]) -> tuple[str, dict]:
    """Latency of each repeat, the slowest device's, and the bytes that a device sends, in words and as fields."""
    samples = [max(r["samples"][i]["latency_s"] for r in results.values()) for i in range(request.repeats)]
    latency_s, sent = statistics.median(samples), max(sum(r["bytes"].values()) for r in results.values())
    words = (
        f"latency: {latency_s:.4g} s, median of {len(samples)} ({min(samples):.4g} to {max(samples):.4g}); "
        f"predicted {prepared.predicted_s:.4g} s; a device sends {sent / 1024:.0f} KiB at most"
    )
    return words, {"latency_s": latency_s, "samples_s": samples, "sent_bytes": sent}


def _generation_times(request: Request, prepared: Prepared, results: Mapping[str, dict]) -> tuple[str, dict]:
    """Seconds of each token, the slowest device's, and the bytes of keys and values, in words and as fields."""
    token_s = [max(r["token_s"][i] for r in results.values()) for i in range(request.max_new_tokens)]
    further_s = statistics.median(token_s[1:]) if len(token_s) > 1 else float("nan")
    cached = {name: result["cache_bytes"] for name, result in results.items()}
    words = (
        f"first token {token_s[0]:.4g} s, each further one {further_s:.4g} s (median), {len(token_s)} tokens in "
        f"{sum(token_s):.4g} s; predicted {prepared.predicted_s:.4g} s; keys and values "
        f"{max(cached.values()) / 2**20:.1f} MiB at most"
    )
    return words, {"token_s": token_s, "cache_bytes": cached}


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
