"""Tokenizes requests and interprets a model's outputs, whatever the number of devices.

Each task has a function in `TASKS`. A task that the job `run_plan` does not answer needs a branch of
`cluster.answering.prepare`.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from detransformer.models.configuration import generates, head_of, max_tokens
from detransformer.models.naming import lm_logits
from detransformer.opening import Checkpoint, has_tokenizer, load_model, load_tokenizer

SEED = 0
MAX_ANSWER_TOKENS = 30
PADDING = 0  # the token that transformers' `generate` is told to pad with
Inputs = dict[str, torch.Tensor]  # input_ids, attention_mask and token_type_ids, [B, T] each
Outputs = dict[str, torch.Tensor]


# --- What a model reads ------------------------------------------------------------------------------------------


def random_tokens(config: PretrainedConfig, num_tokens: int) -> Inputs:
    """input_ids [1, num_tokens], the same in every process; for a generating model also `generate`'s mask.

    Without a mask, `generate` takes every `PADDING` token of a prompt for padding. The last token is always read.
    """
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(config.vocab_size, (1, num_tokens), generator=generator)
    if not generates(config):
        return {"input_ids": ids}
    mask = (ids != PADDING).long()
    mask[:, -1] = 1
    return {"input_ids": ids, "attention_mask": mask}


def encode(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pair: str | None = None,
    limit: int | None = None,
) -> Inputs:
    """The model's input tensors [1, T] for a text or a pair of texts, truncated to `limit` tokens."""
    options = {"truncation": True, "max_length": limit} if limit else {}
    encoded = tokenizer(text, pair, return_tensors="pt", **options)
    has_types = getattr(config, "type_vocab_size", 0)  # DistilBERT and GPT-2 have none, whatever tokenizer they have
    names = ("input_ids", "attention_mask") + (("token_type_ids",) if has_types else ())
    return {name: encoded[name].to(torch.int64) for name in names if name in encoded}


def check_length(config: PretrainedConfig, seq_len: int, max_new_tokens: int = 0) -> None:
    """
    Raises:
        ValueError: if there are more tokens than positions. The last new token needs none: it is not run.
    """
    limit, words = max_tokens(config), f" and {max_new_tokens} new ones" if max_new_tokens else ""
    if seq_len + max(0, max_new_tokens - 1) > limit:
        raise ValueError(f"the request has {seq_len} tokens{words}, and the model takes {limit}: shorten it.")


def check_inputs(config: PretrainedConfig, inputs: Inputs, max_new_tokens: int = 0) -> None:
    """
    Raises:
        ValueError: if a shape is not [rows, tokens], a token or token type is out of range, or tokens are too many.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or not ids.numel():
        shape = None if ids is None else list(ids.shape)
        raise ValueError(f"input_ids have shape {shape}; give [rows, tokens], at least one of each.")
    if any(tensor.shape != ids.shape for tensor in inputs.values()):
        raise ValueError(f"attention_mask and token_type_ids are of other shapes than input_ids, {list(ids.shape)}.")
    sizes = {"input_ids": ("vocabulary", config.vocab_size)}
    sizes["token_type_ids"] = ("token types", getattr(config, "type_vocab_size", 1))
    for name, (words, size) in sizes.items():
        if name in inputs:
            low, high = int(inputs[name].min()), int(inputs[name].max())
            if low < 0 or high >= size:
                raise ValueError(f"{name} go from {low} to {high}; the model's {words} from 0 to {size - 1}.")
    check_length(config, ids.shape[1], max_new_tokens)


# --- What its outputs mean ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A request's text as written, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    pair: str | None = None

    def places(self) -> list[tuple[int, int] | None]:
        """Each token's span of characters in `pair`, or in `text` if there is no pair; None for other tokens.

        Raises:
            ValueError: if the tokenizer does not report spans.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(f"the tokenizer ({type(self.tokenizer).__name__}) does not report its tokens' offsets.")
        encoded = self.tokenizer(self.text, self.pair, return_offsets_mapping=True)
        part = 0 if self.pair is None else 1
        numbered = zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True)
        return [tuple(place) if number == part else None for place, number in numbered]


def task_of(config: PretrainedConfig) -> str:
    """The key of `TASKS` for the class that the checkpoint was saved with."""
    if generates(config):
        return "generation"
    head = head_of(config)
    return head if head in TASKS else "base"


def scores(config: PretrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """A classifier's logits [..., C] as probabilities of exclusive or of independent labels; a regression's unchanged.

    `problem_type` decides. Without it, several labels exclude each other and a single one is a yes or no, as in
    transformers' pipelines.
    """
    kind = getattr(config, "problem_type", None)
    if kind == "regression":
        return logits
    several = kind == "multi_label_classification" or logits.shape[-1] == 1
    return logits.sigmoid() if several else logits.softmax(-1)


def label(config: PretrainedConfig, number: int) -> str:
    """The name of label `number`."""
    return config.id2label.get(number, f"LABEL_{number}")


def classify(config: PretrainedConfig, outputs: Outputs, asked: Text | None) -> tuple[str, dict]:
    """The likeliest label; all labels of at least 0.5 if they are independent; a regression's number."""
    (logits,) = outputs["logits"]  # [C]
    kind, found = getattr(config, "problem_type", None), scores(config, logits)
    listed = ", ".join(f"{value:.3f}" for value in logits.tolist())
    best = int(found.argmax())
    fields = {"label": label(config, best), "probabilities": found.tolist(), "logits": logits.tolist()}
    if kind == "regression":
        line = ", ".join(f"{label(config, i)} {value:.3f}" for i, value in enumerate(found.tolist()))
    elif kind == "multi_label_classification":
        likely = [i for i in found.argsort(descending=True).tolist() if found[i] >= 0.5]
        line = ", ".join(f"{label(config, i)} ({float(found[i]):.0%})" for i in likely) or "no label"
        fields["labels"] = [label(config, i) for i in likely]
    else:
        line = f"{label(config, best)} ({float(found[best]):.0%})"
    return f"{line}; logits {listed}", fields


def find_answer(config: PretrainedConfig, outputs: Outputs, asked: Text | None) -> tuple[str, dict]:
    """The span of the passage with the largest sum of start and end logit, in characters; in tokens without a text.

    If the first token, which is in no passage, has a larger sum, there is no answer (SQuAD 2): it is "".
    """
    start, end = outputs["logits"][0].unbind(-1)  # [T] each
    places = asked.places() if asked else [(i, i + 1) for i in range(len(start))]
    inside = torch.tensor([place is not None and place[1] > place[0] for place in places])
    sums = start[:, None] + end[None, :]  # [T, T]
    allowed = (inside[:, None] & inside[None, :]).triu().tril(MAX_ANSWER_TOKENS - 1)
    shares = start.softmax(-1)[:, None] * end.softmax(-1)[None, :]
    nothing = asked is not None and (not bool(allowed.any()) or bool(sums[0, 0] > sums[allowed].max()))
    if nothing:
        return "no answer", {"answer": "", "start": 0, "end": 0, "score": float(shares[0, 0])}
    first, last = divmod(int(sums.masked_fill(~allowed, -torch.inf).argmax()), len(start))
    fields = {"start": places[first][0], "end": places[last][1], "score": float(shares[first, last])}
    if not asked:
        return f"tokens {first} to {last} (random tokens have no text)", fields | {"answer": None}
    answer = asked.pair[fields["start"] : fields["end"]]
    return answer, fields | {"answer": answer}


def find_entities(config: PretrainedConfig, outputs: Outputs, asked: Text | None) -> tuple[str, dict]:
    """Runs of tokens with the same label, in characters of the text. `B-` begins a run; `O` is no entity.

    A run's score is the mean of its tokens' scores (transformers' `aggregation_strategy="simple"`).
    """
    (logits,) = outputs["logits"]  # [T, C]
    likeliest, labels = scores(config, logits).max(-1)
    if not asked:
        names = [label(config, number) for number in labels.tolist()]
        return f"labels {', '.join(names)}", {"labels": names}
    runs: list[dict] = []
    for place, share, number in zip(asked.places(), likeliest.tolist(), labels.tolist(), strict=True):
        if place is None:
            continue
        name = label(config, number)
        begins, kind = name.startswith("B-"), name[2:] if name[:2] in ("B-", "I-") else name
        if runs and not begins and runs[-1]["entity_group"] == kind:
            runs[-1]["end"] = place[1]
            runs[-1]["score"].append(share)
        else:
            runs.append({"entity_group": kind, "score": [share], "word": "", "start": place[0], "end": place[1]})
    entities = [run for run in runs if run["entity_group"] != "O"]
    for entity in entities:
        entity["score"] = sum(entity["score"]) / len(entity["score"])
        entity["word"] = asked.text[entity["start"] : entity["end"]]
    listed = ", ".join(f"{entity['word']} ({entity['entity_group']}, {entity['score']:.0%})" for entity in entities)
    return listed or "no entity", {"entities": entities}


def continue_text(config: PretrainedConfig, outputs: Outputs, asked: Text | None) -> tuple[str, dict]:
    """The generated tokens before the first end token, as text if the folder has a tokenizer."""
    tokens, ends = outputs["tokens"][0].tolist(), end_tokens(config)
    kept = list(itertools.takewhile(lambda token: token not in ends, tokens))
    text = asked.tokenizer.decode(kept) if asked else None
    return f"tokens {kept}" if text is None else text, {"tokens": tokens, "text": text}


def show_state(config: PretrainedConfig, outputs: Outputs, asked: Text | None) -> tuple[str, dict]:
    """For a model without a head: the shape of its hidden states and the first values of [CLS]."""
    state = outputs["last_hidden_state"]
    begin = state[0, 0, :8].tolist()
    listed = ", ".join(f"{value:.3f}" for value in begin)
    return f"hidden states {list(state.shape)}; of [CLS] {listed} ...", {"cls": state[0, 0].tolist()}


TASKS: dict[str, Callable[[PretrainedConfig, Outputs, Text | None], tuple[str, dict]]] = {
    "classification": classify,
    "token-classification": find_entities,
    "question-answering": find_answer,
    "generation": continue_text,
    "base": show_state,
}


def read_outputs(
    folder: str, config: PretrainedConfig, inputs: Inputs, outputs: Outputs, text: str | None, pair: str | None = None
) -> tuple[str, dict]:
    """Interprets the outputs of one request, in words and as fields; `text` is None if its tokens were random."""
    task, asked = task_of(config), None
    if text is not None or (task == "generation" and has_tokenizer(folder)):
        asked = Text(load_tokenizer(folder, config), text or "", pair)
    words, fields = TASKS[task](config, outputs, asked)
    if task == "base":
        vectors = Pooling.of(folder)(outputs["last_hidden_state"], inputs.get("attention_mask"))
        fields["embedding"] = vectors[0].tolist()
    return words, fields


@torch.inference_mode()
def fill_masks(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, inputs: Inputs, outputs: Outputs, top_k: int
) -> list:
    """The `top_k` likeliest tokens for a text's mask; for several masks a list for each, as in transformers' pipeline.

    `model` has the LM head; its layers are not run.
    """
    tokens, states = inputs["input_ids"][0], outputs["last_hidden_state"][0]  # [T], [T, D]
    places = (tokens == tokenizer.mask_token_id).nonzero().flatten()  # [M]
    shares, chosen = lm_logits(model, states[places]).softmax(-1).topk(min(top_k, model.config.vocab_size))  # [M, k]
    alone, found = len(places) == 1, []
    for place, *likeliest in zip(places.tolist(), shares.tolist(), chosen.tolist(), strict=True):
        found.append([])
        for share, token in zip(*likeliest, strict=True):
            filled = [*tokens[:place].tolist(), token, *tokens[place + 1 :].tolist()]
            text = tokenizer.decode(filled, skip_special_tokens=alone)  # skipping would drop other masks
            found[-1].append({"score": share, "token": token, "token_str": tokenizer.decode([token]), "sequence": text})
    return found[0] if alone else found


def end_tokens(config: PretrainedConfig) -> list[int]:
    """The tokens that end a text."""
    ends = config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


# --- A sentence's vector -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooling:
    """Makes one vector of the hidden states of a text's tokens, as sentence-transformers does.

    Args:
        modes: some of `mean`, `cls` and `max`; their vectors are concatenated.
        normalize: whether the vector is scaled to length 1.
        limit: tokens to which a text is truncated; None: the model's own limit.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    limit: int | None = None

    @classmethod
    def of(cls, folder: str | Path) -> "Pooling":
        """The pooling that the folder's `modules.json` describes; without that file the mean.

        Raises:
            ValueError: for an unsupported module or mode, or a damaged file.
        """
        path = Path(folder)
        if not (path / "modules.json").is_file():
            return cls()

        def read(name: str) -> dict:
            return json.loads((path / name).read_text(encoding="utf-8")) if (path / name).is_file() else {}

        modes, normalize = ["mean"], False
        try:
            for module in read("modules.json"):
                kind = module["type"].rpartition(".")[2]
                if kind == "Pooling":
                    modes = _pooling_modes(read(f"{module['path']}/config.json"))
                elif kind == "Normalize":
                    normalize = True
                elif kind != "Transformer":
                    raise ValueError(f"{path}/modules.json has a module {kind}, which is not supported: remove it.")
            prompt = read("config_sentence_transformers.json").get("default_prompt_name")
            limit = read("sentence_bert_config.json").get("max_seq_length")
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}/modules.json or a file it names is damaged ({error}): copy it again.") from None
        if strange := set(modes) - {"mean", "cls", "max"}:
            raise ValueError(f"{path} pools by {', '.join(sorted(strange))}, and only mean, cls and max are supported.")
        if prompt:
            raise ValueError(f"{path} puts the prompt {prompt!r} before each text, which is not supported: unset it.")
        return cls(tuple(modes), normalize, limit)

    def __call__(self, state: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [B, T, D] and their mask [B, T] -> vectors [B, D], or [B, n*D] with n modes."""
        mask = torch.ones(state.shape[:2]) if attention_mask is None else attention_mask
        mask = mask.to(state.dtype).unsqueeze(-1)  # [B, T, 1]
        first = mask.argmax(1).squeeze(-1)  # texts may be padded on the left
        made = {
            "mean": lambda: (state * mask).sum(1) / mask.sum(1).clamp(min=1e-9),
            "cls": lambda: state[torch.arange(len(state)), first],
            "max": lambda: state.masked_fill(mask == 0, -torch.inf).amax(1),
        }
        vectors = torch.cat([made[mode]() for mode in self.modes], -1)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def _pooling_modes(options: dict) -> list[str]:
    """The modes that a pooling's config.json names, in the order of concatenation; older files have a switch a mode."""
    if named := options.get("pooling_mode"):
        return [named] if isinstance(named, str) else named
    switched_on = (name for name, is_on in sorted(options.items()) if is_on)
    modes = (re.fullmatch(r"pooling_mode_(\w+?)(_tokens?)?", name) for name in switched_on)
    return [found[1] for found in modes if found] or ["mean"]


# --- One device --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def single_device_outputs(folder: str, config: PretrainedConfig, inputs: Inputs, max_new_tokens: int = 0) -> Outputs:
    """The Hugging Face model's outputs for `inputs`, computed by this process alone."""
    task, model = task_of(config), load_model(Checkpoint(Path(folder), config), torch.float32)
    if task == "generation":
        model.generation_config.eos_token_id = None  # generate all tokens
        text = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=PADDING)
        return {"tokens": text[:, inputs["input_ids"].shape[1] :]}
    if task == "base":
        return {"last_hidden_state": model.base_model(**inputs).last_hidden_state}
    found = model(**inputs)
    if task == "question-answering":
        return {"logits": torch.stack([found.start_logits, found.end_logits], -1)}
    return {"logits": found.logits}
