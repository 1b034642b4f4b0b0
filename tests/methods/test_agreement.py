"""agreement.py: the largest cluster of a question's answers is right, and what is said of it."""

import random
from collections import Counter
from dataclasses import replace

import pytest

import data
import judge as judging
from eval import Completion
from methods import agreement, candidates, rewards


class Table:
    """A judge of pairs that looks them up; what it does not know it cannot read."""

    name = "table"

    def __init__(self, agree, unread=()):
        self.agree, self.unread, self.asked = agree, unread, []

    def similar_pairs(self, pairs):
        self.asked += [(question["input"], a, b) for question, a, b in pairs]
        return [None if {a, b} in self.unread else {a, b} in self.agree for _, a, b in pairs]


def items(*texts, input="x", **more):
    """Answers to one question."""
    return [{"task": "t", "id": input, "instruction": "do", "input": input, "response": text,
             **more} for text in texts]


def rewarded(answers, share=0.34, similar=None):
    """Their rewards."""
    judge = agreement.AgreementJudge(similar or judging.RuleJudge(), share)
    return [verdict.reward for verdict in judge.judge(answers)]


def test_the_largest_cluster_is_rewarded_and_the_others_are_not():
    assert rewarded(items("red", "Red .", "blue", "red", "green")) == [2, 2, 0, 2, 0]
    verdicts = agreement.AgreementJudge(judging.RuleJudge(), 0.5).judge(items("a", "a", "b"))
    assert [(v.type, v.correct, v.how) for v in verdicts] == [
        (None, True, "majority"), (None, True, "majority"), (None, False, "majority")]


@pytest.mark.parametrize("texts", [
    ("a", "a", "b", "b"),  # tied
    ("a", "b", "c"),  # nobody agrees
    ("a",), ("", "", ""),
    ("a", "a", "b", "c", "d", "e")])  # 2 of 6 are less than 0.34
def test_without_a_majority_there_is_no_reward(texts):
    assert rewarded(items(*texts)) == [None] * len(texts)


def test_the_share_is_of_all_answers_and_its_limit_belongs_to_it():
    texts = ("a", "a", "a", "b", "c", "d")
    assert rewarded(items(*texts), 0.5) == [2, 2, 2, 0, 0, 0]
    assert rewarded(items(*texts), 0.51) == [None] * 6
    assert rewarded(items("a", "a", "", "", ""), 0.5) == [None] * 5  # empty ones count, too


def test_empty_and_cut_answers_are_in_no_cluster():
    assert rewarded(items("", "", "", "a", "a"), 0.4) == [0, 0, 0, 2, 2]
    cut = items("so so so", "so so so", "so so so", finished=False)
    assert rewarded(cut + items("a", "a"), 0.4) == [0, 0, 0, 2, 2]


def test_questions_are_told_apart_by_task_and_id_in_any_order():
    answers = items("a", "a", "b") + items("b", "b", "a", input="y")
    answers += [x | {"task": "other"} for x in items("c", "d")]
    order = list(range(len(answers)))
    random.Random(3).shuffle(order)
    found = rewarded([answers[k] for k in order])
    assert [found[order.index(k)] for k in range(8)] == [2, 2, 0, 2, 2, 0, None, None]


def test_pairs_are_compared_as_for_cr():
    both = [{"a", "b"}, {"b", "c"}, {"a", "c"}]
    table = Table(both)
    assert rewarded(items("a", "b", "c", "d", "e"), 0.5, table) == [2, 2, 2, 0, 0]
    assert set(table.asked) == {("x", p, q) for p in "abcde" for q in "abcde" if p != q}
    assert rewarded(items("a", "b", "c", "d", "e"), 0.5, Table(both[:2])) == [None] * 5  # no clique
    # A pair that cannot be read does not agree; another can.
    table = Table([{"a", "b"}], [{"a", "c"}])
    assert rewarded(items("a", "b", "c"), 0.5, table) == [2, 2, 0]


def test_random_groups_against_counting():
    rng = random.Random(8)
    for _ in range(200):
        texts = [rng.choice("abcdefg") for _ in range(rng.randint(1, 14))]
        share = rng.choice((0.1, 0.34, 0.5, 0.8))
        counts = Counter(texts).most_common()
        top = counts[0][1]
        wins = (top >= 2 and top >= share * len(texts) and [n for _, n in counts].count(top) == 1)
        wanted = [None] * len(texts)
        if wins:
            wanted = [2 * (text == counts[0][0]) for text in texts]
        assert rewarded(items(*texts), share) == wanted


# ----- In a run -----
@pytest.fixture
def run(make_run, scored_stage, monkeypatch):
    """A run that is rewarded by agreement; its model says one of three words, by the seed."""
    def complete(model, tokenizer, prompts, sampling, *, seeds, **options):
        return [Completion(("red", "blue", "green")[seed % 3], [5], True) for seed in seeds]
    monkeypatch.setattr(candidates, "complete", complete)
    return make_run(scored_stage, "--judge", "agreement", "--pool-per-task", "4", "--wordings", "3",
                    "--agreement-share", "0.2", "--eval-batch", "3")


def test_all_answers_to_a_question_are_rewarded_together_whatever_the_chunks(run):
    candidates.collect(run)
    records = data.read_records(run.folder / "candidates.jsonl")
    whole = rewards.make_judge(run).judge(rewards.with_labels(run, records))
    assert [x["reward"] for x in records] == [verdict.reward for verdict in whole]
    assert {x["how"] for x in records} == {"majority"} and len(records) == 2 * 4 * 4 * 2
    assert {x["reward"] for x in records} == {0, 2, None}


def test_a_question_that_was_cut_off_gets_the_rewards_of_the_whole(run):
    candidates.collect(run)
    path = run.folder / "candidates.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (3, 13, 47):
        path.write_bytes(b"".join(lines[:kept]))
        candidates.collect(run)
        assert path.read_bytes() == whole


def test_rewards_need_no_target(run):
    records = candidates.unanswered(run)
    for k, x in enumerate(records):
        x |= {"response": "ab"[k % 3 == 0], "target": None}
    assert {v.reward for v in rewards.make_judge(run).judge(records)} == {0, 2}


def scored(task, number, best, others=1, reward=2):
    """A question whose majority says `best`."""
    common = {"task": task, "id": str(number), "instruction": task, "input": str(number)}
    return [common | {"response": best, "reward": reward}] * 3 + [
        common | {"response": "other", "reward": reward and 0}] * others


def test_what_is_said_of_majorities(run, capsys):
    records = sum((scored("one", k, "yes" if k else "no") for k in range(6)), [])
    records += sum((scored("two", k, str(k), others=3) for k in range(6)), [])
    records += scored("two", 6, "x", reward=None) + scored("few", 0, "y")
    agreement.tell(run, records)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("agreement: 13 of 14 questions have a majority, which has 63 % of their "
                       "answers in the mean.")
    assert len(said) == 2 and said[1].startswith(
        "warning: 5 of 6 majorities of task one say 'yes'. A model that always says the same")


@pytest.mark.parametrize("flags, said", [
    (("--judge", "agreement", "--agreement-share", "1.5"), "--agreement-share is 1.5. Expected a"),
    (("--judge", "agreement", "--samples", "1", "--pool-wordings", "1"),
     "--judge agreement needs two answers to a question. Raise --samples or --pool-wordings."),
    (("--judge", "rule", "--agreement-share", "0.5"),
     "--agreement-by and --agreement-share are for --judge agreement, not rule. Add that, or leav"),
    (("--judge", "agreement", "--agreement-by", "self"), "--agreement-by self needs extras/judges"),
    (("--pairs", "all"), "--pairs all compares lower answers, too, and --condition worse only t")])
def test_flags_that_do_not_fit_are_refused(flags, said, refused, scored_stage):
    refused(said, scored_stage, *flags)


def test_equal_inputs_with_different_ids_are_different_questions(run):
    """Whatever else is in a part of the records: a task file may repeat an input."""
    task = run.tasks[0]
    twins = [replace(x, id=f"twin-{x.id}") for x in task.instances]
    run.tasks[0].instances = [x for pair in zip(task.instances, twins, strict=True) for x in pair]
    run.cfg.eval_batch = 1
    candidates.collect(run)
    found = data.read_records(run.folder / "candidates.jsonl")
    whole = rewards.make_judge(run).judge(rewards.with_labels(run, found))
    assert [x["reward"] for x in found] == [verdict.reward for verdict in whole]
    assert {x["reward"] for x in found} == {0, 2, None}


def test_a_model_compares_answers(make_run, scored_stage, monkeypatch):
    """--agreement-by self, through the chat of extras/judges."""
    judges = pytest.importorskip("extras.judges.run")
    run = make_run(scored_stage, "--judge", "agreement", "--agreement-share", "0.1")
    run.cfg.agreement_by, run.cfg.plain = "self", False
    seen = []

    def similar_pairs(self, pairs):
        seen.extend(pairs)
        return [True] * len(pairs)
    monkeypatch.setattr(judges.HttpJudge, "similar_pairs", similar_pairs)
    assert rewards.make_judge(run).judge(items("a", "b", "c"))[2].reward == 2 and len(seen) == 6


def test_ppo_answers_whole_questions(ready):
    pytest.importorskip("methods.ppo")
    from methods import rollouts

    for judge, size in (("agreement", 8), ("rule", 1)):
        run = ready("ppo", "--judge", judge, "--no-fit-reward", "--rollouts", "24",
                    "--batch-size", "8", "--wordings", "3", "--probe-inputs", "0")
        run.method.begin(run)
        drawn = Counter(agreement.question_key(x) for x in rollouts.drawn_records(run))
        assert drawn.total() == 24 and (set(drawn.values()) == {size} or judge == "rule")
