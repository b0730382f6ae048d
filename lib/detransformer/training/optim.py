"""LAMB (You et al. 2020, Algorithm 2, as in NVIDIA's BERT recipe), weight-decay groups and learning-rate schedules."""

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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weight decay for all but bias and LayerNorm (by name: a stacked bias has two axes)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in named if not (name.endswith("bias") or "LayerNorm" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, name: str, learning_rate: float, weight_decay: float) -> Optimizer:
    groups = parameter_groups(model, weight_decay)
    if name == "lamb":
        return Lamb(groups, lr=learning_rate, weight_decay=weight_decay)
    return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, eps=1e-6, fused=True)


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
