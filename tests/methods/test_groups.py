"""groups.py: candidates by question, the best of them, and those that are told apart."""

import json

import pytest

import data
from methods import groups


def test_best_answers_of_verdicts_and_of_numbers():
    group = [{"reward": reward, "how": "rule"} for reward in (2, 1, 0, None)]
    assert groups.best_answers(group) == ([group[0]], group[1:3])
    assert groups.best_answers(group[1:3])[0] == []  # of verdicts none below 2 is best
    group = [{"reward": reward, "how": "scored"} for reward in (0.3, -1.0, None)]
    assert groups.best_answers(group) == ([group[0]], [group[1]])
    group = [{"reward": reward, "how": "label"} for reward in (1.0, 0.0)]
    assert groups.best_answers(group) == (group[:1], group[1:])
    assert groups.best_answers(group[1:]) == ([], group[1:])  # a bad answer alone stays bad
    assert groups.best_answers([]) == groups.best_answers(group[2:]) == ([], [])


def test_groups_are_questions_in_the_order_of_the_file(make_run, scored_stage, candidates):
    found = groups.grouped_candidates(make_run(scored_stage, "--candidates", str(candidates)))
    assert [x for group in found for x in group] == data.read_records(candidates)
    assert len(found) == 10 and all(len({(x["task"], x["id"]) for x in g}) == 1 for g in found)


def test_dialogues_need_extras(make_run, scored_stage, candidates):
    records = data.read_records(candidates)
    candidates.unlink()
    dialogue = {"messages": [{"role": "user", "content": "q"}]}
    data.append_records(candidates, [records[0], records[1] | dialogue])
    with pytest.raises(ValueError) as caught:
        groups.grouped_candidates(make_run(scored_stage, "--candidates", str(candidates)))
    assert str(caught.value) == (f"{candidates}, line 2, is a dialogue (messages), which needs "
                                 "extras/formats. Leave out --plain.")


def test_a_question_that_stands_in_two_places_is_one_group(make_run, scored_stage, candidates):
    records = data.read_records(candidates)
    candidates.unlink()
    data.append_records(candidates, records[1:] + records[:1])
    found = groups.grouped_candidates(make_run(scored_stage, "--candidates", str(candidates)))
    assert len(found) == 10 and found[0] == [*records[1:4], records[0]]


def test_a_candidate_stands_under_the_wording_that_produced_it(make_run, scored_stage):
    run = make_run(scored_stage)
    row = {"instruction": "do", "wording": "please", "input": "x", "target": "y", "response": "z"}
    assert groups.candidate_document(run, row) == run.document("please", "x", "z")


def test_of_equal_records_the_last_stays_and_none_without_a_reward():
    records = []
    for reward, wording, response in ((0, "a", "x"), (1, "a", "y"), (2, "a", "x"), (None, "b", "r"),
                                      (None, "a", "x")):
        records.append({"reward": reward, "wording": wording, "response": response})
    assert groups.distinct(records, "wording", "response") == [records[2], records[1]]
    assert groups.distinct(records, "wording") == [records[2]]
    assert groups.distinct(records[3:], "response") == []


def test_random_numbers_of_a_question_do_not_depend_on_the_others(make_run, scored_stage):
    run, group = make_run(scored_stage), [{"task": "t", "id": "1"}]
    draws = [groups.group_rng(run, x).random()
             for x in (group, group + group, [{"task": "t", "id": "2"}])]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("change, said", [
    ({"reward": ...}, 'line 2, has no field "reward". Expected an object with task, id'),
    ({"input": 3}, 'line 2: "input" is no text. Fix that line.'),
    (None, 'line 2, has no field "task"'),
    ({"wording": None}, 'line 2: "wording" is no text')])
def test_without_extras_a_record_that_lacks_something_is_named(change, said, make_run, scored_stage,
                                                               candidates):
    records = data.read_records(candidates)
    if change is None:
        records[1] = []
    else:
        changed = records[1] | change
        records[1] = {name: value for name, value in changed.items() if value is not ...}
    candidates.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=said):
        groups.grouped_candidates(make_run(scored_stage, "--candidates", str(candidates)))
