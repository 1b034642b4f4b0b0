"""What is the best of n sampled answers worth, if a judge or a reward model chooses it?

    python -m tools.best_of --model DIR --adapter runs/x --samples 16

Worth is the share of exact answers. Writes OUT/best_of.json.
"""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

from eval import read_questions
from extras.judges import make_judge
from extras.reports.metrics import sample_answers
from judge import exact_match
from methods import Run, heads
from tools import make_main, open_models


def evaluate_best_of(cfg) -> None:
    """Print and write, for each model and each chooser, what the best of 1, 2, 4, ... is worth."""
    questions, judge, found = read_questions(cfg), make_judge(cfg), {}
    for name, model, tokenizer, template in open_models(cfg):
        answers = sample_answers(model, tokenizer, template, questions, cfg, cfg.samples)
        items, found[name] = [], {}
        for question, made in zip(questions, answers, strict=True):
            about = question | {"instruction": "", "target": question["targets"][0],
                                "wording": question["wordings"][0]}
            items += [about | {"response": answer.text} for answer in made]
        chooser = "exact rules" if cfg.judge == "rule" else judge.name
        choosers = {chooser: [verdict.reward for verdict in judge.judge(items)]}
        if cfg.reward_model:
            settings = Namespace(**vars(cfg) | {"max_len": 512, "micro_tokens": 8192})
            run = Run(settings, None, None, tokenizer, template, [], Path(cfg.out), None)
            scorer = heads.open_reward_model(run, cfg.reward_model)
            choosers["reward model"] = heads.reward_scores(run, scorer, items)
        truths = [float(exact_match(item["response"], item["targets"])) for item in items]
        for chooser, rewards in choosers.items():
            print(f"{name}, best of n by {chooser}:")
            found[name][chooser] = best_of_table(rewards, truths, cfg.samples)
    Path(cfg.out, "best_of.json").write_text(json.dumps(found, indent=1) + "\n")


def best_of_table(rewards: list, truths: list[float], total: int) -> list[dict]:
    """Print and return [{"n", "kl", "reward", "truth"}], n = 1, 2, 4, ..., total.

    rewards and truths: of all answers, `total` a question. Means over questions; one with an answer
    without a reward is left out. "kl": to the model itself, a bound where rewards tie.
    """
    spans = [slice(start, start + total) for start in range(0, len(rewards), total)]
    kept, rows = [span for span in spans if None not in rewards[span]], []
    if not kept:
        raise ValueError("the judge left a sample of every question without a reward, so there is "
                         "no best of n. Give another judge.")
    if len(kept) < len(spans):
        print(f"({len(spans) - len(kept)} left out: a sample got no reward)")
    for n in [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < total] + [total]:
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n})
        for key, values in (("reward", rewards), ("truth", truths)):
            best = [best_of_n(rewards[span], n, values[span]) for span in kept]
            rows[-1][key] = float(np.mean(best))
        print("  n {n:4d} | KL <= {kl:5.3f} nats | reward {reward:6.3f} | exact {truth:6.1%}"
              .format(**rows[-1]))
    return rows


def best_of_n(rewards: list[float], n: int, values: list[float]) -> float:
    """Expected value of the best of n samples, from N >= n of them   WebGPT, arXiv 2112.09332.

        sum_{i=n}^{N} C(i-1, n-1) / C(N, n) * v_(i),   r_(1) <= ... <= r_(N)

    Unbiased. Samples of equal reward are chosen alike: they share their values' mean.
    """
    tied, terms = {}, []
    for reward, value in zip(rewards, values, strict=True):
        tied.setdefault(reward, []).append(value)
    for i, reward in enumerate(sorted(rewards)):
        terms.append(math.comb(i, n - 1) * (sum(tied[reward]) / len(tied[reward])))
    return sum(terms[n - 1:]) / math.comb(len(rewards), n)


main = make_main(evaluate_best_of, __doc__, demo=True, samples=(16, "answers sampled per question"),
                 reward_model=("", "run folder of stage reward, which chooses too"),
                 seed=(0, "seeds the sampling"))

if __name__ == "__main__":
    sys.exit(main())
