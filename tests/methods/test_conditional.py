"""conditional.py: which mark stands before which answer, quantiles, and how the model is asked."""

import dataclasses
import json

import pytest

import data
import methods
from eval import Completion
from methods import candidates as candidates_file
from methods import conditional


def rewrite(path, change):
    """Change every record of a file."""
    records = [record | change(record) for record in data.read_records(path)]
    path.unlink()
    data.append_records(path, records)
    return records


def texts_of(run):
    return [run.tokenizer.decode(x["documents"][0]["input_ids"]) for x in conditional.items(run)]


def test_good_and_bad_answers_have_their_marks(make_run, candidates, capsys):
    run = make_run("conditional", "--candidates", str(candidates))
    texts = texts_of(run)
    good = [text for text in texts if "Instruction: good answer : w1" in text]
    assert len(texts) == 40 and len(good) == 10  # one answer in four is right
    assert sum("Instruction: bad answer : w" in text for text in texts) == 30
    assert conditional.prefix(run) == "good answer : "
    assert "40 answers; the model will be asked with 'good answer : '" in capsys.readouterr().out


def test_quantiles_are_equal_parts_in_the_order_of_rewards(make_run, candidates):
    numbers = iter(range(100))
    records = rewrite(candidates, lambda x: {"reward": next(numbers) / 7, "how": "scored"})
    run = make_run("conditional", "--candidates", str(candidates), "--conditional", "quantiles",
                   "--quantiles", "3")
    texts = texts_of(run)
    for k, (record, text) in enumerate(zip(records, texts, strict=True)):
        quantile = min(k // 13, 2) + 1  # 13, 13 and 14 of 40
        assert f"Instruction: quality {quantile} of 3 : {record['wording']}" in text
    assert conditional.prefix(run) == "quality 3 of 3 : "


def test_the_best_quantile_alone_is_learnt_unmarked(make_run, candidates):
    run = make_run("conditional", "--candidates", str(candidates), "--conditional", "best")
    records = [x for x in data.read_records(candidates) if x["reward"] == 2]
    texts = texts_of(run)
    assert len(texts) == 10 and conditional.prefix(run) == ""
    assert all(any(f"Instruction: w1\n### Input: {x['input']}" in text for text in texts)
               for x in records)


def test_a_reward_is_written_with_two_digits(make_run, candidates):
    rewrite(candidates, lambda x: {"reward": x["reward"] / 3, "how": "scored"})
    run = make_run("conditional", "--candidates", str(candidates), "--conditional", "reward")
    texts = texts_of(run)
    assert {text.partition("reward ")[2][:4] for text in texts} == {"0.00", "0.33", "0.67"}
    assert conditional.prefix(run) == "reward 0.67 : "


def test_equal_rewards_make_quantiles_of_every_task(make_run, candidates):
    records = rewrite(candidates, lambda x: {"reward": 2})
    run = make_run("conditional", "--candidates", str(candidates), "--conditional", "best",
                   "--quantiles", "2")
    names = [item["name"].partition("/")[0] for item in conditional.items(run)]
    assert len(names) == len(records) // 2 and 5 <= names.count("colour") <= 15


def test_a_candidate_without_a_verdict_is_left_out(make_run, candidates):
    rewrite(candidates, lambda x: {"reward": None if x["wording"] == "w2" else x["reward"]})
    run = make_run("conditional", "--candidates", str(candidates))
    assert len(conditional.items(run)) == 30


def test_later_rounds_ask_with_the_best_mark(make_run, monkeypatch):
    asked, run = [], make_run("conditional", "--pool-per-task", "4")

    def sample(run, records, prompts):
        asked.append(prompts[0])
        return [Completion("x", [], True) for _ in records]
    monkeypatch.setattr(candidates_file, "sample_prompts", sample)
    for number in (0, 1):
        later = dataclasses.replace(run, round=number)
        candidates_file.answered(later, candidates_file.unanswered(later)[:2])
    assert ["good answer : " in prompt for prompt in asked] == [False, True]


def test_the_trained_model_is_asked_with_the_mark_and_no_other(command, candidates, monkeypatch):
    asked, answer = [], methods.answer_questions

    def note(*arguments, prefix="", **options):
        asked.append(prefix)
        return answer(*arguments, prefix=prefix, **options)
    monkeypatch.setattr(methods, "answer_questions", note)
    folder = command("conditional", "--candidates", str(candidates), "--compare",
                     "--pool-per-task", "5", "--probe-inputs", "1")
    titles = ["base", "SFT", "SFT(IA)", "SFT(IA)+conditional"]
    assert list(json.loads((folder / "metrics.json").read_text())) == titles
    # Agreement before and after training, then the four models of the table.
    assert asked == ["", "good answer : ", "", "", "", "good answer : "]


@pytest.mark.parametrize("kind", ["quantiles", "reward", "best"])
def test_the_command_runs(kind, command, candidates):
    folder = command("conditional", "--candidates", str(candidates), "--conditional", kind)
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+conditional"]


def test_micro_batches_change_nothing(ready, candidates, same_in_parts):
    run = ready("conditional", "--candidates", str(candidates))
    same_in_parts(run, conditional.items(run))
