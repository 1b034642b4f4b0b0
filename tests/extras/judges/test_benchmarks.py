"""benchmarks.py: other benchmarks' forms, ties, several people, and what is wrong in a file."""

import json

import pytest

from extras.judges.benchmarks import (
    describe_labels,
    human_agreement,
    load_benchmark,
    read_verdict,
)
from tools import meta_evaluate


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*texts):
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def vote(winner, turn=1, judge="expert_1", models=("alpha", "beta"), question=81, **more):
    """A vote on two conversations of two turns."""
    sides = {"alpha": talk("q 1", "a 1", "q 2", "a 2"), "beta": talk("q 1", "b 1", "q 2", "b 2")}
    return {"question_id": question, "model_a": models[0], "model_b": models[1], "winner": winner,
            "judge": judge, "turn": turn, "conversation_a": sides[models[0]],
            "conversation_b": sides[models[1]]} | more


# ----- MT-Bench -----
def test_votes_become_pairs_of_their_turn(tmp_path):
    path = write(tmp_path / "votes.jsonl", [vote("model_a"), vote("model_b", turn=2)])
    subsets, about = load_benchmark("mtbench", path)
    models = {"source_1": "alpha", "source_2": "beta"}
    assert subsets == {
        "turn 1": [{"input": "q 1", "output_1": "a 1", "output_2": "b 1", "label": 1} | models],
        "turn 2": [{"input": "[1] q 1\n\n[2] q 2", "output_1": "[1] a 1\n\n[2] a 2",
                    "output_2": "[1] b 1\n\n[2] b 2", "label": 2} | models]}
    assert about == {"ties": 0}


def test_most_people_decide_whatever_order_they_saw(tmp_path):
    path = write(tmp_path / "votes.jsonl", [
        vote("model_a"), vote("model_a", models=("beta", "alpha"), judge="b"),
        vote("model_b", models=("beta", "alpha"), judge="c"), vote("tie", judge="d"),
        vote("model_a", question=82), vote("model_b", question=82, judge="b"),  # one for each
        vote("tie", question=83)])
    subsets, about = load_benchmark("mtbench", path)
    (pair,) = subsets["turn 1"]
    assert pair["label"] == 1 and about["ties"] == 2
    more = [vote(said, question=84, judge=name) for name, said in
            (("a", "tie"), ("b", "model_b"), ("c", "tie"))]
    path = write(tmp_path / "more.jsonl", [vote("model_a"), *more])
    assert load_benchmark("mtbench", path)[1]["ties"] == 1  # most called it a tie
    # Votes on question 81 are 1, 2, 1, 0 and on 82 they are 1, 2.
    assert about["people"] == {"with_ties": {"mean": 1 / 7, "n": 7},
                               "without_ties": {"mean": 1 / 4, "n": 4}}
    said = describe_labels(about)
    assert "called 2 pairs a tie" in said and "agree in 14.3 % of 7 pairs of votes." in said
    assert "agree in 25.0 % of 4 pairs of votes, votes for a tie apart." in said


def test_a_vote_in_the_other_order_is_turned_round(tmp_path):
    path = write(tmp_path / "votes.jsonl", [vote("model_a", models=("beta", "alpha"))])
    ((pair,),) = load_benchmark("mtbench", path)[0].values()
    assert pair["label"] == 2 and pair["output_2"] == "b 1" and pair["source_2"] == "beta"


def test_people_who_are_all_of_one_mind():
    assert human_agreement([[1, 1], [2, 2, 2]])["without_ties"] == {"mean": 1.0, "n": 4}
    assert human_agreement([[0, 1]])["without_ties"] == {"mean": None, "n": 0}


@pytest.mark.parametrize("change, wanted", [
    ({"winner": "both"}, "record 0: the verdict is .*both.*Expected alpha or beta, 1, 2 or tie"),
    ({"conversation_a": talk("q 1", "a 1")}, "record 0: a conversation has fewer than 2 turns"),
    ({"conversation_a": talk("q 9", "a 1", "q 2", "a 2")}, "record 0: .*other questions"),
    ({"conversation_b": "text"}, "record 0: a conversation has fewer"),
    ({"turn": "first"}, "record 0: turn is .*first.*Expected 1 or 2"),
    ({"turn": 0}, "record 0: turn is 0. Expected 1 or 2")])
def test_a_vote_that_cannot_be_used_is_named(change, wanted, tmp_path):
    path = write(tmp_path / "votes.jsonl", [vote("model_a", turn=2) | change])
    with pytest.raises(ValueError, match=wanted):
        load_benchmark("mtbench", path)


def test_a_vote_that_lacks_a_field_is_named(tmp_path):
    row = vote("model_a")
    del row["turn"]
    with pytest.raises(ValueError, match="record 0: expected votes with question_id, turn"):
        load_benchmark("mtbench", write(tmp_path / "votes.jsonl", [row]))


# ----- LLMEval^2 -----
def test_pairs_of_several_data_sets(tmp_path):
    rows = [{"query": "q", "response1": "a", "response2": "b", "human": human, "dataset": dataset}
            for human, dataset in (("response1", "shp"), (2, "shp"), ("tie", "eli5"),
                                   ("response2", "eli5"))]
    subsets, about = load_benchmark("llmeval2", write(tmp_path / "all.json", rows))
    assert {name: [pair["label"] for pair in found] for name, found in subsets.items()} == {
        "shp": [1, 2], "eli5": [2]}
    assert about == {"ties": 1}
    assert subsets["shp"][0] == {"input": "q", "output_1": "a", "output_2": "b", "label": 1}
    with pytest.raises(ValueError, match="record 0: expected pairs with query"):
        load_benchmark("llmeval2", write(tmp_path / "bad.json", [{"query": "q", "human": 1}]))


def test_ties_alone_are_refused(tmp_path):
    row = {"query": "q", "response1": "a", "response2": "b", "human": "tie", "dataset": "shp"}
    with pytest.raises(ValueError, match="no pair that people prefer one output of"):
        load_benchmark("llmeval2", write(tmp_path / "all.jsonl", [row]))


# ----- FairEval -----
@pytest.fixture
def folder(tmp_path):
    """FairEval's folder: three questions, two models, a line of people for each question."""
    write(tmp_path / "question.jsonl", [{"question_id": k, "text": f"q {k}"} for k in (1, 2, 3)])
    for name in ("gpt35", "vicuna-13b"):
        write(tmp_path / "answer" / f"answer_{name}.jsonl", [
            {"question_id": k, "text": f"{name} {k}"} for k in (3, 2, 1)])
    path = tmp_path / "review" / "review_vicuna-13b_gpt35_human.txt"
    path.parent.mkdir()
    path.write_text("1 vicuna-13b\n2 GPT35\n3 tie\n")
    return tmp_path


def test_a_folder_of_questions_answers_and_verdicts(folder):
    subsets, about = load_benchmark("faireval", folder)
    assert about == {"ties": 1}
    assert subsets["FairEval"] == [
        {"input": f"q {k}", "output_1": f"vicuna-13b {k}", "output_2": f"gpt35 {k}",
         "source_1": "vicuna-13b", "source_2": "gpt35", "label": k} for k in (1, 2)]


@pytest.mark.parametrize("file, text, wanted", [
    ("review/review_vicuna-13b_gpt35_human.txt", "1\n", "has 1 verdicts, and question.jsonl 3"),
    ("review/review_vicuna-13b_gpt35_human.txt", "1\nx\n2\n", "line 2: the verdict is .*x"),
    ("answer/answer_gpt35.jsonl", '{"question_id": 1, "text": "a"}\n', "line 2: question 2 has no"),
    ("answer/answer_third.jsonl", "", "found 3 files of answers and 1 of people's verdicts")])
def test_a_folder_that_does_not_fit_is_refused(file, text, wanted, folder):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=wanted):
        load_benchmark("faireval", folder)


# ----- The command -----
@pytest.mark.parametrize("said, verdict", [
    ("model_a", 1), ("Response2", 2), (1, 1), ("2", 2), ("TIE", 0), ("tie (inconsistent)", 0)])
def test_verdicts_have_many_names(said, verdict):
    assert read_verdict(said, "here") == verdict


def test_rules_are_measured_on_another_benchmark(tmp_path, capsys):
    path = write(tmp_path / "votes.jsonl", [vote("model_a"), vote("tie", question=82)])
    assert meta_evaluate.main(["--benchmark", "mtbench", "--data", str(path), "--judge", "rule",
                               "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["labels"] == {"ties": 1}
    assert "People called 1 pairs a tie" in capsys.readouterr().out
