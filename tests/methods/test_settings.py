"""settings.py and defaults.py: where settings come from, and which run a folder holds."""

import dataclasses
import json

import pytest

import data
import train
from eval import DEMO
from methods import defaults, finding, settings
from methods.common import CommonFlags
from methods.settings import is_finished, parse_config, save_settings, saved_settings, stage_config


def demo():
    """What the demo says."""
    return data.read_json(DEMO / "settings.json")


def parsed(*argv):
    return parse_config([*argv, "--plain"])[0]


# ----- Where settings come from -----

def test_the_demos_settings_apply_to_the_demos_model_and_tasks(scored_stage, world):
    cfg, said = parsed("--stage", scored_stage), demo()
    for name, value in (said["tasks"] | said["model"]["candidates"]).items():
        if hasattr(cfg, name):
            assert getattr(cfg, name) == value, name
    assert cfg.model == defaults.MODEL and cfg.tasks == str(DEMO / "tasks")
    assert cfg.paraphrases == str(DEMO / "paraphrases.json")
    cfg = parsed("--stage", scored_stage, "--model", str(world / "model"), "--tasks",
                 str(world / "tasks"))
    assert (cfg.lr, cfg.sft_lr, cfg.per_task, cfg.paraphrases) == (1e-4, 2e-4, 100, "")
    cfg = parsed("--stage", scored_stage, "--lr", "0.5", "--per-task", "7")
    sft_lr = said["model"]["candidates"]["sft_lr"]
    assert (cfg.lr, cfg.per_task, cfg.sft_lr) == (0.5, 7, sft_lr)


def test_rates_belong_to_the_demos_model_and_sizes_to_its_tasks(scored_stage, world):
    own_model = parsed("--stage", scored_stage, "--model", str(world / "model"))
    assert own_model.lr == 1e-4 and own_model.per_task == demo()["tasks"]["per_task"]
    own_tasks = parsed("--stage", scored_stage, "--tasks", str(world / "tasks"))
    assert own_tasks.lr == demo()["model"]["candidates"]["lr"] and own_tasks.per_task == 100


def test_judged_stages_have_the_demos_records(judged_stage, world, judged):
    cfg = parsed("--stage", judged_stage)
    assert (cfg.tasks, cfg.paraphrases) == (str(DEMO / "records"), "")
    assert cfg.per_task == demo()["records"]["per_task"]
    assert cfg.lr == demo()["model"]["judged"]["lr"]
    alone = parsed("--stage", judged_stage, "--model", str(world / "model"), "--records",
                   str(judged))
    assert alone.tasks == ""  # with a model of one's own, records may be all that there is


def test_settings_of_a_continued_run_come_before_the_demos(scored_stage, tmp_path):
    saved = {"stage": "sft-ia", "model": defaults.MODEL, "steps": 9, "lr": 0.25, "per_task": 7,
             "tasks": str(DEMO / "tasks"), "max_new_tokens": 5}
    (tmp_path / "ia").mkdir()
    (tmp_path / "ia/config.json").write_text(json.dumps(saved))
    (tmp_path / "ia/adapter_config.json").touch()
    argv = ["--stage", scored_stage, "--init", str(tmp_path / "ia")]
    cfg = parsed(*argv)
    assert (cfg.per_task, cfg.max_new_tokens, cfg.sft_steps, cfg.sft_lr) == (7, 5, 9, 0.25)
    # its own, not that of the run before
    assert cfg.lr == demo()["model"]["candidates"]["lr"]
    cfg = parsed(*argv, "--per-task", "8")
    assert (cfg.per_task, cfg.max_new_tokens) == (8, 5)
    saved |= {"model": str(tmp_path), "tasks": str(tmp_path)}
    (tmp_path / "ia/config.json").write_text(json.dumps(saved))
    cfg = parsed(*argv)
    assert (cfg.lr, cfg.model, cfg.tasks) == (1e-4, str(tmp_path), str(tmp_path))


def test_only_what_the_earlier_stage_reads_is_taken_from_it(scored_stage, tmp_path):
    """Older versions wrote the flags of all stages into every config.json."""
    saved = {"stage": "sft-ia", "steps": 9, "lr": 0.25, "per_task": 7, "beta": 5.0, "samples": 9}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "adapter_config.json").touch()
    cfg, bare = parsed("--stage", scored_stage, "--init", str(tmp_path)), parsed(
        "--stage", scored_stage)
    assert cfg.per_task == 7 and (cfg.beta, cfg.samples) == (bare.beta, bare.samples)


def test_another_run_of_the_same_stage_gives_all_of_its_settings(scored_stage, tmp_path):
    for folder, saved in (("", {"stage": scored_stage, "steps": 9, "beta": 5.0, "out": "x"}),
                          ("sft-ia", {"stage": "sft-ia", "steps": 3, "lr": 0.5})):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(saved))
    (tmp_path / "sft-ia/adapter_config.json").touch()
    cfg = parsed("--stage", scored_stage, "--init", str(tmp_path), "--out", "y", "--lr", "0.125")
    assert (cfg.steps, cfg.beta, cfg.out, cfg.lr) == (9, 5.0, "y", 0.125)


@pytest.mark.parametrize("saved, finished", [({"stage": "sft-ia"}, False), ({"stage": "x"}, True),
                                             ({}, True)])
def test_init_without_the_earlier_stage_is_refused(saved, finished, scored_stage, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(saved))
    if finished:
        (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="--init .* holds no finished run of stage sft-ia"):
        parsed("--stage", scored_stage, "--init", str(tmp_path))


def test_settings_that_are_no_object_are_refused_and_an_old_name_is_read(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds no settings"):
        saved_settings(tmp_path)
    (tmp_path / "config.json").write_text('{"gae_lam": 0.9}')
    assert saved_settings(tmp_path) == {"gae_lambda": 0.9}


@pytest.mark.parametrize("changes", [
    {"steps": "x"}, {"lr": [1]}, {"steps": 0}, {"quantize": "nonenone"}, {"adapt": "q_proj"},
    {"evaluate": 3}])
def test_a_value_that_no_flag_could_have_is_refused_with_the_file_that_has_it(changes, tmp_path):
    saved = {"stage": "sft", "steps": 9, "lr": 0.25} | changes
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: .*, which no flag can be"):
        parsed("--stage", "sft", "--out", str(tmp_path))


def test_an_earlier_stage_without_its_steps_is_refused_by_name(scored_stage, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"stage": "sft-ia", "lr": 0.25}))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json lacks steps or lr"):
        parsed("--stage", scored_stage, "--init", str(tmp_path), "--out", str(tmp_path / "out"))


def test_limits_of_a_server_may_differ(scored_stage, folder):
    pytest.importorskip("extras.judges")
    path, _ = folder
    (path / "log.jsonl").touch()
    (path / "config.json").unlink()
    cfg, _ = parse_config(["--stage", scored_stage, "--judge", "http", "--judge-model", "m",
                           "--max-requests", "12", "--out", str(path)])
    save_settings(cfg, path)
    assert not is_finished(path, dataclasses.replace(cfg, max_requests=99, judge_workers=3))
    with pytest.raises(ValueError, match="--judge-model was m, now n"):
        is_finished(path, dataclasses.replace(cfg, judge_model="n"))
    for name, value in (("judge_extra", "{}"), ("judge_temperature", "none"),
                        ("judge_fold_system", True), ("verdict", "keyword")):
        with pytest.raises(ValueError, match=f"now {value}"):
            is_finished(path, dataclasses.replace(cfg, **{name: value}))


def test_a_run_folder_has_the_name_of_its_stage_by_default(scored_stage):
    assert parsed("--stage", "sft-ia").out == "runs/sft-ia"
    assert parsed("--stage", scored_stage).out == "runs/scored"


def test_flags_of_a_server_are_read_where_one_is_asked(scored_stage, refused):
    cfg = parsed("--stage", scored_stage, "--judge", "http", "--judge-url", "http://x/v1",
                 "--judge-model=m")
    assert (cfg.judge_url, cfg.judge_model) == ("http://x/v1", "m")
    refused("this stage does not read --judge-url", scored_stage, "--judge", "rule", "--judge-url",
            "http://x/v1")


def test_what_a_method_checks_is_checked_before_anything_is_opened(scored_stage, refused):
    refused("--judge reward needs --reward-model", scored_stage, "--judge", "reward", "--device",
            "nowhere")


def test_every_setting_of_the_demo_is_a_flag_of_somebody():
    said, known = demo(), set()
    for stage in finding.stages():
        flags = settings.config_class(finding.find_method(stage), plain=True)
        known |= {item.name for item in dataclasses.fields(flags)}
    named = set(said["model"]) - {"sft", "candidates", "judged"}
    if not named <= set(finding.stages()):
        pytest.skip("a method that the demo has settings for was deleted")
    for group in (*said["model"].values(), said["tasks"], said["records"]):
        assert set(group) <= known


# ----- Stages on the way -----

def test_a_stage_on_the_way_has_this_runs_settings_but_its_own_steps_rate_and_batch(
        scored_stage, tmp_path):
    cfg = parsed("--stage", scored_stage, "--out", str(tmp_path / "run"), "--seed", "5", "--rank",
                 "3", "--steps", "7", "--lr", "0.5", "--batch-size", "2", "--sft-steps", "11",
                 "--sft-lr", "0.25", "--wordings", "3")
    found = stage_config(cfg, "sft-ia")
    assert (found.stage, found.out) == ("sft-ia", str(tmp_path / "run/sft-ia"))
    assert (found.seed, found.rank, found.wordings, found.model) == (5, 3, 3, cfg.model)
    assert (found.steps, found.lr, found.batch_size) == (11, 0.25, CommonFlags.batch_size)
    assert not hasattr(found, "beta") and not hasattr(found, "judge")


def test_what_a_method_also_needs_comes_with_its_settings(scored_stage, monkeypatch):
    cfg = parsed("--stage", scored_stage, "--seed", "5")
    more = {"sft": {"steps": 13, "lr": 0.125}}
    monkeypatch.setattr(settings, "find_method", lambda name: method if name == cfg.stage
                        else finding.find_method(name))
    method = finding.find_method(scored_stage)
    method.also_needs = lambda cfg: more
    found = stage_config(cfg, "sft")
    assert (found.steps, found.lr, found.seed) == (13, 0.125, 5)
    assert stage_config(cfg, "sft-ia").steps == cfg.sft_steps


# ----- Which run a folder holds -----

@pytest.fixture
def folder(tmp_path, scored_stage):
    """A run folder with the settings of a run, and those settings."""
    cfg = parsed("--stage", scored_stage, "--out", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    save_settings(cfg, tmp_path / "run")
    return tmp_path / "run", cfg


def test_settings_are_written_as_a_whole_and_read_again(folder):
    path, cfg = folder
    assert saved_settings(path) == json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert [file.name for file in path.iterdir()] == ["config.json"]
    assert saved_settings(path / "nowhere") == {}
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        saved_settings(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "model/config.json"])
def test_a_folder_with_an_adapter_or_a_model_is_a_finished_run(name, folder):
    path, cfg = folder
    assert not is_finished(path, cfg) and not is_finished(path / "nowhere", cfg)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("{}")
    assert is_finished(path, cfg)


@pytest.mark.parametrize("name, value, flag", [
    ("beta", 3.0, "--beta"), ("stage", "sft", "--stage"), ("adapt", ["q_proj"], "--adapt"),
    ("sft_steps", 7, "--sft-steps"), ("judge", "rule", "--judge")])
def test_a_folder_with_other_settings_is_another_run(name, value, flag, folder):
    path, cfg = folder
    before, other = getattr(cfg, name), dataclasses.replace(cfg, **{name: value})
    assert not is_finished(path, other)  # nothing has begun
    (path / "log.jsonl").touch()
    with pytest.raises(ValueError) as stop:
        is_finished(path, other)
    assert str(stop.value) == (f"{path} holds another run: {flag} was {before}, now {value}. Use "
                               f"another --out, or leave {flag} out.")


def test_a_stage_on_the_way_is_named_by_the_flags_of_this_run(scored_stage, tmp_path):
    """--steps belongs to the run's own stage, and leaving it out would change nothing."""
    cfg = parsed("--stage", scored_stage, "--out", str(tmp_path), "--sft-steps", "7")
    before = stage_config(cfg, "sft-ia")
    folder = tmp_path / "sft-ia"
    folder.mkdir()
    save_settings(dataclasses.replace(before, batch_size=5), folder)
    (folder / "log.jsonl").touch()
    assert not is_finished(folder, before)  # no flag of this command sets that batch
    save_settings(dataclasses.replace(before, steps=3), folder)
    with pytest.raises(ValueError, match="--sft-steps was 3, now 7. .*leave --sft-steps out"):
        is_finished(folder, before)
    save_settings(dataclasses.replace(before, lr=0.5), folder)
    with pytest.raises(ValueError, match="--sft-lr was 0.5, now .*leave --sft-lr out"):
        is_finished(folder, before)


def test_a_stage_of_ones_own_is_the_same_by_any_path(tmp_path, monkeypatch, scored_stage):
    (tmp_path / "mine.py").write_text('"""Mine."""\nfrom methods import sft as base\n'
                                      "from methods.sft import items, step, TERMS\n")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    cfg = parsed("--stage", str(tmp_path / "mine.py"), "--out", "run", "--steps", "3")
    (tmp_path / "sub/run").mkdir()
    save_settings(cfg, tmp_path / "sub/run")
    (tmp_path / "sub/run/log.jsonl").touch()
    again = parsed("--stage", "../mine.py", "--out", "run")
    assert again.steps == 3 and not is_finished(tmp_path / "sub/run", again)
    (tmp_path / "other.py").write_text((tmp_path / "mine.py").read_text())
    with pytest.raises(ValueError, match="holds another run: --stage was"):
        is_finished(tmp_path / "sub/run", parsed("--stage", "../other.py", "--out", "run"))


def test_what_changes_no_result_may_differ(folder):
    path, cfg = folder
    assert settings.FREE <= {item.name for item in dataclasses.fields(cfg)}
    changed = dataclasses.replace(cfg, **dict.fromkeys(settings.FREE, "another"))
    assert not is_finished(path, changed)


def test_all_settings_of_a_run_are_kept_with_the_template_that_was_found(earlier):
    saved = saved_settings(earlier["sft"])
    assert saved["template"] == "plain" and saved["stage"] == "sft" and saved["steps"] == 3
    flags = settings.config_class(finding.find_method("sft"), plain=True)
    assert set(saved) == {item.name for item in dataclasses.fields(flags)}


def test_a_command_may_leave_out_its_stage():
    if "cat" not in finding.stages():
        pytest.skip("the method cat was deleted")
    assert train.parse_config(["--plain"])[0].stage == "cat"


@pytest.mark.parametrize("stage", ["rrhf", "pro"])
def test_a_ranking_of_an_earlier_version_stood_under_its_own_wordings(stage, tmp_path):
    pytest.importorskip(f"methods.{stage}")
    (tmp_path / "config.json").write_text(json.dumps({"stage": stage, "lr": 0.5}))
    cfg = parse_config(["--stage", stage, "--plain", "--out", str(tmp_path)])[0]
    assert (cfg.condition, cfg.lr) == ("own", 0.5)
    assert parse_config(["--stage", stage, "--plain"])[0].condition == "worse"


def test_the_server_of_agreement_is_remembered(tmp_path):
    pytest.importorskip("extras.judges")
    cat = pytest.importorskip("methods.cat")
    settings = {"stage": "cat", "judge": "agreement", "agreement_by": "http",
                "judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    cfg, method = parse_config(["--stage", "cat", "--out", str(tmp_path)])
    assert method is cat and (cfg.judge_url, cfg.judge_model) == ("http://127.0.0.1:9/v1", "m")


@pytest.mark.parametrize("old, new", [("", []), ("alpaca.json", ["alpaca.json"]),
                                      (["a.json", "b.json"], ["a.json", "b.json"])])
def test_a_run_from_when_examples_were_one_file_can_be_read(old, new, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"stage": "sft", "examples": old}))
    assert saved_settings(tmp_path)["examples"] == new
