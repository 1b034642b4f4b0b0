"""constitutional.py: what is collected and learnt; who writes the revisions is in extras/judges."""

import json
from types import SimpleNamespace

import pytest

import data
from methods import constitutional


@pytest.fixture
def run(make_run, monkeypatch):
    """A function that makes a run with a stand-in for extras/judges that revises every answer."""
    def make(revision="red", failure="", principles="", *more):
        def revise(run, records, principles):
            made.principles.append(principles)
            turn = {"critique": "too long", "revision": revision, "failure": failure}
            return [record | {"revision": revision, "history": [turn]} for record in records]
        made = SimpleNamespace(principles=[], revise=revise)
        monkeypatch.setattr(constitutional, "extra", lambda *_: made)
        run = make_run("constitutional", "--pool-per-task", "3", "--wordings", "3",
                       "--principles", principles, *more)
        run.memory["asked"] = made.principles
        return run
    return make


def test_it_needs_extras(refused):
    refused("stage constitutional needs extras/judges. Leave out --plain.", "constitutional")


def test_every_sampled_answer_is_revised_by_the_given_principles(run, tmp_path):
    (tmp_path / "principles.txt").write_text("say one word .\n\n be kind . \n")
    made = run("red", "", str(tmp_path / "principles.txt"))
    constitutional.collect(made)
    rows = data.read_records(made.folder / "revisions.jsonl")
    assert len(rows) == 2 * 3 * 4 and {row["revision"] for row in rows} == {"red"}
    assert made.memory["asked"] == [["say one word .", "be kind ."]]
    assert all(row["response"] is not None and row["wording"] for row in rows)


def test_the_last_revision_is_learnt_under_the_wording_of_the_answer(run, capsys):
    made = run("red")
    constitutional.collect(made)
    items = constitutional.items(made)
    rows = data.read_records(made.folder / "revisions.jsonl")
    assert [item["documents"] for item in items] == [
        [made.document(row["wording"], row["input"], "red")] for row in rows]
    assert f"{len(rows)} of {len(rows)} answers were revised." in capsys.readouterr().out


@pytest.mark.parametrize("revision", [None, "", "  "])
def test_an_answer_that_was_not_revised_is_left_out_and_its_failure_said(revision, run, capsys):
    made = run(revision, "empty message")
    constitutional.collect(made)
    assert constitutional.items(made) == []
    assert "0 of 24 answers were revised; failures: 24 empty message" in capsys.readouterr().out


def test_collecting_goes_on_behind_what_is_there(run):
    made = run()
    constitutional.collect(made)
    path = made.folder / "revisions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    constitutional.collect(made)
    assert path.read_bytes() == whole


def test_a_step_is_the_mean_over_tokens(run, ready, same_in_parts, written_out):
    run()
    made = ready("constitutional", "--pool-per-task", "3")
    constitutional.collect(made)
    items = constitutional.items(made)
    terms = [x for item in items for x in written_out(made.model, item["documents"][0])]
    means = same_in_parts(made, items)
    assert means["ce"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_a_file_without_principles_is_refused(run, tmp_path, refused):
    run()  # extras/judges is there
    (tmp_path / "empty.txt").write_text(" \n\n")
    refused("holds no principle", "constitutional", "--principles", str(tmp_path / "empty.txt"))


def test_the_command_runs(run, command):
    run()
    folder = command("constitutional", "--pool-per-task", "3", "--wordings", "3")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+constitutional"]
