"""Optimizers: AdamW, LAMB (You et al. 2020, Algorithm 2, as in NVIDIA's recipe), float32 copies of bfloat16 weights."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from detransformer.training.config import Recipe


class Lamb(Optimizer):
    """Layer-wise adaptive Adam: each tensor's step is scaled by ||weights|| / ||step||.

    Bias-corrected, with decoupled weight decay. As in NVIDIA's FusedLAMB, scaling applies only to groups with weight
    decay; the others (bias, LayerNorm) take plain Adam steps. A stacked weight [P, out, in] is one tensor: it has the
    original matrix's entries, hence its norm.
    """

    def __init__(self, params, lr: float = 6e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weights in (p for p in group["params"] if p.grad is not None):
                state = self.state[weights]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(weights), "square": torch.zeros_like(weights)}
                state["step"] += 1
                mean = state["mean"].lerp_(weights.grad, 1 - beta1)
                square = state["square"].mul_(beta2).addcmul_(weights.grad, weights.grad, value=1 - beta2)
                root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                update = (mean / (1 - beta1 ** state["step"])).div_(root)
                if group["weight_decay"]:
                    update.add_(weights, alpha=group["weight_decay"])
                    norms = weights.norm(), update.norm()
                    update.mul_(torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0))
                weights.add_(update, alpha=-group["lr"])


class MasterWeights:
    """Float32 copies of a model's weights, which it rounds to bfloat16 (Micikevicius et al. 2018, Section 3.1).

    The model computes in bfloat16; its gradients are applied to the copies, which are rounded back. So updates smaller
    than bfloat16 resolves are not lost. Gradients of several micro-batches add up in bfloat16.
    """

    def __init__(self, model: nn.Module):
        self.weights = list(model.parameters())
        self.copies = [p.detach().clone().requires_grad_(p.requires_grad) for p in self.weights]
        model.to(torch.bfloat16)

    def attach(self, optimizer: Optimizer) -> None:
        """Makes `optimizer`, which holds the copies, take the model's gradients and round the copies back."""
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self._round())

    def state_dict(self) -> dict:
        return {"copies": [copy.detach() for copy in self.copies]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.copies, state["copies"])
        self._round()

    def restore_float32(self) -> None:
        """Gives the model its float32 weights, after training, for saving."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.data = copy.detach()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if weight.grad is None:
                copy.grad = None
            else:  # into the same memory each step: allocating costs more than copying
                copy.grad = torch.empty_like(copy) if copy.grad is None else copy.grad
                copy.grad.copy_(weight.grad)

    @torch.no_grad()
    def _round(self) -> None:
        torch._foreach_copy_(self.weights, self.copies)


def parameter_groups(named: Iterable[tuple[str, torch.Tensor]], weight_decay: float) -> list[dict]:
    """Two groups: weight decay for all but bias and LayerNorm (by name: a stacked bias has two axes)."""
    groups = {False: [], True: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[name.endswith("bias") or "LayerNorm" in name or ".ln_" in name].append(parameter)
    return [{"params": groups[False], "weight_decay": weight_decay}, {"params": groups[True], "weight_decay": 0.0}]


def make_optimizer(named: Iterable[tuple[str, torch.Tensor]], recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over named weights."""
    groups = parameter_groups(named, recipe.weight_decay)
    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.learning_rate)
    return AdamW(groups, lr=recipe.learning_rate, eps=1e-6, fused=True)


def learning_rate(step: int, num_steps: int, peak: float, warmup: float, power: float = 1.0) -> float:
    """The rate of step 0, 1, ..: linear warm-up over `warmup` of the steps, then peak * (1 - progress)**power.

    A pure function of the step, so a resumed run needs no schedule state.
    """
    warmup_steps = round(warmup * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (1 - step / num_steps) ** power
