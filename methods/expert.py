"""Expert iteration: fine-tune on the best of n sampled answers, and repeat with --rounds.

The loss is that of SFT on one best answer of each question   (best of n: WebGPT, arXiv 2112.09332;
iterated: arXiv 1705.08439). tools/best_of.py measures best of n without training.

With --choices the best answers are those that people chose or wrote, and all of them are learnt.
OpenAI's index of models for researchers calls this FeedME.
"""

from dataclasses import dataclass

import data
from methods import candidates, record_name, token_step
from methods.flags import flag
from methods.groups import best_answers, candidate_document, group_rng, grouped_candidates

title = "SFT(IA)+expert"
base = candidates
unread = ("max_worse",)


@dataclass
class Flags(candidates.Flags):
    """What stage expert reads beside the common flags."""

    choices: str = flag("", "file of the answers that people chose among --candidates", path=True)


TERMS = {"ce": "tokens"}
step = token_step


def check(cfg) -> None:
    """Raises ValueError for flags that do not fit together."""
    candidates.check(cfg)
    if cfg.choices and not cfg.candidates:
        raise ValueError("--choices says which answers of --candidates are good, and no such file "
                         "is given. Add the candidates.jsonl that people chose from.")


def inspect(run) -> None:
    """Raises ValueError for a choice that cannot be learnt, before anything is trained."""
    candidates.inspect(run)
    if run.cfg.choices:
        chosen_items(run)


def items(run) -> list[dict]:
    """A best answer of each question, or all chosen ones."""
    found = []
    if run.cfg.choices:
        found = chosen_items(run)
        run.say(f"expert: {len(found)} answers that people chose or wrote.")
        return found
    for group in grouped_candidates(run):
        best, _ = best_answers(group)
        if best:
            found.append(make_item(run, group_rng(run, group).choice(best)))
    run.say(f"expert: {len(found)} questions with a best answer.")
    return found


def make_item(run, record: dict) -> dict:
    """An item of one answer."""
    return {"documents": [candidate_document(run, record)], "name": record_name(record)}


# ----- Choices -----
def chosen_items(run) -> list[dict]:
    """An item for each different line of --choices. Raises ValueError that names the line."""
    path, groups, found = run.cfg.choices, {}, {}
    for group in grouped_candidates(run):
        groups[str(group[0]["task"]), str(group[0]["id"])] = group
    for number, choice in enumerate(data.read_records(path), 1):
        where = f"{path}, line {number}"
        record = chosen_record(groups, choice, where)
        try:
            item = make_item(run, record)
        except ValueError as error:  # longer than --max-len
            raise ValueError(f"{where}: {error}") from error
        found[record_name(record), record["wording"], record["response"]] = item
    if not found:
        raise ValueError(f"{path} has no choice. Expected lines of task, id and response.")
    return list(found.values())


def chosen_record(groups: dict, choice, where: str) -> dict:
    """The candidate that a line {task, id, response} chooses; groups: {(task, id): candidates}.

    A line may name a wording. Without one, the answer stands under the first wording that produced
    it; one that is no candidate, since somebody wrote it, under the task's instruction.
    """
    if not isinstance(choice, dict) or not str(choice.get("response") or "").strip():
        raise ValueError(f"{where}, has no response. Expected task, id and response.")
    group = groups.get((str(choice.get("task")), str(choice.get("id"))))
    if not group:
        raise ValueError(f"{where}, chooses an answer to {choice.get('task')}/{choice.get('id')}, "
                         "which is no question of --candidates. Fix or delete that line.")
    first, text, wording = group[0], choice["response"], choice.get("wording")
    sampled = [x["wording"] for x in group if x["response"] == text]
    wording = wording or (sampled or [first.get("instruction", first["wording"])])[0]
    if not isinstance(text, str) or not isinstance(wording, str):
        raise ValueError(f"{where}: response and wording are texts. Fix that line.")
    return first | {"wording": wording, "response": text}
