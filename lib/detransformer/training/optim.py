"""LAMB (You et al. 2020, Algorithm 2, as in NVIDIA's BERT recipe), float32 copies of bfloat16 weights, schedules."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


class Lamb(Optimizer):
    """Layer-wise adaptive Adam: each tensor's step is scaled by ||weights|| / ||step||.

    Bias-corrected, with decoupled weight decay. As in NVIDIA's FusedLAMB the scaling holds for groups with weight decay
    only; the others (bias, LayerNorm) take plain Adam steps. A stacked weight [P, out, in] is one tensor: it has the
    original matrix's entries, hence its norm.
    """

    def __init__(self, params, lr: float = 6e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                state = self.state[weights]
                if not state:
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(weights)
                    state["square"] = torch.zeros_like(weights)
                state["step"] += 1
                mean, square = state["mean"], state["square"]
                mean.lerp_(weights.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(weights.grad, weights.grad, value=1 - beta2)
                mean_hat = mean / (1 - beta1 ** state["step"])
                root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                update = mean_hat.div_(root)
                if group["weight_decay"]:
                    update.add_(weights, alpha=group["weight_decay"])
                    norms = weights.norm(), update.norm()
                    ratio = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)
                    update.mul_(ratio)
                weights.add_(update, alpha=-group["lr"])
        return loss


class MasterWeights(Optimizer):
    """An optimizer over float32 copies of a bfloat16 model's weights (Micikevicius et al. 2018, Section 3.1).

    The model computes in bfloat16; its gradients are applied to the copies, and these are rounded back. An update
    smaller than bfloat16 resolves is so not lost. Gradients of several micro-batches add up in bfloat16.

    Args:
        groups: parameter groups of the model.
        make: groups of the float32 copies -> optimizer.
    """

    def __init__(self, groups: list[dict], make: Callable[[list[dict]], Optimizer]):
        groups = [dict(group, params=list(group["params"])) for group in groups]
        self.weights = [p for group in groups for p in group["params"]]
        copies = [
            dict(group, params=[p.detach().float().requires_grad_() for p in group["params"]]) for group in groups
        ]
        self.copies = [p for group in copies for p in group["params"]]
        self._gradients: dict[int, torch.Tensor] = {}  # kept: asking for memory costs more than filling it
        self.inner = make(copies)
        super().__init__(groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups  # a learning rate set here is the inner optimizer's

    @torch.no_grad()
    def set_copies(self, values: dict[nn.Parameter, torch.Tensor]) -> None:
        """The float32 weights that the model's were rounded from."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            copy.copy_(values[weight])

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for number, (weight, copy) in enumerate(zip(self.weights, self.copies, strict=True)):
            if weight.grad is None:
                copy.grad = None
                continue
            copy.grad = self._gradients.setdefault(number, torch.empty_like(copy))
            copy.grad.copy_(weight.grad)
        self.inner.step()
        self._round()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict:
        return {"inner": self.inner.state_dict(), "copies": [copy.detach() for copy in self.copies]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.inner.load_state_dict(state["inner"])
        self.param_groups = self.inner.param_groups
        for copy, value in zip(self.copies, state["copies"], strict=True):
            copy.copy_(value)
        self._round()

    @torch.no_grad()
    def restore_float32(self) -> None:
        """Gives the model its float32 weights: after training, for evaluation and saving."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.data = copy.detach().clone()

    @torch.no_grad()
    def _round(self) -> None:
        torch._foreach_copy_(self.weights, self.copies)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weight decay for all but bias and LayerNorm (by name: a stacked bias has two axes)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in named if not (name.endswith("bias") or "LayerNorm" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, name: str, learning_rate: float, weight_decay: float) -> Optimizer:
    """LAMB or AdamW over `model`'s weights, or over float32 copies where these are bfloat16."""

    def make(groups: list[dict]) -> Optimizer:
        if name == "lamb":
            return Lamb(groups, lr=learning_rate, weight_decay=weight_decay)
        return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, eps=1e-6, fused=True)

    groups = parameter_groups(model, weight_decay)
    low = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    return MasterWeights(groups, make) if low else make(groups)


def learning_rate(step: int, num_steps: int, peak: float, warmup: float, power: float = 1.0) -> float:
    """The rate of step 0, 1, ..: linear warm-up over `warmup` of the steps, then peak * (1 - progress)**power.

    A pure function of the step, so a resumed run needs no schedule state.
    """
    warmup_steps = round(warmup * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (1 - step / num_steps) ** power


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
