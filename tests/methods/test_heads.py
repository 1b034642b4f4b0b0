"""heads.py: a head that rewards answers, and judges that are numbers."""

import pytest
import torch
from safetensors.torch import save_file

import data
import lora
from methods import collate, heads


def test_a_fresh_head_rewards_nothing_and_a_saved_one_comes_back(ready, scored_stage, candidates):
    run = ready(scored_stage, "--candidates", str(candidates))
    heads.attach(run)
    records = data.read_records(candidates)[:7]
    assert heads.reward_scores(run, run.model, records) == [0.0] * 7
    torch.nn.init.normal_(run.model.value_head.weight)
    run.model.value_head.bias.data += 0.5
    wanted = heads.reward_scores(run, run.model, records)
    lora.save_adapter(run.model, run.folder)
    heads.detach(run, run.folder)
    assert not hasattr(run.model, "value_head")
    opened = heads.open_reward_model(run, run.folder)
    assert heads.reward_scores(run, opened, records) == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == 7
    run.cfg.micro_tokens = 1
    assert heads.reward_scores(run, opened, records) == pytest.approx(wanted, abs=1e-5)


def test_rewards_see_no_dropout(ready, scored_stage, candidates):
    run = ready(scored_stage, "--dropout", "0.5")
    heads.attach(run)
    torch.nn.init.normal_(run.model.value_head.weight)
    records, found = data.read_records(candidates)[:3], []
    for _ in range(2):
        run.model.train()
        found.append(heads.reward_scores(run, run.model, records))
    assert found[0] == found[1] and len(set(found[0])) == 3


def test_the_reward_is_read_off_the_last_token(ready, scored_stage):
    run = ready(scored_stage)
    heads.attach(run)
    torch.nn.init.normal_(run.model.value_head.weight)
    documents = [run.document("w", "x", text) for text in ("red", "a blue hat")]
    batch = collate([{"documents": documents}], run.model, "cpu")
    for document, reward in zip(documents, heads.document_rewards(run.model, batch), strict=True):
        alone = collate([{"documents": [document]}], run.model, "cpu")
        hidden = run.model.hidden(alone["input_ids"], alone["attend"])[-1]
        torch.testing.assert_close(reward, run.model.value_head(hidden)[0], atol=1e-5, rtol=0)


def test_a_folder_without_a_fitting_head_is_refused(ready, scored_stage, tmp_path):
    run = ready(scored_stage)
    with pytest.raises(ValueError, match="has no value_head.safetensors. Give the run folder"):
        heads.open_reward_model(run, tmp_path)
    lora.save_adapter(run.model, tmp_path / "x")
    save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "x" / heads.HEAD)
    with pytest.raises(ValueError, match="does not hold a head of width 32"):
        heads.open_reward_model(run, tmp_path / "x")


@pytest.mark.parametrize("how", ["a pickle", "half of it", "empty"])
def test_a_damaged_head_is_refused_by_name_and_code_in_it_is_not_run(
        how, ready, scored_stage, tmp_path):
    run, file, marker = ready(scored_stage), tmp_path / heads.HEAD, tmp_path / "marker"
    lora.save_adapter(run.model, tmp_path)
    save_file({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, file)
    code = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()  # what a pickle is made of
    blob = {"a pickle": code, "half of it": file.read_bytes()[:70], "empty": b""}[how]
    file.write_bytes(blob)
    with pytest.raises(ValueError, match="value_head.safetensors"):
        heads.open_reward_model(run, tmp_path)
    assert not marker.exists()


def test_equal_items_are_scored_once():
    asked = []

    def score(items):
        asked.extend(x["response"] for x in items)
        return [len(x["response"]) for x in items]
    items = [{"wording": "w", "input": "x", "response": text} for text in ("aa", "b", "aa", "ccc")]
    verdicts = heads.ScoreJudge(score).judge(items)
    assert [(v.reward, v.how, v.type) for v in verdicts] == [
        (2, "scored", None), (1, "scored", None), (2, "scored", None), (3, "scored", None)]
    assert sorted(asked) == ["aa", "b", "ccc"]


def test_length_as_a_reward():
    items = [{"target": "a b c d", "response": text} for text in ("a b c d", "a b", "", "x " * 8)]
    assert heads.length_scores(items) == [1.0, 0.5, 0.0, 0.0]
    assert heads.length_scores([{"target": "", "response": "a"}]) == [1.0]
