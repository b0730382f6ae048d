"""A model's side of a request, on any number of devices: text to tokens, and outputs to what a user reads.

Each task is a function in `TASKS`; where it is another job than `run_plan`, it needs a branch of
`cluster.answering.prepare`.
"""

import itertools
import json
from collections.abc import Callable, Mapping
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
from detransformer.parallel.plan import is_decoder

SEED = 0
MAX_ANSWER_TOKENS = 30


def random_tokens(config: PretrainedConfig, num_tokens: int) -> dict[str, torch.Tensor]:
    """input_ids [1, num_tokens], the same in every process."""
    generator = torch.Generator().manual_seed(SEED)
    return {"input_ids": torch.randint(config.vocab_size, (1, num_tokens), generator=generator)}


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pair: str | None = None,
    generates: bool = False,
    max_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors [1, T] that a model reads of a text or a pair of texts.

    `generates`: it continues the text. `max_tokens`: what is longer is cut; None: nothing is.
    """
    encoded = tokenizer(text, pair, return_tensors="pt", truncation=max_tokens is not None, max_length=max_tokens)
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


def check_inputs(config: PretrainedConfig, inputs: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: where the model has no such tokens or token types, or a mask is neither 0 nor 1.
    """
    sizes = {
        "input_ids": config.vocab_size,
        "attention_mask": 2,
        "token_type_ids": getattr(config, "type_vocab_size", 1),
    }
    for name, tensor in inputs.items():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= sizes[name]:
            words = "vocabulary" if name == "input_ids" else name
            remedy = "; it takes one text, not a pair" if name == "token_type_ids" else ""
            raise ValueError(
                f"{name} go from {low} to {high}; the model's {words} from 0 to {sizes[name] - 1}{remedy}."
            )


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


def task_of(config: PretrainedConfig) -> str:
    """A key of `TASKS`, by the class that the checkpoint was saved with."""
    if is_decoder(config):
        return "generation"
    (name, *_) = config.architectures or [""]
    if name.endswith("ForSequenceClassification"):
        return "classification"
    return "question-answering" if name.endswith("ForQuestionAnswering") else "base"


def scores_of(config: PretrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., C] as transformers' pipelines score them: probabilities, or of a regression the numbers."""
    if config.problem_type == "regression":
        return logits
    alone = config.problem_type == "multi_label_classification" or config.num_labels == 1
    return logits.sigmoid() if alone else logits.softmax(-1)


def normalizes(folder: str) -> bool:
    """Whether a checkpoint's vectors have length 1, by the modules that sentence-transformers saved with it."""
    modules = Path(folder) / "modules.json"
    return modules.is_file() and any("Normalize" in module["type"] for module in json.loads(modules.read_text()))


def embeddings_of(hidden: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Hidden states [B, T, D] of whole texts, without padding -> vectors [B, D], their mean over the tokens."""
    mean = hidden.mean(1)
    return torch.nn.functional.normalize(mean, dim=-1) if normalize else mean


def in_characters(
    tokenizer: PreTrainedTokenizerBase, question: str, passage: str, inputs: dict, outputs: dict, found: dict
) -> dict:
    """A span of tokens (`find_answer`) as characters of the passage, with the product of its probabilities."""
    offsets = tokenizer(question, passage, return_offsets_mapping=True)["offset_mapping"]
    start, end = offsets[found["start"]][0], offsets[found["end"]][1]
    logits = outputs["logits"][0].masked_fill((inputs["token_type_ids"][0] == 0)[:, None], -1e9)
    first, last = logits.softmax(0).unbind(-1)
    score = float(first[found["start"]] * last[found["end"]])
    return {"answer": passage[start:end], "score": score, "start": start, "end": end}


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
    """A model without a head: the shape of its hidden states, and the first values of [CLS]."""
    state = outputs["last_hidden_state"]
    begin = state[0, 0, :8].tolist()
    listed = ", ".join(f"{value:.3f}" for value in begin)
    return f"hidden states {list(state.shape)}; of [CLS] {listed} ...", {"cls": state[0, 0].tolist()}


def continue_text(config: PretrainedConfig, inputs: dict, outputs: dict, folder: str) -> tuple[str, dict]:
    """The generated tokens up to the end of the text, as text where the folder has a tokenizer."""
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


def end_tokens(config: PretrainedConfig) -> list[int]:
    """The tokens that end a text."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def until_end(tokens: list[int], config: PretrainedConfig) -> list[int]:
    """The tokens before the first that ends a text."""
    ends = end_tokens(config)
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


@torch.inference_mode()
def single_device_outputs(folder: str, config: PretrainedConfig, inputs: dict, max_new_tokens: int = 0) -> dict:
    """The outputs of the Hugging Face model for `inputs`, computed by this process alone."""
    task = task_of(config)
    if task == "generation":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # generate all tokens
        text = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
        return {"tokens": text[:, inputs["input_ids"].shape[1] :]}
    if task == "classification":
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        return {"logits": model(**inputs).logits}
    if task == "question-answering":
        result = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()(**inputs)
        return {"logits": torch.stack([result.start_logits, result.end_logits], -1)}
    state = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state
    return {"last_hidden_state": state}
