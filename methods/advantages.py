"""PPO's figures per token: shaped rewards, advantages, and the clipped objectives.

methods/ppo.py says how they go together.

The tokens of several answers stand end to end; sequence_ids (M,) names the answer of each, without
gaps. All functions take and give tensors (M,) unless they say otherwise.
"""

from methods import torch


def last_tokens(sequence_ids):
    """True on the last token of every answer."""
    ends = torch.ones_like(sequence_ids, dtype=torch.bool)
    ends[:-1] = sequence_ids[1:] != sequence_ids[:-1]
    return ends


def shaped_rewards(scores, logprobs, reference, sequence_ids, *, beta: float):
    """r_t = -beta (log pi_old - log pi_ref)_t, and the score (n,) on an answer's last token.

    The difference may be negative: its mean is the KL, and clamping would bias it.
    """
    penalties = -beta * (logprobs - reference)
    own = scores[sequence_ids]  # each token's answer's score
    return penalties + own * last_tokens(sequence_ids)


def gae(rewards, values, sequence_ids, *, gamma: float = 1.0, gae_lambda: float = 1.0):
    """Advantages and returns   GAE, arXiv 1506.02438, within each answer.

        delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1},  R_t = A_t + V_t

    V and A behind an answer's last token are 0: the text ends there.
    """
    ends, r, v = last_tokens(sequence_ids).tolist(), rewards.tolist(), values.tolist()
    advantages, advantage, value = [0.0] * len(ends), 0.0, 0.0
    for t in reversed(range(len(ends))):
        if ends[t]:
            advantage, value = 0.0, 0.0
        # here `advantage` and `value` are those of t + 1
        advantage = r[t] + gamma * value - v[t] + gamma * gae_lambda * advantage
        advantages[t] = advantage
        value = v[t]
    found = torch.tensor(advantages, dtype=values.dtype, device=values.device)
    return found, found + values


def whiten(values, *, shift_mean: bool = True):
    """Unit variance, and mean 0 unless shift_mean is off (rewards keep their mean)."""
    mean, white = values.mean(), values - values.mean()
    if len(values) > 1:
        white = white * (values.var() + 1e-8).rsqrt()
    if shift_mean:
        return white
    return white + mean


def policy_loss(logprobs, old, advantages, *, clip: float = 0.2):
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi / pi_old   PPO, Eq. 7."""
    ratio = (logprobs - old).clamp(max=80).exp()  # beyond that float32 overflows
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_loss(values, old, returns, *, clip: float = 0.2):
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)   as AlpacaFarm has it."""
    clipped = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def adapted_beta(beta: float, kl: float, target: float, *, rate: float = 0.1) -> float:
    """beta (1 + rate * clip(kl / target - 1, -0.2, 0.2))   arXiv 1909.08593, Eq. 3."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + rate * error)
