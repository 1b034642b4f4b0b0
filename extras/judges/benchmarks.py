"""Labelled pairs in the forms of other benchmarks, for tools.meta_evaluate.

    mtbench    votes {question_id, turn, model_a, model_b, winner, judge, conversation_a,
               conversation_b} of people                                      arXiv 2306.05685
    llmeval2   {query, response1, response2, human, dataset}                  arXiv 2308.01862
    faireval   a folder with question.jsonl, answer/*.jsonl of two models, and people's verdicts,
               a line for each question, in review/*human*                    arXiv 2305.17926

A pair that people call a tie has no label; it is left out and counted. Where several people judged
a pair, most of their votes are its label. All raise ValueError that names the file and the record.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from extras.formats.checks import refuse, show
from extras.formats.rows import read_rows, read_text
from extras.judges.pairs import load_pairs

# What a verdict may be called, besides the name of one of the models.
FIRST = {"1", "a", "model_a", "response1", "assistant1", "win"}
SECOND = {"2", "b", "model_b", "response2", "assistant2", "lose", "loss"}
TIE = {"0", "tie", "draw", "equal", "tie (inconsistent)"}
FORMS = {
    "mtbench": "votes with question_id, turn, model_a, model_b, winner, judge and conversations",
    "llmeval2": "pairs with query, response1, response2, human and dataset",
    "faireval": "question.jsonl, answer/*.jsonl of two models, and review/*human*",
}


def load_benchmark(name: str, path) -> tuple[dict[str, list[dict]], dict]:
    """Pairs by subset, and what is known of the labels; name: llmbar, pairs or one of FORMS.

    The latter is {"ties": pairs left out, "people": see `human_agreement`}, without people where
    each pair has one label.
    """
    if name in ("llmbar", "pairs"):
        return load_pairs(path), {}
    subsets, votes, ties = {}, {"mtbench": mtbench, "llmeval2": llmeval2, "faireval": faireval}, 0
    groups = {}
    for key, subset, pair, verdict in votes[name](Path(path)):
        groups.setdefault((subset, key), (pair, []))[1].append(verdict)
    for (subset, _), (pair, verdicts) in groups.items():
        counts = Counter(verdicts).most_common()
        label, most = counts[0]
        if not label or counts[1:] and counts[1][1] == most:  # a tie, or no verdict has most votes
            ties += 1
            continue
        subsets.setdefault(subset, []).append(pair | {"label": label})
    refuse(not subsets, f"{path} has no pair that people prefer one output of. Expected "
           f"{FORMS[name]}.")
    about, several = {"ties": ties}, [verdicts for _, verdicts in groups.values() if verdicts[1:]]
    if several:
        about["people"] = human_agreement(several)
    return subsets, about


def human_agreement(groups: list[list[int]]) -> dict:
    """How often two people agree on a pair, in verdicts 1, 2 and 0 (tie).

    {"with_ties", "without_ties"}: {"mean", "n"} over all pairs of votes on the same outputs; the
    latter over the votes that are no tie, where chance gives one half.
    """
    found = {}
    for name, kept in (("with_ties", {0, 1, 2}), ("without_ties", {1, 2})):
        same = []
        for verdicts in groups:
            known = [verdict for verdict in verdicts if verdict in kept]
            same += [a == b for a, b in combinations(known, 2)]
        found[name] = {"mean": sum(same) / len(same) if same else None, "n": len(same)}
    return found


def describe_labels(labels: dict) -> str:
    """A line on what people said; labels: what `load_benchmark` knows of it."""
    text = f"People called {labels['ties']} pairs a tie, or did not agree; they are left out."
    people = labels.get("people")
    if people:
        for name, words in (("with_ties", ""), ("without_ties", ", votes for a tie apart")):
            mean, n = people[name]["mean"], people[name]["n"]
            if n:
                text += f" Two people agree in {100 * mean:.1f} % of {n} pairs of votes{words}."
    return text


def read_verdict(said, where: str, models=("", "")) -> int:
    """1, 2 or 0 (a tie) for what a label says; models: the names of the two, which it may be."""
    text = str(said).strip().lower()
    names = [name.lower() for name in models]
    for verdict, words in ((1, FIRST), (2, SECOND), (0, TIE)):
        if text in words or verdict and names[verdict - 1] == text:
            return verdict
    wanted = " or ".join(filter(None, models)) or "model_a, model_b"
    refuse(True, f"{where}: the verdict is {show(said)}. Expected {wanted}, 1, 2 or tie.")


# ----- Files -----
def mtbench(path: Path) -> Iterator[tuple]:
    """(pair's key, subset, pair, verdict) of every vote; the subsets are the turns."""
    for row, where in read_rows(path, FORMS["mtbench"]):
        refuse(not {"question_id", "turn", "model_a", "model_b", "winner", "conversation_a",
                    "conversation_b"} <= row.keys(), f"{where}: expected {FORMS['mtbench']}.")
        refuse(str(row["turn"]) not in ("1", "2"), f"{where}: turn is {show(row['turn'])}. "
               "Expected 1 or 2.")
        turn, models = int(row["turn"]), (str(row["model_a"]), str(row["model_b"]))
        verdict = read_verdict(row["winner"], where, models)
        sides = [row["conversation_a"], row["conversation_b"]]
        if models[0] > models[1]:  # people see either order
            models, sides, verdict = models[::-1], sides[::-1], {1: 2, 2: 1, 0: 0}[verdict]
        asked, one, other = turns(sides, turn, where)
        pair = {"input": asked, "output_1": one, "output_2": other, "source_1": models[0],
                "source_2": models[1]}
        yield (str(row["question_id"]), *models), f"turn {turn}", pair, verdict


def turns(conversations: list, turn: int, where: str) -> tuple[str, str, str]:
    """The questions up to a turn, and what either model answered to them."""
    texts = []
    for messages in conversations:
        refuse(not isinstance(messages, list) or len(messages) < 2 * turn or not all(
            isinstance(x, dict) and isinstance(x.get("content"), str) for x in messages),
            f"{where}: a conversation has fewer than {turn} turns of texts. Expected a list of "
            "{role, content}.")
        texts.append([message["content"] for message in messages[:2 * turn]])
    refuse(texts[0][::2] != texts[1][::2], f"{where}: the two conversations have other questions.")
    return tuple(numbered(part) for part in (texts[0][::2], texts[0][1::2], texts[1][1::2]))


def numbered(texts: list[str]) -> str:
    """One text as it is, several with their numbers."""
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def llmeval2(path: Path) -> Iterator[tuple]:
    """The same of LLMEval^2; its subsets are the data sets that it is made of."""
    for number, (row, where) in enumerate(read_rows(path, FORMS["llmeval2"])):
        given = [row.get(name) for name in ("query", "response1", "response2")]
        refuse(not all(isinstance(text, str) for text in given) or "human" not in row,
               f"{where}: expected {FORMS['llmeval2']}.")
        pair = dict(zip(("input", "output_1", "output_2"), given, strict=True))
        yield number, str(row.get("dataset", "all")), pair, read_verdict(row["human"], where)


def faireval(path: Path) -> Iterator[tuple]:
    """The same of FairEval's folder."""
    answers, people = sorted(path.glob("answer/*.jsonl")), sorted(path.glob("review/*human*"))
    refuse(len(answers) != 2 or len(people) != 1 or not (path / "question.jsonl").exists(),
           f"{path}: expected {FORMS['faireval']}; found {len(answers)} files of answers and "
           f"{len(people)} of people's verdicts.")
    models = [file.stem.removeprefix("answer_") for file in answers]
    # People's file names the models in its order: review_MODEL_MODEL_human.txt.
    places = [people[0].name.find(model) for model in models]
    if places[0] > places[1]:
        answers, models = answers[::-1], models[::-1]
    rows = [{str(row.get("question_id")): row.get("text") for row, _ in read_rows(
        file, FORMS["faireval"])} for file in (path / "question.jsonl", *answers)]
    lines = [line for line in read_text(people[0]).splitlines() if line.strip()]
    refuse(len(lines) != len(rows[0]), f"{people[0]} has {len(lines)} verdicts, and question.jsonl "
           f"{len(rows[0])} questions. Expected a line for each.")
    for number, (line, key) in enumerate(zip(lines, rows[0], strict=True), 1):
        where = f"{people[0]}, line {number}"
        texts = [found.get(key) for found in rows]
        refuse(not all(isinstance(text, str) for text in texts), f"{where}: question {key} has no "
               "text, or no answer of one of the models.")
        pair = dict(zip(("input", "output_1", "output_2"), texts, strict=True))
        verdict = read_verdict(line.split()[-1], where, models)
        yield key, "FairEval", pair | {"source_1": models[0], "source_2": models[1]}, verdict
