"""PyTorch's own tensor parallelism as a user would get it: `parallelize_module` on the Hugging Face BERT.

Query, key, value and the FFN's first product are cut by columns, the products after them by rows; each row-wise product
ends in one all_reduce, so there are two a layer, as in `tp`. DTensor makes these collectives itself, in forward hooks.
Our hooks around them count, pace and time them like all others; the rest is as DTensor leaves it.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModel, BertConfig

from detransformer.parallel.comm import Comm
from detransformer.parallel.executor import Output
from detransformer.parallel.partition import Plan

BY_COLUMNS = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
BY_ROWS = ("attention.output.dense", "output.dense")


def check_shards(config: BertConfig, num_devices: int) -> None:
    """Raises ValueError unless heads and FFN columns divide by `num_devices`."""
    for name in ("num_attention_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % num_devices:
            raise ValueError(
                f"{name}={size} does not divide by {num_devices} devices, and dtensor cuts equal shards only: "
                "use another number of devices, or tp."
            )


class DTensorExecutor:
    """One device's part of the model in the folder `checkpoint`; called like `parallel.executor.Executor`.

    Each device reads the whole checkpoint and keeps its shards. `weights_bytes` counts the shards and the weights
    that every device has.

    Args:
        plan: a plan with `runs='dtensor'`; only its number of devices is used.
        dtype: to compute in.

    Raises:
        ValueError: if plan, model and group do not fit together.
    """

    def __init__(self, checkpoint: str | Path, plan: Plan, comm: Comm, dtype: torch.dtype):
        if comm.num_ranks != plan.num_devices:
            raise ValueError(f"the plan is for {plan.num_devices} devices and the group has {comm.num_ranks}.")
        check_shards(AutoConfig.from_pretrained(checkpoint), comm.num_ranks)
        self.comm = comm
        self._collective: AbstractContextManager | None = None  # the one under way
        self.model = AutoModel.from_pretrained(checkpoint, dtype=dtype).eval()
        if comm.num_ranks > 1:
            self._parallelize(DeviceMesh.from_group(comm.group, "cpu"))
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        self.weights_bytes = sum(p.nbytes for p in local)

    def _parallelize(self, mesh: DeviceMesh) -> None:
        ends = [layer.get_submodule(name) for layer in self.model.encoder.layer for name in BY_ROWS]
        for module in ends:
            module.register_forward_hook(self._before_all_reduce)  # hooks run in the order of registration
        styles = {name: ColwiseParallel() for name in BY_COLUMNS} | {name: RowwiseParallel() for name in BY_ROWS}
        styles = {f"encoder.layer.*.{name}": style for name, style in styles.items()}
        # Every device has read the same checkpoint: None sends no weights over the network.
        parallelize_module(self.model, mesh, styles, src_data_rank=None)
        for module in ends:
            module.register_forward_hook(self._after_all_reduce)

    def _before_all_reduce(self, module, inputs, output: DTensor) -> None:
        assert output.placements[0].is_partial(), "DTensor has summed before it was observed"
        num_bytes = 2 * (self.comm.num_ranks - 1) * output.to_local().nbytes // self.comm.num_ranks
        self._collective = self.comm.observed("all_reduce", num_bytes)
        self._collective.__enter__()

    def _after_all_reduce(self, module, inputs, output: torch.Tensor) -> torch.Tensor:
        if isinstance(output, AsyncCollectiveTensor):  # else its first use, the residual's sum, waits
            output = output.wait()
        self._collective.__exit__(None, None, None)
        return output

    @torch.no_grad()  # in inference mode DTensor misses its caches and dispatches several times slower
    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> Output:
        """All three [B, T], mask 1 = attend -> Output on every rank, without logits: the task head is not loaded."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return Output(output.last_hidden_state, output.pooler_output)
