"""ilf.py: which refinement is kept, what is learnt, going on, and its prompt."""

import itertools

import pytest

import data
from eval import Completion
from methods import candidates, ilf
from methods.judged import judged_document, record_key


@pytest.fixture
def refine(make_run, judged, monkeypatch):
    """A function that collects refinements which are given texts in turn: refine(texts, *flags)."""
    def collect(texts, *more):
        said = itertools.cycle(texts)
        monkeypatch.setattr(ilf, "sample_prompts", lambda run, records, prompts: [
            Completion(next(said), [], True) for _ in records])
        run = make_run("ilf", "--records", str(judged), "--downsample", "0", "--judge", "rule",
                       "--refinements", str(len(texts)), *more)
        ilf.collect(run)
        return run, data.read_records(run.folder / "refined.jsonl")
    return collect


def test_the_best_of_several_refinements_is_kept(refine):
    _, rows = refine(["blue coat", "red hat", "hat"])
    assert [(row["refinement"], row["reward"]) for row in rows] == [("red hat", 2)] * 6


def test_of_equal_rewards_the_first_is_kept(refine):
    _, rows = refine(["hat green", "green coat", "coat"])
    assert {row["refinement"] for row in rows} == {"hat green"}


@pytest.mark.parametrize("texts", [["blue hat"], [" "], [" blue hat "]])
def test_the_response_itself_or_nothing_is_no_refinement(texts, refine, capsys):
    run, rows = refine(texts)
    assert len(rows) == 6 and all(row["refinement"] is None for row in rows)
    capsys.readouterr()
    items = ilf.items(run)
    assert len(items) == 6 and "ilf: 0 refinements." in capsys.readouterr().out


def test_refinements_and_good_responses_are_learnt_behind_the_plain_prompt(refine, judged):
    run, _ = refine(["red coat"])
    documents = [item["documents"] for item in ilf.items(run)]
    for record in data.read_records(judged):
        text = "red coat" if record["judgment"] else "red hat"
        assert [judged_document(run, record | {"response": text})] in documents
    assert len(documents) == 12


def test_a_file_may_bring_its_refinements(refine, judged):
    rows = data.read_records(judged)
    judged.unlink()
    data.append_records(judged, [row | {"refinement": "white hat"} for row in rows])
    run, refined = refine(["red coat"])
    texts = [run.tokenizer.decode(item["documents"][0]["input_ids"]) for item in ilf.items(run)]
    assert refined == [] and sum(text.endswith("white hat") for text in texts) == 6


def test_collecting_goes_on_behind_what_is_there(refine):
    run, rows = refine(["red hat"])
    path = run.folder / "refined.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    ilf.collect(run)
    assert path.read_bytes() == whole
    assert len({row["key"] for row in rows}) == 6


def test_rules_need_a_target(make_run, tmp_path):
    data.append_records(tmp_path / "x.jsonl", [
        {"instruction": "do", "input": "", "response": "y", "judgment": "wrong ."}])
    run = make_run("ilf", "--records", str(tmp_path / "x.jsonl"), "--judge", "rule")
    with pytest.raises(ValueError, match="without a target, which --judge rule needs"):
        ilf.collect(run)


def test_the_prompt_stays_on_one_line_and_keeps_its_sections():
    record = {"instruction": "do\nit", "input": "x", "judgment": "no\n### Answer: q",
              "response": "fine\n### Judgment: perfect ."}
    for text in ilf.refine_prompt(record):
        assert "\n" not in text
        assert text.count("### Judgment:") <= 1 and text.count("### Answer:") <= 1


def test_each_refinement_has_a_seed_of_its_own(make_run, judged, monkeypatch):
    seen, complete = [], candidates.complete

    def note(*arguments, seeds=None, **options):
        seen.extend(seeds)
        return complete(*arguments, seeds=seeds, **options)
    monkeypatch.setattr(candidates, "complete", note)
    run = make_run("ilf", "--records", str(judged), "--downsample", "0", "--refinements", "3")
    ilf.collect(run)
    assert len(seen) == len(set(seen)) == 6 * 3
    records = [x for x in data.read_records(judged) if x["judgment"]]
    assert len({record_key(record) for record in records}) == 6


def test_the_command_runs_and_a_step_is_the_mean_of_means(
        command, ready, judged, same_in_parts, written_out):
    folder = command("ilf", "--records", str(judged), "--refinements", "2", "--judge", "self")
    assert len(data.read_records(folder / "log.jsonl")) == 3
    run, total = ready("ilf", "--records", str(judged), "--downsample", "0"), 0.0
    items = ilf.items(run)
    for item in items:
        terms = written_out(run.model, item["documents"][0])
        total -= sum(terms) / len(terms)
    assert same_in_parts(run, items)["ce"] == pytest.approx(total / len(items), rel=1e-5)
