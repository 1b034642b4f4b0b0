"""A scalar head on the final hidden states: rewards of answers, and PPO's values.

A finished run keeps it beside its adapter, in value_head.safetensors. `ScoreJudge` makes a judge of
a reward model, or of any other number.
"""

from pathlib import Path

import data
import judge as judging
from methods import collate, open_trained, torch
from methods.groups import candidate_document

HEAD = "value_head.safetensors"


def attach(run) -> None:
    """A scalar head on the final hidden states, float32, zero at the start: model.value_head."""
    model = run.model
    head = torch.nn.Linear(model.config.dim, 1, device=next(model.parameters()).device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    model.value_head = head


def detach(run, folder: Path) -> None:
    """Save the head and take it off the model."""
    from safetensors.torch import save_file

    save_file(run.model.value_head.cpu().state_dict(), folder / HEAD)
    del run.model.value_head


def open_reward_model(run, folder):
    """A finished reward model. Raises ValueError for a folder without one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / HEAD
    if not path.is_file():
        raise ValueError(f"{folder} has no {HEAD}. Give the run folder of --stage reward.")
    model = open_trained(run.cfg, Path(folder))
    model.value_head = torch.nn.Linear(model.config.dim, 1, device=next(model.parameters()).device)
    try:
        model.value_head.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError):
        raise ValueError(f"{path} does not hold a head of width {model.config.dim}; it belongs to "
                         "another model.") from None
    return model


def document_rewards(model, batch: dict):
    """The head on the last token (EOS) of each document, float32 (n,)."""
    hidden = model.hidden(batch["input_ids"], batch["attend"], batch["ends"])  # (n, D)
    return model.value_head(hidden.float()).squeeze(-1)


def reward_scores(run, model, records: list[dict]) -> list[float]:
    """A reward model's scalars of responses under their wordings."""
    scores, device = [], next(model.parameters()).device
    found = [{"documents": [candidate_document(run, record)]} for record in records]
    model.eval()
    with torch.inference_mode():
        for part in data.micro_batches(found, run.cfg.micro_tokens):
            scores += document_rewards(model, collate(part, model, device)).tolist()
    return scores


class ScoreJudge:
    """A judge whose rewards are plain numbers, from score(items); equal items are scored once."""

    name = "score"

    def __init__(self, score):
        self.score = score

    def judge(self, items: list[dict]) -> list[judging.Verdict]:
        """One verdict per item, with a reward and nothing else."""
        first = {}
        for item in reversed(items):
            first[self.key(item)] = item  # of equal items the first
        scores = dict(zip(first, self.score(list(first.values())), strict=True))
        found = []
        for item in items:
            found.append(judging.Verdict(None, None, scores[self.key(item)], "scored"))
        return found

    def key(self, item: dict) -> tuple:
        """What the score of an item depends on."""
        return item["wording"], item["input"], item["response"]


def score_judge(run, folder: str) -> ScoreJudge:
    """The reward model in `folder`, or for --judge length a control that counts words."""
    if run.cfg.judge == "length" and not folder:
        return ScoreJudge(length_scores)
    model = open_reward_model(run, folder)
    return ScoreJudge(lambda items: run.guard.share(
        items, lambda part: reward_scores(run, model, part)))


def length_scores(items: list[dict]) -> list[float]:
    """1 - |len / L - 1|, with L the target's length in words   (arXiv 2310.03716)."""
    found = []
    for item in items:
        wanted = max(1, judging.count_words(item["target"]))
        found.append(1 - abs(judging.count_words(item["response"]) / wanted - 1))
    return found
