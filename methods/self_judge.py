"""A self-judge for models that were not taught to judge: questions, priors, a threshold.

`judge.LocalJudge` asks one question, in the words in which --judge-share teaches it. Here, with
k a question about an answer y to an input x, and yes_k and no_k its two keywords,

    d_k(x, y) = log p_k(yes_k | x, y) - log p_k(no_k | x, y)     log-odds of one question
    D(x, y)   = mean_k [d_k(x, y) - mean_c d_k(x, c)]            their mean, without the priors
    p(x, y)   = sigmoid(D(x, y) - threshold)                     above 1/2 the verdict is yes

--self-questions   A verdict depends on how the question is worded; the mean over several questions
    does so less (Jiang et al. 2020, arXiv 1911.12543). With 2, the taught question stands behind
    judged examples from the train split, as in the prompts of CAT's authors, and the other one is
    answered by yes or no.
--self-prior       A model prefers one keyword whatever it reads. What it says of answers c without
    content is subtracted: contextual calibration (Zhao et al. 2021, arXiv 2102.09690), as a
    difference of logarithms as in domain-conditional PMI (Holtzman et al. 2021, arXiv 2104.08315).
--self-calibrate   The threshold with the best balanced accuracy, the mean of the shares of right
    and of wrong answers classified correctly, on train instances, whose targets are known.
"""

from itertools import product

import numpy as np

import judge as judging
from judge import TYPE_WORDS, VERDICT_WORDS
from methods.candidates import record_to_answer
from methods.examples import ask_model
from methods.judge_auc import labelled, sampled_answers, train_instances
from methods.judge_questions import judged_examples, taught_question, yes_question

FREE = ("N/A", "[MASK]", "")  # answers without content, those of arXiv 2102.09690


class SelfJudge(judging.LocalJudge):
    """The model as its own judge, by D of this file's docstring.

    examples: what stands before the taught question, {(instruction, TYPE_WORDS or ...): text}.
    """

    def __init__(self, ask, config=None, *, questions=1, prior=False, examples=None):
        super().__init__(ask, config)
        self.examples = examples or {}
        self.questions = (self.example_question, yes_question)[:questions]
        self.free = FREE if prior else ()
        self.thresholds = {TYPE_WORDS: 0.0, VERDICT_WORDS: 0.0}

    def example_question(self, key: tuple, words: tuple) -> tuple:
        """The taught question behind the examples of its task, if there are some."""
        prefix, suffix, pair = taught_question(key, words)
        return self.examples.get((key[0], words), "") + prefix, suffix, pair

    def probabilities(self, keys, question, words) -> dict:
        """{key: p(x, y)}; None where the model gave no number."""
        found = zip(keys, self.log_odds(keys, words), strict=True)
        return {key: judging.two_way(odds, self.thresholds[words]) for key, odds in found}

    def log_odds(self, keys: list[tuple], words: tuple) -> list[float]:
        """D(x, y) of each key, before the threshold."""
        texts = product(keys, (None, *self.free))
        asked = list(dict.fromkeys(with_answer(key, text) for key, text in texts))
        mean = dict.fromkeys(asked, 0.0)
        for question in self.questions:
            prompts = zip(*[question(key, words) for key in asked], strict=True)
            for key, (yes, no) in zip(asked, self.ask(*prompts), strict=True):
                mean[key] += (yes - no) / len(self.questions)
        found = []
        for key in keys:
            priors = [mean[with_answer(key, text)] for text in self.free]
            found.append(mean[key] - sum(priors) / max(1, len(priors)))
        return found


def with_answer(key: tuple, text: str | None) -> tuple:
    """A key with another answer; with None itself."""
    return key if text is None else (*key[:3], text)


def make(run, config):
    """The self-judge that the flags describe; methods without such flags get LocalJudge."""
    cfg = run.cfg

    def ask(*prompts):
        return ask_model(run, *prompts)
    questions, prior = getattr(cfg, "self_questions", 1), getattr(cfg, "self_prior", False)
    calibrated = getattr(cfg, "self_calibrate", False)
    if questions == 1 and not prior and not calibrated:
        return judging.LocalJudge(ask, config)
    examples = {}
    if questions > 1:
        examples = judged_examples(run, config.show_target)
    judge = SelfJudge(ask, config, questions=questions, prior=prior, examples=examples)
    if calibrated:
        calibrate(run, judge)
    return judge


# ----- Threshold -----
def known_answers(run, pairs: list[tuple]) -> list[dict]:
    """Their references, and as wrong answers the outputs of other instances and other tasks."""
    found = []
    for number, (task, instance) in enumerate(pairs):
        record = record_to_answer(task, instance, task.definition, 0)
        own = [other for name, other in pairs if name is task]
        far = pairs[(number + len(pairs) // 2) % len(pairs)][1]  # of another task, if there is one
        for other in (instance, own[(number + 1) % len(own)], far):
            found.append(record | {"response": other.outputs[0]})
    return found


def calibrate(run, judge: SelfJudge) -> None:
    """Choose the judge's two thresholds on train instances.

    That of correctness on answers of the right kind: where the judge is asked about both, those of
    another kind are rejected before.
    """
    pairs = train_instances(run, 0)
    truths = labelled(run, judge, known_answers(run, pairs) + sampled_answers(run, pairs))
    fitting = {key: truth for key, truth in truths.items() if truth.type}
    for words, known, name in ((TYPE_WORDS, truths, "type"), (VERDICT_WORDS, fitting, "correct")):
        if known:
            odds, right = judge.log_odds(list(known), words), []
            for truth in known.values():
                right.append(getattr(truth, name))
            judge.thresholds[words] = best_threshold(odds, right)


def best_threshold(odds: list[float], right: list[bool]) -> float:
    """The threshold of the highest balanced accuracy; of equally good ones that nearest to 0.

    0 where all answers are right, or none.
    """
    odds, right = np.array(odds), np.array(right, dtype=bool)  # (n,), (n,)
    if right.all() or not right.any():
        return 0.0
    values = np.unique(odds)
    cuts = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2])  # (m,)
    said = odds > cuts[:, None]  # (m, n)
    balanced = said[:, right].mean(1) + (~said)[:, ~right].mean(1)  # (m,)
    best = cuts[balanced >= balanced.max() - 1e-9]
    return float(best[np.abs(best).argmin()])
