"""A model in one process that computes what devices under a plan would, compressed messages included.

Each device of the plan is a thread that runs the plan's own `Executor`; messages go through memory, encoded and decoded
as in `comm`. So splits, scales of rows, the data that a device keeps exact, and the order of sums are those of real
devices under any plan. It is for scoring a model under a wire format, not for speed.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from transformers import BertModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.executor import Executor, Output
from detransformer.parallel.plan import Plan, layer_plan, strategies_for
from detransformer.parallel.weights import WeightSource
from detransformer.parallel.wire import TOKEN_FORMATS


def wire_plan(config: PretrainedConfig, num_devices: int = 4, wire: str = "int8") -> Plan:
    """The plan with which models are scored in a wire format, from their configuration alone.

    Decoupled layers run by block, original ones by heads, and X changes between sharded layouts by one all_to_all: the
    planner chooses this for BERT-Base over four Raspberry Pis, original or decoupled, at 50 to 500 Mbps (but for the
    chunks, which only change when messages travel). Original layers run by sequence, where K and V travel, if the
    model has fewer heads than devices or the format is a token format. Devices are equal; they are fewer if there are
    fewer sub-blocks.
    """
    decoupled = "decoupled" in layer_kinds(config)
    devices = min(num_devices, config.num_divisions) if decoupled else num_devices
    by_heads = config.num_attention_heads >= devices and wire not in TOKEN_FORMATS
    original = "heads" if by_heads else "sequence"
    method = "bp+auto" if decoupled else "auto"
    return layer_plan(method, config, strategies_for(config, original), [1.0] * devices, wire)


@contextmanager
def wired(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    """Makes `model` compute what the devices of `plan` would; inside the context it is called as usual.

    The result is the first device's; for a plan that the executor can run all devices have the same (apart from the
    order of float32 sums). It uses `model`'s weights at entry, in float64 if they are float64, else in float32. Outputs
    have only the last hidden state and what follows from it.

    Args:
        model: a BERT or decoupled BERT of any head, in eval mode.
        plan: made for the model; not a pipeline or data parallelism, whose devices share no layer and send nothing.

    Raises:
        ValueError: for another model, a plan that does not fit or shares no layer; when called, for a model in training
            mode, a mask other than [B, T], or other arguments, such as `inputs_embeds` or asked-for inner states.
    """
    base = getattr(model, "bert", model)
    if not isinstance(base, BertModel):
        raise ValueError(f"{type(model).__name__} is no BERT: a wired model is a BERT or decoupled BERT.")
    if plan.num_devices > 1 and not plan.splits_layers:
        raise ValueError(f"plan {plan.method!r}: its devices share no layer; choose one whose devices do, such as tp.")
    before = vars(base).get("forward")  # another wrapper, if any
    devices = _Devices(base, plan)
    base.forward = devices.forward  # found before the class's
    try:
        yield model
    finally:
        devices.pool.shutdown()
        del base.forward
        if before is not None:
            base.forward = before


class _Devices:
    """The devices of a plan as threads of one core each."""

    def __init__(self, model: BertModel, plan: Plan):
        self.model = model
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        weights = WeightSource(model.state_dict(), dtype)  # one: parts that several devices keep are kept once
        self.meeting = _Meeting(plan.num_devices)
        comms = [_InProcessComm(rank, self.meeting, model.device) for rank in range(plan.num_devices)]
        config = copy.deepcopy(model.config)
        config.architectures = None  # the body alone: the head around it runs as it is
        self.executors = [Executor(config, plan, weights, comm) for comm in comms]
        threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(plan.num_devices, "device", torch.set_num_threads, (1,))
        started = threading.Barrier(plan.num_devices)
        list(self.pool.map(lambda _: started.wait(), self.executors))
        torch.set_num_threads(threads)  # for threads started later

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """As `BertModel.forward` of an encoder."""
        if self.model.training:
            raise ValueError("a wired model only infers: call eval() first.")
        others = [name for name, value in kwargs.items() if value is not None and value is not False]
        if others:
            raise ValueError(
                "a wired model takes input_ids, attention_mask and token_type_ids and gives its last hidden state: "
                f"leave out {others[0]}."
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} axes: a wired model takes one [B, T].")
        output = self._run(input_ids, attention_mask, token_type_ids)
        # Tensors of inference mode: copies may be used anywhere.
        hidden, pooled = (
            None if tensor is None else tensor.to(self.model.dtype, copy=True)
            for tensor in (output.last_hidden_state, output.pooler_output)
        )
        if return_dict is False:
            return (hidden, pooled)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)

    def _run(self, *request: torch.Tensor | None) -> Output:
        """The first device's output; raises the error of a device that failed."""

        def one(executor: Executor) -> Output:
            try:
                return executor(*request)
            except BaseException:
                self.meeting.abort()  # the others' barrier breaks
                raise

        running = [self.pool.submit(one, executor) for executor in self.executors]
        errors = [error for each in running if (error := each.exception())]
        self.meeting.reset()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return running[0].result()


class _Meeting(threading.Barrier):
    """A barrier at which the ranks of one process exchange messages."""

    def __init__(self, num_ranks: int):
        super().__init__(num_ranks)
        self.brought: list = [None] * num_ranks

    def swap(self, rank: int, brings, take) -> None:
        """Calls `take` with what all ranks bring, which stays unchanged until all have taken."""
        self.brought[rank] = brings
        self.wait()
        take(self.brought)
        self.wait()


class _InProcessComm(Comm):
    """Collectives between threads, run when they are started; all ranks start them in the same order."""

    def __init__(self, rank: int, meeting: _Meeting, device: torch.device):
        super().__init__(None, rank, meeting.parties)
        self.meeting, self.device = meeting, device

    def start_all_reduce(self, x: torch.Tensor, wire: str = "float32") -> Pending:
        if wire != "float32" or self.num_ranks == 1:
            return super().start_all_reduce(x, wire)
        sums = []
        self.meeting.swap(self.rank, x, lambda every: sums.append(torch.stack(every).sum(0)))
        return Pending(x.copy_(sums[0]))

    def _start(self, kind: str, num_bytes: int, received_bytes: int, run, result) -> Pending:
        self._launch(kind, num_bytes)
        run()
        return Pending(result())

    def _swap(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> None:
        def take(every: Sequence[Sequence[torch.Tensor]]) -> None:
            for rank, message in enumerate(incoming):
                if rank != self.rank:
                    message.copy_(every[rank][self.rank])

        self.meeting.swap(self.rank, outgoing, take)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
