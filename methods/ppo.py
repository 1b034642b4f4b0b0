"""Proximal policy optimisation (PPO) with a KL penalty, at token level.

    r_t = -beta (log pi_old - log pi_ref)_t, and the answer's score on its last token
                                                                        arXiv 1909.08593, Eq. 2
    A_t = sum_k (gamma lambda)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t
                                                                        GAE, arXiv 1506.02438
    L   = max(-A rho, -A clip(rho, 1 - c, 1 + c)),  rho = pi / pi_old   arXiv 1707.06347, Eq. 7
          + value_weight * 1/2 max((V - R)^2, (V_clipped - R)^2)

Every phase samples answers from the policy as it is. The reference is the model that the stage
starts from: its trained weights are kept and put back for one pass. Policy and value share the
model. The sampled ids are scored, not their text encoded again.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from methods import candidates, common, heads, merged_copy, rewards, torch
from methods.advantages import gae, policy_loss, shaped_rewards, value_loss, whiten
from methods.flags import flag, rare
from methods.rollouts import (
    finish_phase,
    policy_and_values,
    scored_answers,
    swapped,
    token_figures,
)

title = "SFT(IA)+PPO"
base = candidates
unread = ("epochs", "validation", "max_passes")  # every phase has new answers


@dataclass
class Flags(candidates.Flags):
    """What stage ppo reads beside the common flags."""

    fit_reward: bool = rare(True, "fit a reward model to the judge's rewards first")
    rm_steps: int = rare(100, "steps of that reward model", at_least=1)
    rm_lr: float = rare(1e-4, "its learning rate", above=0)
    rollouts: int = flag(64, "answers sampled per phase", at_least=1)
    ppo_epochs: int = rare(2, "passes over a phase's answers", at_least=1)
    kl_beta: float = flag(0.05, "KL coefficient, relative to the starting model", at_least=0)
    kl_target: float = rare(0.0, "adapt it towards this KL per answer, 0: constant", at_least=0)
    clip_ratio: float = rare(0.2, "clip of the probability ratio", above=0)
    clip_value: float = rare(0.2, "clip of the value's change", above=0)
    value_weight: float = rare(0.1, "weight of the value loss", at_least=0)
    gamma: float = rare(1.0, "discount", share=True)
    gae_lambda: float = rare(1.0, "lambda of the advantage estimate", share=True)
    whiten_rewards: bool = rare(True, "unit variance of a phase's rewards")
    unfinished_reward: float = rare(-1.0, "reward of an answer that does not end")


DEFAULTS = {**candidates.DEFAULTS, "batch_size": 32}
TERMS = {"policy": "tokens", "value": "tokens"}
METRICS = {"clipped": "tokens"}
WATCHED = ("value",)  # the terms in which a jump is worth a warning
attach, detach = heads.attach, heads.detach
collect = common.collect  # nothing: every phase samples its own answers


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    candidates.check(cfg)
    if cfg.dropout or cfg.top_p < 1 or cfg.temperature == 0:
        raise ValueError("--stage ppo compares probabilities of what it sampled: it needs "
                         "--dropout 0, --top-p 1 and a --temperature above 0.")
    if cfg.rollouts * cfg.ppo_epochs % cfg.batch_size:
        raise ValueError(f"--rollouts {cfg.rollouts} in {cfg.ppo_epochs} epochs are no whole "
                         f"number of batches of {cfg.batch_size}. Make --batch-size divide them.")


def phase(cfg) -> int:
    """Steps after which new answers are sampled."""
    return cfg.rollouts * cfg.ppo_epochs // cfg.batch_size


def also_needs(cfg) -> dict:
    """The reward model that the answers are scored by, and the settings that it is trained with."""
    if cfg.fit_reward and cfg.judge != "reward":
        return {"reward": {"steps": cfg.rm_steps, "lr": cfg.rm_lr}}
    return {}


def begin(run) -> None:
    """The weights that the stage starts from, its judge, and the coefficient of the KL."""
    candidates.begin(run)
    cfg, start = run.cfg, []
    for name, p in run.model.named_parameters():
        if p.requires_grad and "value_head" not in name:
            start.append((p, p.detach().clone()))
    model = merged_copy(run.model)
    if model is run.model:  # --full: what training does to the model must not reach the judge
        model = copy.deepcopy(model).requires_grad_(False)
    run.memory.update(phase=0, beta=cfg.kl_beta, start=start, todo=candidates.unanswered(run))
    if also_needs(cfg):
        folder = Path(cfg.init, "reward")
        if not cfg.init or not (folder / heads.HEAD).exists():
            folder = Path(cfg.out, "reward")
        run.memory["judge"] = heads.score_judge(run, str(folder))
    else:
        run.memory["judge"] = rewards.make_judge(replace(run, model=model))


def items(run) -> list[dict]:
    """Answers of the policy as it is, and per token what the objectives compare with."""
    cfg, memory = run.cfg, run.memory
    found, scores, ids = scored_answers(run)  # [item], (n,), (M,)
    with torch.no_grad(), run.precision():
        old, values = policy_and_values(run, found)  # (M,), (M,)
        with swapped(memory["start"]):
            reference, _ = policy_and_values(run, found)  # (M,)
    rewards = shaped_rewards(scores, old, reference, ids, beta=memory["beta"])
    if cfg.whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    if memory["phase"] == 0:  # the head starts at the mean return, else all layers would learn it
        _, returns = gae(rewards, torch.zeros_like(values), ids, gamma=cfg.gamma)
        mean = returns.mean()
        values = values + mean
        with torch.no_grad():
            run.model.value_head.bias += mean.to(run.model.value_head.bias.device)
    advantages, returns = gae(rewards, values, ids, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda)
    # What `step` compares with goes along with each answer.
    figures = {
        "old": old,
        "old_values": values,
        "advantages": whiten(advantages),
        "returns": returns,
    }
    for k, item in enumerate(found):
        item["values"] = {name: x[ids == k].tolist() for name, x in figures.items()}
    kls = torch.zeros(len(found)).index_add(0, ids, old - reference)  # (n,)
    finish_phase(run, found, scores, kls)
    return found


def step(model, batch, cfg) -> dict:
    """The clipped objectives over the sampled tokens."""
    logprobs, values = token_figures(model, batch, cfg)
    policy = policy_loss(logprobs, batch["old"], batch["advantages"], clip=cfg.clip_ratio)
    value = value_loss(values, batch["old_values"], batch["returns"], clip=cfg.clip_value)
    clipped = ((logprobs.detach() - batch["old"]).exp() - 1).abs() > cfg.clip_ratio
    return {"policy": policy.sum(), "value": cfg.value_weight * value.sum(),
            "clipped": clipped.sum().float()}
