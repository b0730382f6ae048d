"""Runs a plan on one device: embeddings, layers with resharding between them, pooler and task head.

Every rank of the plan makes an `Executor` and calls it with the same request. Model parallel plans leave the result on
every rank; a pipeline leaves it on its last.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import BertConfig

from detransformer.parallel.comm import Comm
from detransformer.parallel.partition import bounds
from detransformer.parallel.plan import REPLICATE, STRATEGIES, Plan
from detransformer.parallel.strategies import STRATEGY_CLASSES, Request, arrived, reshard, together
from detransformer.parallel.weights import WeightSource


@dataclass(frozen=True)
class Output:
    """last_hidden_state [B, T, D], or [B, 1, D] where the plan reads [CLS] alone; the rest where the model has it."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    logits: torch.Tensor | None


class Embeddings:
    """Word, position and token type look-ups and their LayerNorm, at full width on every device."""

    def __init__(self, config: BertConfig, weights: WeightSource):
        self.eps = config.layer_norm_eps
        self.word = weights.take("embeddings.word_embeddings.weight")
        self.position = weights.take("embeddings.position_embeddings.weight")
        self.token_type = weights.take("embeddings.token_type_embeddings.weight")
        self.norm = [weights.take(f"embeddings.LayerNorm.{n}") for n in ("weight", "bias")]

    def __call__(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        token_types = self.token_type[0] if token_type_ids is None else F.embedding(token_type_ids, self.token_type)
        x = F.embedding(input_ids, self.word) + token_types + self.position[: input_ids.shape[1]]
        return F.layer_norm(x, x.shape[-1:], *self.norm, eps=self.eps)  # [B, T, D]


class Head:
    """Pooler and task head, whichever the checkpoint has; small, so each device that has X runs them whole."""

    def __init__(self, weights: WeightSource):
        self.pooler = self._linear(weights, "pooler.dense")
        self.classifier = self._linear(weights, "classifier")
        self.qa_outputs = self._linear(weights, "qa_outputs")

    @staticmethod
    def _linear(weights: WeightSource, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (weights.take(f"{name}.weight"), weights.take(f"{name}.bias")) if f"{name}.weight" in weights else None

    def __call__(self, x: torch.Tensor) -> Output:
        pooled = torch.tanh(F.linear(x[:, 0], *self.pooler)) if self.pooler else None
        if self.classifier:
            return Output(x, pooled, F.linear(pooled, *self.classifier))
        return Output(x, pooled, F.linear(x, *self.qa_outputs) if self.qa_outputs else None)


class Executor:
    """One device's part of a plan.

    Args:
        config: of the model, original or decoupled.
        plan: made for that model.
        weights: the checkpoint; only this device's part is read.
        comm: the plan's group; its size must be the plan's number of devices.

    Raises:
        ValueError: if plan, model and group do not fit together.
    """

    def __init__(self, config: BertConfig, plan: Plan, weights: WeightSource, comm: Comm):
        plan.check(config)
        if plan.reads == "cls" and "qa_outputs.weight" in weights:
            raise ValueError("reads='cls' leaves out tokens that question answering reads: plan with reads='all'.")
        if comm.num_ranks != plan.num_devices:
            raise ValueError(f"the plan is for {plan.num_devices} devices and the group has {comm.num_ranks}.")
        self.config = config
        self.comm = comm
        layers = range(len(plan.strategies))
        self.stage = None
        if plan.stages:
            self.stage = comm.rank
            layers = range(*bounds(plan.stages, comm.rank))
        self.is_first = self.stage in (None, 0)
        self.is_last = self.stage in (None, plan.num_devices - 1)
        self.plan = plan if plan.splits_layers else plan.on_one_device()
        local = comm if plan.splits_layers else Comm(None, 0, 1)
        self.local_comm = local
        self.embeddings = Embeddings(config, weights) if self.is_first else None
        self.layers = [
            (STRATEGIES[name], STRATEGY_CLASSES[name](config, self.plan, local, weights, i))
            for i, name in ((i, plan.strategies[i]) for i in layers)
        ]
        self.head = Head(weights) if self.is_last else None
        self.weights_bytes = weights.num_bytes

    def set_comm(self, comm: Comm) -> None:
        """Replaces the group (and its observer) by another of the same rank and size; weights stay."""
        assert (comm.rank, comm.num_ranks) == (self.comm.rank, self.comm.num_ranks)
        self.comm = comm
        if self.plan.splits_layers:
            self.local_comm = comm
            for _, layer in self.layers:
                layer.comm = comm

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> Output | None:
        """All three [B, T], mask 1 = attend -> Output; None on a pipeline's ranks but its last."""
        batch_size, seq_len = input_ids.shape
        if seq_len > self.config.max_position_embeddings:
            raise ValueError(
                f"seq_len={seq_len} is above the model's {self.config.max_position_embeddings}: shorten the input."
            )
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask[:, None, None, :].bool()
        request = Request.of(self.plan, batch_size, seq_len, mask)
        if self.is_first:
            x = self.embeddings(input_ids, token_type_ids)
        else:
            shape, first = (batch_size, seq_len, self.config.hidden_size), self.layers[0][1]
            x = self.comm.receive(shape, first.out.weight.dtype, self.stage - 1, first.wire("stage"))
        layout, plan, local = REPLICATE, self.plan, self.local_comm
        last = len(plan.strategies) - 1
        chunks: Iterable[torch.Tensor] = (x[:, chunk.start : chunk.stop] for chunk in request.chunks)
        for signature, layer in self.layers:
            arriving = reshard(chunks, layout, signature.in_layout, plan, local, request, layer.layer)
            if layer.layer == last and plan.reads == "cls":
                return self.head(layer.cls(arriving, request))
            chunks, layout = layer(arriving, request), signature.out_layout
        following = layer.layer + 1
        x = together(list(arrived(reshard(chunks, layout, REPLICATE, plan, local, request, following))))
        if not self.is_last:
            self.comm.send(x, self.stage + 1, plan.wire_of(following, "stage"))
            return None
        # A message's buffer is used again by the next request: what is given out must not lie in it.
        return self.head(x.clone() if layout != REPLICATE else x)
