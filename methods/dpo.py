"""Direct preference optimisation (DPO) and its relatives.

    h = [S(y_w) - S(y_l)] - [S_ref(y_w) - S_ref(y_l)],   S(y) = sum_t log p(y_t | x, y_<t)

    sigmoid   -log sigma(beta h)                                             arXiv 2305.18290, Eq. 7
              with --label-smoothing e: -(1-e) log sigma(beta h) - e log sigma(-beta h)        cDPO
    robust    [-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e)   arXiv 2403.00409
    ipo       (h - 1 / (2 beta))^2                           arXiv 2310.12036; there beta is tau
    hinge     max(0, 1 - beta h)                             RSO's, arXiv 2309.06657, Eq. 10

The reference is the model that the stage starts from; its log-probabilities are computed once.
"""

from dataclasses import dataclass

from methods import candidates, preference
from methods.pairing import PairFlags, pair_items
from methods.preference import add_reference

title = "SFT(IA)+DPO"
base = candidates


@dataclass
class Flags(preference.PreferenceFlags, PairFlags):
    """What stage dpo reads beside the common flags."""


TERMS = {"loss": "pairs"}
METRICS = preference.METRICS
step, check = preference.preference_step, preference.check_preference


def items(run) -> list[dict]:
    """Pairs, with each document's log-probability under the starting model."""
    return add_reference(run, pair_items(run))
