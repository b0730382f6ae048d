"""Text generation over devices: prefill and decoding have separate plans, keys and values stay where they are made.

One plan runs the prompt (many tokens: compute dominates), another each further token (one token: messages and reading
weights dominate). Both share a device's weights, and its keys and values, which never leave it.
"""

from collections.abc import Iterable, Sequence

import torch
from transformers import PretrainedConfig

from detransformer.models.configuration import generates
from detransformer.parallel.comm import Comm
from detransformer.parallel.draw import END, NOT_FINITE, Draw, Sampling
from detransformer.parallel.executor import Executor
from detransformer.parallel.layer import STRATEGIES, KeyValueCache
from detransformer.parallel.partition import Plan
from detransformer.parallel.weights import WeightSource


def check_generation(config: PretrainedConfig, prefill: Plan, decode: Plan) -> None:
    """Raises ValueError unless `decode` can continue from the cache of `prefill`, layer by layer."""
    if not generates(config):
        raise ValueError(f"a {config.model_type} model does not generate text: take a GPT-2.")
    if prefill.stages or decode.stages:
        raise ValueError("a pipeline does not generate text here: plan with any method but pp.")
    for name in ("device_ids", "heads", "sub_blocks", "ffn_columns", "tokens_share"):
        one, other = getattr(prefill, name), getattr(decode, name)
        if one != other:
            raise ValueError(f"prefill and decoding must split alike, and their {name} are {one} and {other}.")
    for layer, (one, other) in enumerate(zip(prefill.strategies, decode.strategies, strict=True)):
        if STRATEGIES[one].cache != STRATEGIES[other].cache and prefill.splits_layers:
            raise ValueError(
                f"layer {layer} keeps {STRATEGIES[one].cache} keys under {one!r}, and {other!r} needs "
                f"{STRATEGIES[other].cache}: choose strategies that keep the same."
            )


class Generator:
    """Decoding on one device of a plan's group, greedy or by drawing; every device gets the tokens.

    Raises:
        ValueError: if the two plans cannot take turns, or the model is not a decoder.
    """

    def __init__(self, config: PretrainedConfig, prefill: Plan, decode: Plan, weights: WeightSource, comm: Comm):
        check_generation(config, prefill, decode)
        held = (prefill, decode)
        self.config = config
        self.prefill = Executor(config, prefill, weights, comm, held)
        self.decode = self.prefill if decode == prefill else Executor(config, decode, weights, comm, held)
        self.weights_bytes = weights.num_bytes
        self.cache = KeyValueCache(0)

    def start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        max_new_tokens: int,
        sampling: Sequence[Sampling] = (),
        stop_tokens: Sequence[int] = (),
    ) -> torch.Tensor:
        """The prompts [B, T], padded on the left where `attention_mask` [B, T] is 0 -> the first new token [B].

        `sampling` says how each row's tokens are chosen; by default all are the likeliest. A row ends after one of
        `stop_tokens`; its tokens after that have no meaning.

        Raises:
            ValueError: if prompt and new tokens exceed the model's positions.
        """
        total = input_ids.shape[1] + max_new_tokens
        limit = self.config.max_position_embeddings
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is below 1: ask for at least one token.")
        if total > limit + 1:  # the last token is not run
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} tokens and {max_new_tokens} new ones are more than the model's "
                f"{limit} positions: shorten the prompt, or ask for {limit + 1 - input_ids.shape[1]} tokens."
            )
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask ends in 0: pad prompts on the left.")
        self.cache = KeyValueCache(total)
        self._mask, self._left = attention_mask, max_new_tokens
        self._stops, self._ended = torch.tensor(stop_tokens, dtype=torch.long), torch.zeros(len(input_ids)).bool()
        self._draw = Draw(sampling or [Sampling()] * len(input_ids), self.config.vocab_size)
        return self._forward(self.prefill, input_ids)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens [B] after `tokens` [B]."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(self.decode, tokens.clamp(min=0)[:, None])

    def _forward(self, executor: Executor, input_ids: torch.Tensor) -> torch.Tensor:
        tokens = executor(input_ids, self._mask, cache=self.cache, draw=self._draw).next_token
        if (tokens == NOT_FINITE).any():  # on all devices alike
            raise ValueError("the model computes numbers that are not finite: look at its weights.")
        self._left -= 1
        self._ended |= torch.isin(tokens, self._stops) | (tokens == END)
        return tokens

    def finish(self, rows: Iterable[int]) -> None:
        """Ends these rows at the next token on all devices, even if only this one was told."""
        self._draw.enough.update(rows)

    @property
    def ended(self) -> bool:
        """Whether all tokens are made or every row has ended; the same on all devices."""
        return not self._left or bool(self._ended.all())
