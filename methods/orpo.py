"""Odds ratio preference optimisation (ORPO): imitate the better answer, and raise its odds.

    L      = L_ce + lam * L_odds                                           arXiv 2403.07691, Eq. 6
    L_ce   = -sum_t log p(y_t | x, y_<t) of the better answer, per token of better answers
    L_odds = -log sigma(log odds(y_w) - log odds(y_l)),  odds(y) = P(y) / (1 - P(y))
    P(y)   = exp(S(y) / N), the geometric mean of the tokens' probabilities

No reference model is needed. TRL also imitates the prompt in L_ce; here, as in the paper, only the
answer counts.
"""

from dataclasses import dataclass

from methods import candidates, document_logprobs, torch
from methods.flags import flag
from methods.pairing import PairFlags, pair_items

title = "SFT(IA)+ORPO"
base = candidates


@dataclass
class Flags(PairFlags):
    """What stage orpo reads beside the common flags."""

    lam: float = flag(0.1, "weight of the odds ratio", at_least=0)


def count_tokens(batch, cfg) -> int:
    """The tokens of the better answers, as often as they are in a pair."""
    lengths = torch.bincount(batch["sequence_ids"], minlength=batch["documents"])
    return int(lengths[batch["better"]].sum())


TERMS = {"ce": count_tokens, "odds": "pairs"}
METRICS = {"accuracy": "pairs"}
items = pair_items


def step(model, batch, cfg) -> dict:
    """Both terms over the pairs of a batch, and how many pairs come out right."""
    sums, lengths = document_logprobs(model, batch)  # (n,), (n,)
    log_odds = odds_logarithm(sums / lengths)
    ratio = log_odds[batch["better"]] - log_odds[batch["worse"]]  # (P,)
    odds = -torch.nn.functional.logsigmoid(ratio).sum()
    return {"ce": -sums[batch["better"]].sum(), "odds": cfg.lam * odds,
            "accuracy": (ratio > 0).sum().to(ratio)}


def odds_logarithm(x):
    """log(P / (1 - P)) of log-probabilities x = log P."""
    x = x.clamp(max=-1e-6)  # where P rounds to 1, the odds would be infinite
    return x - torch.log(-torch.expm1(x))
