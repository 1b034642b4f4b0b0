"""expert.py: one best answer of each question, learnt like a reference output."""

import json

import pytest

import data
from methods import expert


def test_one_best_answer_of_each_question_is_learnt(make_run, candidates):
    run = make_run("expert", "--candidates", str(candidates))
    items = expert.items(run)
    records = {(x["task"], x["id"]): x for x in data.read_records(candidates) if x["reward"] == 2}
    assert {tuple(item["name"].split("/")) for item in items} == set(records)
    for item in items:
        best = records[tuple(item["name"].split("/"))]
        wanted = run.document(best["wording"], best["input"], best["response"])
        assert item["documents"] == [wanted]


def test_which_of_several_best_answers_follows_the_seed(make_run, candidates):
    records = data.read_records(candidates)
    for record in records:
        record["reward"] = 2
    candidates.unlink()
    data.append_records(candidates, records)
    chosen = [[item["documents"] for item in expert.items(
        make_run("expert", "--candidates", str(candidates), "--seed", seed))]
        for seed in ("1", "1", "2")]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_step_is_the_mean_over_tokens(ready, candidates, written_out, same_in_parts):
    run = ready("expert", "--candidates", str(candidates))
    items = expert.items(run)
    terms = [x for item in items for x in written_out(run.model, item["documents"][0])]
    means = same_in_parts(run, items)
    assert means["ce"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_the_command_samples_has_its_answers_judged_and_trains(command):
    folder = command("expert", "--judge", "length", "--pool-per-task", "3", "--wordings", "3")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+expert"]
    records = data.read_records(folder / "candidates.jsonl")
    assert len(records) == 2 * 3 * 4 * 2 and {x["how"] for x in records} == {"scored"}
    assert len(data.read_records(folder / "log.jsonl")) == 3


# ----- Answers that people chose -----

@pytest.fixture
def choose(candidates, tmp_path):
    """A function that writes lines of choices; returns the flags that name both files."""
    def write(*lines):
        path = tmp_path / "choices.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return "--candidates", str(candidates), "--choices", str(path)
    return write


@pytest.fixture
def repeated(candidates):
    """The candidates of the first question, which got "red" under each of its wordings."""
    records = data.read_records(candidates)
    own = [x for x in records if x["id"] == records[0]["id"] and x["task"] == records[0]["task"]]
    for record in own:
        record["response"] = "red"
    candidates.unlink()
    data.append_records(candidates, records)
    return own


def documents(run, *answers):
    """One document for each (wording, record, response)."""
    return [[run.document(wording, x["input"], text)] for wording, x, text in answers]


def test_all_chosen_answers_are_learnt_whatever_their_reward(make_run, candidates, choose, capsys):
    first, *_ = records = data.read_records(candidates)
    worst = next(x for x in records if x["id"] == first["id"] and x["reward"] == 1)
    other = next(x for x in records if x["id"] != first["id"])
    lines = [{name: x[name] for name in ("task", "id", "response")} for x in (worst, other)]
    mine = {"task": first["task"], "id": first["id"], "response": "written by hand"}
    theirs = mine | {"wording": "say it :"}
    run = make_run("expert", *choose(*lines, mine, theirs))
    found = [item["documents"] for item in expert.items(run)]
    assert found == documents(
        run, (worst["wording"], worst, worst["response"]),
        (other["wording"], other, other["response"]),
        (first["instruction"], first, "written by hand"), ("say it :", first, "written by hand"))
    assert "expert: 4 answers that people chose or wrote." in capsys.readouterr().out


def test_a_choice_stands_under_its_own_wording_and_counts_once(make_run, choose, repeated):
    a, b, c, *_ = repeated
    assert len({x["wording"] for x in repeated}) == 3
    bare = {name: a[name] for name in ("task", "id", "response")}
    run = make_run("expert", *choose(c, b, bare, a, b))
    assert [item["documents"] for item in expert.items(run)] == documents(
        run, *((x["wording"], x, "red") for x in (c, b, a)))


@pytest.mark.parametrize("change, wanted", [
    ({"id": "none"}, "line 2, chooses an answer to .*/none, which is no question of --candidates"),
    ({"id": ["1"]}, "line 2, chooses an answer to .*, which is no question"),
    ({"task": "none"}, "line 2, chooses an answer to none/"),
    ({"response": 3}, "line 2: response and wording are texts"),
    ({"wording": 3}, "line 2: response and wording are texts"),
    ({"response": " "}, "line 2, has no response"), ({"response": None}, "line 2, has no response"),
    ({"response": "red " * 600}, "line 2: .*--max-len")])
def test_a_choice_that_cannot_be_learnt_is_named_before_anything_is_trained(
        change, wanted, make_run, candidates, choose):
    record = data.read_records(candidates)[0]
    run = make_run("expert", *choose(record, record | change))
    with pytest.raises(ValueError, match=wanted):
        run.method.inspect(run)


def test_ids_may_be_numbers(make_run, candidates, choose):
    records = [x | {"id": 7} for x in data.read_records(candidates)[:4]]
    candidates.unlink()
    data.append_records(candidates, records)
    assert len(expert.items(make_run("expert", *choose(records[0])))) == 1


def test_a_file_without_choices_is_refused(make_run, choose):
    run = make_run("expert", *choose())
    with pytest.raises(ValueError, match="has no choice"):
        run.method.inspect(run)


def test_choices_need_what_they_choose_from(refused, choose):
    *_, name, path = choose()
    refused("--choices says which answers of --candidates are good", "expert", name, path)


def test_the_command_trains_on_choices(command, candidates, choose):
    records = [x for x in data.read_records(candidates) if x["response"].strip()]
    folder = command("expert", *choose(*records))
    assert len(data.read_records(folder / "log.jsonl")) == 3
