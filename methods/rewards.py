"""Who rewards sampled answers: the judge that --judge names, its flags, and what it says.

    self        the model to be trained, asked about type and correctness: arXiv 2403.14221
    agreement   the other answers to the same question (methods/agreement.py); reads no target
    rule        exact match and ROUGE-L
    http        a chat model behind a server
    reward      a reward model of stage reward; length: a control that counts words
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import judge as judging
from eval import extra
from methods import agreement
from methods.flags import flag, rare


@dataclass
class JudgeFlags:
    """How answers are rewarded."""

    judge: Literal["self", "agreement", "rule", "http", "reward", "length"] = flag(
        "self", "who rewards answers")
    agreement_share: float = rare(0.34, "least share of a question's answers that must agree",
                                  share=True)
    agreement_by: Literal["rule", "self", "http"] = rare("rule", "who says that answers agree")
    reward_model: str = rare("", "run folder of stage reward, for --judge reward", path=True)
    reward_mode: Literal["gated", "sum"] = rare("gated", "how two answers are combined")
    reward_steps: Literal["two", "one"] = rare("two", "ask type and correctness")
    show_target: bool = rare(True, "let the judge see the reference")
    self_questions: int = rare(1, "questions of the self-judge, 1 or 2", at_least=1)
    self_prior: bool = rare(False, "subtract the log-odds of empty answers")
    self_calibrate: bool = rare(False, "fit the self-judge's threshold on train instances")


# ----- Judges -----
def make_judge(run, config: judging.JudgeConfig | None = None):
    """The judge that --judge names: the model as it is now, rules, a server, or a number."""
    cfg = run.cfg
    if cfg.judge == "rule":
        return judging.RuleJudge(cfg.rouge_threshold)
    if cfg.judge == "agreement":
        return agreement.make_judge(run)
    if cfg.judge in ("reward", "length"):
        from methods import heads

        return heads.score_judge(run, cfg.reward_model)
    if config is None:
        shown = cfg.show_target and not getattr(cfg, "unlabelled", "")  # else there is none
        config = judging.JudgeConfig(cfg.reward_mode, cfg.reward_steps, shown)
    if cfg.judge == "self":
        from methods import self_judge

        return self_judge.make(run, config)
    if extra("judges", cfg.plain):
        return extra("judges", cfg.plain).server_judge(cfg, config, run)
    return judging.HttpJudge(cfg.judge_url, cfg.judge_model, config)


# ----- Verdicts -----
def rewarded(run, records: list[dict], judge) -> list[dict]:
    """The records with what the judge says of each; without a judge, with no reward."""
    if judge is None:
        return [record | {"reward": None, "how": "unasked"} for record in records]
    found = []
    for record, verdict in zip(records, judge.judge(with_labels(run, records)), strict=True):
        found.append(record | as_fields(verdict))
    return found


def with_labels(run, records: list[dict]) -> list[dict]:
    """The records with the closed set of labels of their task, which rules look at."""
    # None for free text.
    labels = {task.name: task.labels for task in run.tasks}
    return [record | {"labels": labels.get(record["task"])} for record in records]


def as_fields(verdict: judging.Verdict) -> dict:
    """A verdict as the fields of a record."""
    return {"reward": verdict.reward, "how": verdict.how, "expected": verdict.type,
            "correct": verdict.correct, "p_expected": verdict.p_expected,
            "p_correct": verdict.p_correct}


# ----- Before a run -----
def check_judge(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    if cfg.judge == "agreement" and cfg.samples * cfg.pool_wordings < 2:
        raise ValueError("--judge agreement needs two answers to a question. Raise --samples or "
                         "--pool-wordings.")
    given = cfg.agreement_by, cfg.agreement_share
    if cfg.judge != "agreement" and given != (JudgeFlags.agreement_by, JudgeFlags.agreement_share):
        raise ValueError("--agreement-by and --agreement-share are for --judge agreement, not "
                         f"{cfg.judge}. Add that, or leave them out.")
    if cfg.agreement_by != "rule" and not extra("judges", cfg.plain):
        raise ValueError(f"--agreement-by {cfg.agreement_by} needs extras/judges. Leave out "
                         "--plain, or give --agreement-by rule.")
    if cfg.reward_model and cfg.judge != "reward":
        raise ValueError(f"--reward-model is for --judge reward, not {cfg.judge}. Add that, or "
                         "leave it out.")
    if cfg.reward_model and not Path(cfg.reward_model, "value_head.safetensors").exists():
        raise ValueError(f"--reward-model {cfg.reward_model} has no value_head.safetensors. Give a "
                         "run folder of --stage reward.")
    if cfg.judge == "reward" and not cfg.reward_model:
        raise ValueError("--judge reward needs --reward-model DIR, a run folder of --stage reward.")
    if cfg.self_questions > 2:
        raise ValueError(f"--self-questions is {cfg.self_questions}. There are 2; give 1 or 2.")
    if cfg.judge != "self" and (cfg.self_questions > 1 or cfg.self_prior or cfg.self_calibrate):
        raise ValueError("--self-questions, --self-prior and --self-calibrate are for --judge "
                         f"self, not {cfg.judge}. Add that, or leave them out.")
