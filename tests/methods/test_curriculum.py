"""curriculum.py: which answers become pairs, in which order they are learnt, short runs."""

import json
import math

import pytest

import data
from methods import curriculum


@pytest.fixture
def files(world, tmp_path):
    """Answers of three models to the same inputs under two wordings; the weakest says "hat"."""
    task, paths = data.read_tasks(world / "tasks")[0], []
    for name in ("hat", "red", "red hat"):
        rows = [{"task": task.name, "input": x.input, "wording": f"w{k}", "response": name}
                for x in data.split_instances(task, "pool")[:4] for k in range(2)]
        paths.append(tmp_path / f"{name}.jsonl")
        data.append_records(paths[-1], rows)
    return paths


def flags(files, *more):
    return ["--responses", *map(str, files), *more]


def said(run, item):
    """What the two documents of an item answer."""
    texts = []
    for document in item["documents"]:
        labels = [x for x in document["labels"] if x != data.IGNORE_INDEX]
        texts.append(run.tokenizer.decode(labels))
    return tuple(texts)


def test_pairs_are_of_any_two_models_the_stronger_first(make_run, files):
    run = make_run("curriculum", *flags(files))
    pairs = curriculum.make_pairs(run)
    kinds = [(said(run, pair), pair["easy"]) for pair in pairs]
    assert sorted(kinds) == sorted(8 * [(("red", "hat"), False), (("red hat", "hat"), True),
                                        (("red hat", "red"), False)])
    first = data.read_records(files[0])[0]
    wanted = [run.document(first["wording"], first["input"], text) for text in ("red", "hat")]
    assert pairs[0]["documents"] == wanted
    assert pairs[0]["indices"] == {"better": [0], "worse": [1]}


@pytest.mark.parametrize("change", [
    {"response": "hat"}, {"response": " hat "}, {"response": " "}, {"wording": "other"},
    {"input": "other"}, {"task": "other"}])
def test_equal_and_empty_answers_and_other_prompts_make_no_pair(change, make_run, files):
    rows = data.read_records(files[2])
    files[2].unlink()
    data.append_records(files[2], [row | change for row in rows])
    run = make_run("curriculum", *flags(files))
    assert {said(run, pair) for pair in curriculum.make_pairs(run)} <= {("red", "hat"),
                                                                       ("hat", "red")}


def test_samples_are_paired_by_their_number(make_run, files):
    """Without one, by their order."""
    for path, texts in zip(files, (("a", "b"), ("red", "hat"), ("hat", "red")), strict=True):
        row = data.read_records(path)[0]
        path.unlink()
        data.append_records(path, [row | {"response": text} for text in texts])
    row = data.read_records(files[1])[0]
    files[1].unlink()
    data.append_records(files[1], [row | {"response": "hat", "sample": 1},
                                   row | {"response": "red", "sample": 0}])
    run = make_run("curriculum", *flags(files))
    pairs = [said(run, pair) for pair in curriculum.make_pairs(run)]
    assert ("hat", "red") in pairs and ("red", "hat") in pairs
    assert ("hat", "hat") not in pairs and ("red", "red") not in pairs


@pytest.mark.parametrize("order, shares", [
    ("easy", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), ("hard", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0])])
def test_the_share_of_hard_pairs_goes_in_equal_steps(order, shares, ready, files):
    run = ready("curriculum", *flags(files, "--curriculum", order, "--steps", "30",
                                     "--batch-size", "12"))
    run.method.begin(run)
    seen = []
    assert run.method.phase(run.cfg) == 3
    for share in shares:
        found = run.method.items(run)
        assert len(found) == 36
        hard = sum(said(run, item) != ("red hat", "hat") for item in found)
        assert hard == round(36 * share / 9)
        seen.append([item["documents"][0]["input_ids"] for item in found])
    assert seen[0] != seen[1] and all(len(item["values"]["reference"]) == 2 for item in found)


def test_mixed_draws_from_all_pairs(ready, files):
    run = ready("curriculum", *flags(files[:2], "--curriculum", "mixed", "--steps", "10"))
    run.method.begin(run)
    assert {said(run, item) for item in run.method.items(run)} == {("red", "hat")}


def test_the_reference_is_the_start_in_every_phase(ready, files, gradients):
    """The loss of the same pair is ln 2 before the first step, and another after a step."""
    run = ready("curriculum", *flags(files, "--steps", "10", "--batch-size", "4"))
    run.method.begin(run)
    pairs = run.memory["easy"] + run.memory["hard"]
    before = [pair["values"]["reference"] for pair in pairs]
    run.method.items(run)
    for p in run.model.parameters():
        p.data += 0.1
    for item in run.method.items(run):
        assert item["values"]["reference"] in before


def test_micro_batches_change_nothing(ready, files, same_in_parts):
    run = ready("curriculum", *flags(files, "--steps", "10", "--batch-size", "6"))
    run.method.begin(run)
    means = same_in_parts(run, run.method.items(run))
    assert means["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_run_folders_answer(command, earlier, files):
    strong = command("sft", "--steps", "20", "--lr", "0.01", "--judge-share", "0", out="strong")
    folder = command("curriculum", "--responses", str(earlier["sft"]), str(files[1]),
                     str(strong), "--pool-per-task", "4", "--wordings", "3",
                     "--pool-wordings", "3", "--temperature", "2", "--curriculum", "mixed")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["SFT(IA)+curriculum"]
    assert len(data.read_records(folder / "log.jsonl")) == 3
    answers = [data.read_records(folder / f"responses-{k}.jsonl") for k in (0, 2)]
    assert len(answers[0]) == len(answers[1]) == 2 * 4 * 3
    assert [x["response"] for x in answers[0]] != [x["response"] for x in answers[1]]
    assert not (folder / "responses-1.jsonl").exists()


def test_answers_are_not_sampled_twice(make_run, ready, earlier, files):
    run = ready("curriculum", "--responses", str(earlier["sft"]), *map(str, files[:2]),
                "--pool-per-task", "3", "--wordings", "2")
    curriculum.collect(run)
    path = run.folder / "responses-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    curriculum.collect(run)
    assert path.read_bytes() == whole and len(whole.splitlines()) == 2 * 3 * 3


def test_wrong_flags_are_refused(refused, files, world, tmp_path):
    one, two, three = map(str, files)
    refused("names 0 models, and --curriculum easy needs 3", "curriculum")
    refused("names 2 models, and --curriculum easy needs 3", "curriculum", "--responses", one, two)
    refused("names 1 models, and --curriculum mixed needs 2", "curriculum", "--responses", one,
            "--curriculum", "mixed")
    refused("is no run folder with a finished stage", "curriculum", "--responses", one, two,
            str(world / "tasks"))
    refused("does not exist", "curriculum", "--responses", one, two, str(tmp_path / "none"))


def test_files_are_read_before_anything_is_trained(make_run, files):
    files[1].write_text('{"task": "t", "input": "i", "wording": "w"}\n')
    run = make_run("curriculum", *flags(files))
    with pytest.raises(ValueError, match='red.jsonl, line 1, has no field "response"'):
        run.method.inspect(run)


def test_models_that_say_the_same_are_refused(ready, files):
    run = ready("curriculum", *flags([files[0], files[0], files[1]]))
    run.method.begin(run)  # one easy kind, and hard pairs of the last two
    for order in ("easy", "hard", "mixed"):
        same = ready("curriculum", *flags([files[0]] * 3, "--curriculum", order))
        with pytest.raises(ValueError, match=f"--curriculum {order} finds too few pairs"):
            same.method.begin(same)
