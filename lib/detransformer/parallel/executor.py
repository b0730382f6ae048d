"""Runs a plan on one device: embeddings, layers with resharding between them, and the model's ending.

Encoders end in pooler and task head, a GPT-2 in the next token or a classifier.

Every rank of the plan makes an `Executor` and calls it with the same request. Model parallel plans leave the result on
every rank, a pipeline on its last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from detransformer.models.configuration import architecture, family_of, generates, head_of, is_decoder, max_tokens
from detransformer.models.naming import naming_of
from detransformer.parallel.comm import Comm
from detransformer.parallel.draw import NOT_FINITE, Draw
from detransformer.parallel.layer import REPLICATE, STRATEGIES, KeyValueCache, Request, arrived, together
from detransformer.parallel.partition import Plan, bounds
from detransformer.parallel.plan import check_plan, keeps_whole
from detransformer.parallel.reshard import reshard
from detransformer.parallel.weights import WeightSource


@dataclass(frozen=True)
class Output:
    """last_hidden_state [B, T, D]; the other fields where the model has them.

    `next_token` [B], of a decoder, follows the last token: the likeliest one, or a drawn one.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    next_token: torch.Tensor | None = None


class Embeddings:
    """Word, position and (except in DistilBERT) token type look-ups and their LayerNorm, at full width on every device.

    RoBERTa and its relatives count positions from the padding token's id, over tokens that are not padding.
    """

    def __init__(self, config: PretrainedConfig, weights: WeightSource):
        self.eps = naming_of(config).eps_of(config)
        self.padding = config.pad_token_id if family_of(config).pads_positions else None
        self.word = weights.once("embeddings.word_embeddings.weight")
        self.position = weights.once("embeddings.position_embeddings.weight")
        has_types = architecture(config) != "distilbert"
        self.token_type = weights.once("embeddings.token_type_embeddings.weight") if has_types else None
        self.norm = weights.pair("embeddings.LayerNorm")

    def __call__(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        x = F.embedding(input_ids, self.word)
        if self.token_type is not None:
            x = x + (self.token_type[0] if token_type_ids is None else F.embedding(token_type_ids, self.token_type))
        if self.padding is None:
            x = x + self.position[: input_ids.shape[1]]
        else:
            is_text = (input_ids != self.padding).long()
            x = x + F.embedding(is_text.cumsum(-1) * is_text + self.padding, self.position)
        return F.layer_norm(x, x.shape[-1:], *self.norm, eps=self.eps)  # [B, T, D]


class DecoderEmbeddings:
    """Word and position look-ups of GPT-2, at full width on every device."""

    def __init__(self, weights: WeightSource):
        self.word = weights.once("wte.weight")
        self.position = weights.once("wpe.weight")

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.word) + F.embedding(position_ids, self.position)  # [B, T, D]


class PatchEmbeddings:
    """A ViT's projected patches, the class token before them, and positions; at full width on every device."""

    def __init__(self, weights: WeightSource):
        self.projection = weights.pair("embeddings.patch_embeddings.projection")
        self.class_token = weights.once("embeddings.cls_token")
        self.position = weights.once("embeddings.position_embeddings")

    def __call__(self, pixel_values: torch.Tensor, following: None = None) -> torch.Tensor:
        patch_size = self.projection[0].shape[-2:]
        patches = F.conv2d(pixel_values, *self.projection, stride=patch_size).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1) + self.position  # [B, T, D]


class NextToken:
    """GPT-2's last LayerNorm and the next token; each device scores its part of the vocabulary.

    Devices exchange their best logit (or what `draw` makes of it) and its token: two numbers a sequence.
    """

    def __init__(self, config: PretrainedConfig, weights: WeightSource, plan: Plan, comm: Comm):
        self.eps = config.layer_norm_epsilon
        self.norm = weights.pair("ln_f")
        self.sizes = plan.vocabulary(config.vocab_size)
        self.start, stop = bounds(self.sizes, comm.rank)
        words = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.words = weights.once(words)[self.start : stop]  # [V/P, D]
        self.comm = comm

    def __call__(self, x: torch.Tensor, draw: Draw | None = None) -> Output:
        x = F.layer_norm(x, x.shape[-1:], *self.norm, eps=self.eps)
        logits = F.linear(x[:, -1], self.words)  # [B, V/P]
        if draw:
            logits = draw(logits, self.sizes, self.comm)
        if not len(self.words):  # a device too slow for a share
            best = torch.stack([x.new_full((len(x),), -torch.inf), x.new_zeros(len(x))], -1)
        else:
            value, token = logits.max(-1)
            best = torch.stack([value, (token + self.start).to(x.dtype)], -1)  # [B, 2]; exact up to 2^24 tokens
        if draw:
            draw.end(best)
        every = self.comm.start_all_gather(best, [best.shape] * self.comm.num_ranks).wait()
        logits, tokens = torch.stack(every).unbind(-1)  # [P, B] each
        best, rank = logits.max(0)  # NaN is the largest of all
        token = tokens.gather(0, rank[None])[0].masked_fill(best.isnan(), NOT_FINITE)
        return Output(x, next_token=token.long())


# A task head's maps, each with its activation, by head and family; a head that reads one token may have two.
_OF_ONE_TOKEN = {
    "bert": (("pooler.dense", torch.tanh), ("classifier", None)),
    "distilbert": (("pre_classifier", torch.relu), ("classifier", None)),
    "gpt2": (("score", None),),
    "vit": (("classifier", None),),
}
_LAST_NORM = {"gpt2": "ln_f", "vit": "layernorm"}  # of pre-norm families
_ROBERTA = (("classifier.dense", torch.tanh), ("classifier.out_proj", None))
_READ_ONE = ("classification", "image-classification")
_OF_EACH_TOKEN = {"token-classification": (("classifier", None),), "question-answering": (("qa_outputs", None),)}


class Head:
    """Pooler or task head of the configuration's class; small, so each device that has X runs it whole.

    A masked-language-model head is not run: the outputs are the hidden states that it would read.
    """

    def __init__(self, config: PretrainedConfig, weights: WeightSource):
        self.reads = head_of(config)
        last_norm = _LAST_NORM.get(architecture(config))
        self.norm = weights.pair(last_norm) if last_norm else None
        self.eps = naming_of(config).eps_of(config)
        maps = _OF_EACH_TOKEN.get(self.reads, ())
        if self.reads in _READ_ONE:
            maps = _ROBERTA if family_of(config).pads_positions else _OF_ONE_TOKEN[architecture(config)]
        self.maps = [(weights.pair(name), activation) for name, activation in maps]
        has_pooler = self.reads == "base" and "pooler.dense.weight" in weights
        self.pooler = weights.pair("pooler.dense") if has_pooler else None

    def __call__(self, x: torch.Tensor, last: torch.Tensor | None = None) -> Output:
        """x [B, T, D]; `last` [B] is the index of each text's last token, which a decoder's classifier reads."""
        if self.norm:
            x = F.layer_norm(x, x.shape[-1:], *self.norm, eps=self.eps)
        if not self.maps:
            return Output(x, torch.tanh(F.linear(x[:, 0], *self.pooler)) if self.pooler else None)
        y = x
        if self.reads in _READ_ONE:
            y = x[:, 0] if last is None else x[torch.arange(len(x)), last]
        for weights, activation in self.maps:
            y = F.linear(y, *weights)
            y = activation(y) if activation else y
        return Output(x, logits=y)


def embeddings_of(config: PretrainedConfig, weights: WeightSource) -> Embeddings | DecoderEmbeddings | PatchEmbeddings:
    """The embeddings of a model."""
    if architecture(config) == "vit":
        return PatchEmbeddings(weights)
    return DecoderEmbeddings(weights) if architecture(config) == "gpt2" else Embeddings(config, weights)


def ending_of(config: PretrainedConfig, weights: WeightSource, plan: Plan, comm: Comm) -> Head | NextToken:
    """The ending of a model: next token, or pooler and task head."""
    return NextToken(config, weights, plan, comm) if generates(config) else Head(config, weights)


def request_shape(config: PretrainedConfig, given: torch.Tensor) -> tuple[int, int]:
    """(B, T) of a request of input_ids [B, T], or of pixel_values [B, 3, H, W] to a ViT."""
    return (len(given), max_tokens(config)) if architecture(config) == "vit" else tuple(given.shape)


class Executor:
    """One device's part of a plan.

    Args:
        config: the model's, original or decoupled.
        plan: a plan for that model.
        weights: the checkpoint; only this device's part is read.
        comm: the plan's group; its size must be the plan's number of devices.

    Raises:
        ValueError: if plan, model and group do not fit together.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        weights: WeightSource,
        comm: Comm,
        held_with: Sequence[Plan] = (),
    ):
        check_plan(plan, config)
        if comm.num_ranks != plan.num_devices:
            raise ValueError(f"the plan is for {plan.num_devices} devices and the group has {comm.num_ranks}.")
        self.config = config
        self.comm = comm
        self.stage = comm.rank if plan.stages else None
        self.is_first = self.stage in (None, 0)
        self.is_last = self.stage in (None, plan.num_devices - 1)
        self.plan = plan if plan.splits_layers else plan.on_one_device()
        local = comm if plan.splits_layers else Comm(None, 0, 1)
        self.local_comm = local
        self.decoder = is_decoder(config)
        self.embeddings = self.head = None
        if self.is_first:
            self.embeddings = embeddings_of(config, weights)
        device = plan.device_ids[comm.rank]
        self.layers = []
        for i in plan.layers(comm.rank):
            shared = any(keeps_whole(other, i, device) for other in held_with)
            self.layers.append(STRATEGIES[plan.strategies[i]](config, self.plan, local, weights, i, shared))
        if self.is_last:
            self.head = ending_of(config, weights, self.plan, local)
        self.dtype, self.weights_bytes = weights.dtype, weights.num_bytes

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        draw: Draw | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> Output | None:
        """The first three [B, T], mask 1 = attend -> Output; None on all but the last rank of a pipeline.

        A ViT takes only `pixel_values` [B, 3, H, W].

        With a decoder's `cache`, the tokens follow the cached ones, and `attention_mask` is [B, T_all]; `draw`, if
        given, chooses the next token.
        """
        given = input_ids if pixel_values is None else pixel_values
        batch_size, seq_len = request_shape(self.config, given)
        past = cache.num_tokens if cache else 0
        limit = max_tokens(self.config)
        if past + seq_len > limit:
            raise ValueError(f"seq_len={past + seq_len} is above the model's {limit}: shorten the input.")
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if self.decoder:
            mask = causal_mask(seq_len, past, attention_mask)
            following = positions(batch_size, seq_len, past, attention_mask)
        else:
            mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
            following = token_type_ids
            if architecture(self.config) == "gpt2":  # not causal
                following = positions(batch_size, seq_len, past, None)
        request = Request.of(self.plan, batch_size, seq_len, mask, cache)
        if self.is_first:
            x = self.embeddings(given, following)
        else:
            shape = (batch_size, seq_len, self.config.hidden_size)
            x = self.comm.receive(shape, self.dtype, self.stage - 1, self.plan.number_format)
        layout, plan, local = REPLICATE, self.plan, self.local_comm
        chunks: Iterable[torch.Tensor] = (x[:, chunk.start : chunk.stop] for chunk in request.chunks)
        for layer in self.layers:
            arriving = reshard(chunks, layout, layer.in_layout, plan, local, request)
            chunks, layout = layer(arriving, request), layer.out_layout
        x = together(list(arrived(reshard(chunks, layout, REPLICATE, plan, local, request))))
        if cache:
            cache.num_tokens += seq_len
        if not self.is_last:
            self.comm.send(x, self.stage + 1, plan.number_format)
            return None
        if isinstance(self.head, NextToken):
            return self.head(x, draw)
        if self.decoder:
            return self.head(x, last_tokens(input_ids, attention_mask, self.config.pad_token_id))
        return self.head(x)


def causal_mask(seq_len: int, past: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[B or 1, 1, T, past + T]: a token attends to itself and to unmasked earlier ones; None if that is every token."""
    if seq_len == 1:
        return None if attention_mask is None else attention_mask[:, None, None, :].bool()
    mask = torch.ones(1, 1, seq_len, past + seq_len, dtype=torch.bool).tril(past)
    if attention_mask is not None:  # padding attends to itself, so that its softmax is defined
        mask = mask & (attention_mask[:, None, None, :].bool() | torch.eye(past + seq_len, dtype=torch.bool)[past:])
    return mask


def last_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, padding: int | None) -> torch.Tensor:
    """[B]: index of each text's last token that is neither masked nor the padding token, as in transformers."""
    is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if padding is not None:
        is_text = is_text * (input_ids != padding)
    return (torch.arange(input_ids.shape[1]) * is_text).argmax(-1)


def positions(batch_size: int, seq_len: int, past: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: the position of each new token; padding before a text does not count."""
    if attention_mask is None:
        return torch.arange(past, past + seq_len).expand(batch_size, -1)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]
