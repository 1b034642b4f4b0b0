"""Log-probabilities of tokens straight from hidden states, for a head that is not trained.

With y the target, q the distribution over the other words and u = (W_y - q W) / temperature,

    d log p_y / d h = (1 - p_y) u        d log(1 - p_y) / d h = -p_y u

so one vector per row serves both gradients, and nothing cancels where p_y is nearly 1. It is formed
in the forward pass, some rows at a time, and no logit is kept.
"""

import torch

from extras.fast.cpu import product
from losses import at_least_float32

CPU_ROWS, GPU_ROWS = 256, 4096  # of logits at a time; the cache of a CPU holds no more


class HeadLogprobs(torch.autograd.Function):
    """hidden (M, D), weight (V, D), targets (M,), temperature -> log p, log(1 - p), (M,) each."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        found, slopes = [], []
        rows = CPU_ROWS if hidden.device.type == "cpu" else GPU_ROWS
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = at_least_float32(product(h, weight))  # (m, V)
            if temperature != 1:
                logits = logits.div_(temperature)
            own = logits.gather(1, y[:, None])  # (m, 1)
            logits.scatter_(1, y[:, None], float("-inf"))
            others = logits.logsumexp(1, keepdim=True)  # (m, 1)
            total = torch.logaddexp(own, others)  # (m, 1)
            found.append(torch.cat([own - total, others - total], dim=1))
            if ctx.needs_input_grad[0]:
                q = logits.sub_(others).exp_().to(weight.dtype)  # (m, V)
                slopes.append((weight[y] - product(q, weight.T)) / temperature)  # (m, D)
        logprobs, complements = torch.cat(found).unbind(1)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes), logprobs, complements)
        return logprobs, complements

    @staticmethod
    def backward(ctx, grad_logprobs, grad_complements):
        slopes, logprobs, complements = ctx.saved_tensors
        strength = grad_logprobs * complements.exp() - grad_complements * logprobs.exp()  # (M,)
        return strength[:, None].to(slopes.dtype) * slopes, None, None, None
