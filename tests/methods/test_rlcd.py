"""rlcd.py: answers of two prompts, which pairs are kept, what they train, short runs."""

import json
import math
from types import SimpleNamespace

import pytest

import data
from methods import candidates, rlcd

PROMPTS = ("--positive", "good : ", "--negative", "bad : ")


@pytest.fixture
def asked(monkeypatch):
    """[(prompt, seed), ...] of all answers that are asked for, each of which is another text."""
    seen, texts = [], {}

    def complete(model, tokenizer, prompts, sampling, *, seeds, **options):
        for prompt, seed in zip(prompts, seeds, strict=True):
            seen.append((prompt, seed))
            texts.setdefault((prompt, seed), f"answer {len(texts)}")
        return [SimpleNamespace(text=texts[key], finished=True)
                for key in zip(prompts, seeds, strict=True)]
    monkeypatch.setattr(candidates, "complete", complete)
    return seen


def rows_of(run):
    return data.read_records(run.folder / "preferences.jsonl")


def test_each_answer_is_drawn_from_both_prompts_with_seeds_of_its_own(ready, asked):
    run = ready("rlcd", *PROMPTS, "--pool-per-task", "3", "--wordings", "2", "--samples", "2")
    rlcd.collect(run)
    wanted = candidates.unanswered(run)
    assert len(asked) == 2 * len(wanted) == 2 * len(rows_of(run))
    assert len({seed for _, seed in asked}) == len(asked)
    prompts = [run.template.render(words + x["wording"], x["input"])
               for x in wanted for words in ("good : ", "bad : ")]
    assert sorted(prompt for prompt, _ in asked) == sorted(prompts)


def test_the_answer_of_the_positive_prompt_is_the_better_one(ready, monkeypatch):
    monkeypatch.setattr(candidates, "complete", lambda model, tokenizer, prompts, *a, **k: [
        SimpleNamespace(text="yes" if "good : " in prompt else "no", finished=True)
        for prompt in prompts])
    run = ready("rlcd", *PROMPTS, "--pool-per-task", "3", "--wordings", "2")
    rlcd.collect(run)
    for row, record in zip(rows_of(run), candidates.unanswered(run), strict=True):
        assert row["first"] == {"wording": record["wording"], "response": "yes"}
        assert row["second"] == {"wording": record["wording"], "response": "no"}
        assert row["probability"] == 1 and row["id"] == record["id"]
    # What is trained has neither prompt.
    items = rlcd.items(run)
    assert len(items) == len(rows_of(run))
    for item in items:
        texts = [run.tokenizer.decode([int(x) for x in document["input_ids"]])
                 for document in item["documents"]]
        assert not any("good :" in text or "bad :" in text for text in texts)
        assert item["indices"] == {"better": [0], "worse": [1]}
        assert len(item["values"]["reference"]) == 2


@pytest.mark.parametrize("first, second, kept", [
    ("a", "b", True), ("a", "a", False), ("a", " a ", False), ("", "b", False), ("a", " ", False)])
def test_pairs_that_say_nothing_are_left_out_and_counted(first, second, kept, ready, monkeypatch,
                                                         capsys):
    monkeypatch.setattr(candidates, "complete", lambda model, tokenizer, prompts, *a, **k: [
        SimpleNamespace(text=first if "good : " in prompt else second, finished=True)
        for prompt in prompts])
    run = ready("rlcd", *PROMPTS, "--pool-per-task", "2", "--wordings", "1", "--samples", "1")
    n = len(candidates.unanswered(run))
    if not kept:
        with pytest.raises(ValueError, match=f"not one of {n} pairs has two answers that differ"):
            rlcd.collect(run)
        return
    rlcd.collect(run)
    assert len(rows_of(run)) == n
    assert f"in 0 of {n} pairs" in capsys.readouterr().out


def test_collecting_goes_on_behind_the_pairs_that_are_there(ready, monkeypatch, capsys):
    """Those that are left out are not sampled again either."""
    asked, real = [], candidates.complete

    def complete(model, tokenizer, prompts, *args, **options):
        asked.extend(prompts)
        found = real(model, tokenizer, prompts, *args, **options)
        return [SimpleNamespace(text=" " if x.text < "h" else x.text) for x in found]
    monkeypatch.setattr(candidates, "complete", complete)
    run = ready("rlcd", *PROMPTS, "--pool-per-task", "3", "--wordings", "2", "--temperature", "3")
    rlcd.collect(run)
    paths = [run.folder / name for name in ("contrasts.jsonl", "preferences.jsonl")]
    pairs, useful = whole = [path.read_bytes() for path in paths]
    assert 5 < len(useful.splitlines()) < len(pairs.splitlines()) == len(asked) / 2
    said = capsys.readouterr().out
    paths[0].write_bytes(b"".join(pairs.splitlines(keepends=True)[:5]))
    paths[1].unlink()
    asked.clear()
    rlcd.collect(run)
    assert [path.read_bytes() for path in paths] == whole and capsys.readouterr().out == said
    assert len(asked) == 2 * (len(pairs.splitlines()) - 5)
    asked.clear()
    rlcd.collect(run)
    assert not asked and capsys.readouterr().out == said


def test_micro_batches_change_nothing(ready, same_in_parts):
    run = ready("rlcd", *PROMPTS, "--pool-per-task", "3", "--wordings", "2", "--temperature", "3")
    rlcd.collect(run)
    means = same_in_parts(run, rlcd.items(run))
    assert means["loss"] == pytest.approx(math.log(2), abs=1e-4)  # h is 0 before the first step


def test_the_command_samples_and_trains_and_a_reward_model_reads_its_pairs(command):
    folder = command("rlcd", *PROMPTS, "--pool-per-task", "4", "--wordings", "3", "--temperature",
                     "2")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+RLCD"]
    log = data.read_records(folder / "log.jsonl")
    assert len(log) == 3 and {"loss", "margin", "accuracy"} <= set(log[0])
    pytest.importorskip("methods.reward")
    reward = command("reward", "--preferences", str(folder / "preferences.jsonl"), out="reward")
    assert (reward / "value_head.safetensors").exists()


def test_wrong_flags_are_refused(refused):
    refused("are both 'a'", "rlcd", "--positive", "a", "--negative", "a")
    refused("--label-smoothing changes nothing", "rlcd", "--label-smoothing", "0.1",
            "--preference", "ipo")
    refused("does not read --judge", "rlcd", "--judge", "rule")
    refused("does not read --candidates", "rlcd", "--candidates", "FILE")
