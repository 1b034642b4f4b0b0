"""Markdown pages and plots: what outsiders write stays text, and nothing fails on empty input."""

import json
import random
import sys
from types import SimpleNamespace

import pytest

import data
from eval import write_results
from extras.reports import plots, write_report
from extras.reports.judges import confusion_section, judge_table, write_judge_report
from extras.reports.plots import printable
from extras.reports.runs import report_training
from extras.reports.tables import markdown, table

HOSTILE = ("\x0e\ud801a|b `c` <script>alert(1)</script> [x](http://e.org) $x_1$ \x1b[31m\n# head "
           "\u202e \ud800 **")


@pytest.fixture
def two_models(question, evaluate):
    """Results and tables of two models with odd names and texts."""
    base = evaluate([question([HOSTILE, "red", "red"]), question(["a", "b"], task="|t|")])
    tuned = evaluate([question(["red"] * 3), question(["a", "a"], task="|t|")])
    return {"base": base[0], "sft|x": tuned[0]}, {"base": base[1], "sft|x": tuned[1]}


def test_the_report_neutralises_what_a_model_says(tmp_path, two_models):
    write_report(tmp_path, *two_models)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\<script\\>" in text and "<script" not in text.replace("\\<", "")
    assert "[x]" not in text and "\n# head" not in text
    rows = [line for line in text.splitlines() if line.startswith("| wording 0")]
    assert rows and all(line.replace("\\|", "").count("|") == 4 for line in rows)
    assert "| sft\\|x - base | 83.3 [" in text and "A ✓ red" in text


def test_an_answer_without_a_target_has_no_tick(tmp_path, two_models):
    _, tables = two_models
    for rows in tables.values():
        for row in rows:
            row["correct"] = [None] * len(row["correct"])
    write_report(tmp_path, *two_models)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "A red" in text and " ✓" not in text


def test_hostile_texts_survive_in_records_and_do_nothing_on_the_screen(tmp_path):
    """One line of a file each; what is shown of them has no character that controls anything."""
    rng, bits = random.Random(0), [
        "\ud800", "\u2028", "\u2029", "\x85", "\x1e", "\x00", "\x1b[31m", "\r", "\n", "\u202e",
        "\u200b", "é", "日", "🙂", "\\", '"', "<b>", "|", "`", "[x](http://y)", "9" * 400, "x"]
    texts = ["".join(rng.choices(bits, k=rng.randrange(1, 40))) for _ in range(298)]
    texts += ["y" * 10**6, "\ud800" * 10**4]
    path = tmp_path / "r.jsonl"
    data.append_records(path, [{"id": k, "text": text} for k, text in enumerate(texts)])
    assert [record["text"] for record in data.read_records(path)] == texts
    assert path.read_bytes().count(b"\n") == len(path.read_text().splitlines()) == 300
    assert all(show(text).isprintable() for text in texts for show in (printable, markdown))


def test_a_report_of_no_question(tmp_path, evaluate):
    metrics, rows = evaluate([])
    write_results(SimpleNamespace(out=tmp_path, plain=False), {"none": metrics}, {"none": rows})
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["none"]["cr"] == {"mean": None, "ci95": None, "n": 0, "ci95_tasks": None,
                                   "tasks": 0}
    assert "| none | - |" in (tmp_path / "report.md").read_text()


def test_texts_and_tables():
    assert len(markdown("a" * 10**6)) == 1000
    assert printable("a b\n\x00é\u2028") == "a b\\n\\x00é\\u2028"
    assert markdown("`<a>|b`*") == "\\`\\<a\\>\\|b\\`\\*"
    share = {"mean": 0.5, "ci95": [0.25, 1.0], "n": 4}
    rows = {"x": {"a": share, "b": 0.123, "c": None, "d": 3, "e": {"mean": None, "ci95": None},
                  "f": {"http": 2, "x|": 0.5}, "g": {}},
            "y": {"a": {"mean": 1.0, "ci95": None}}}
    assert table("name", rows).splitlines() == [
        "| name | a | b | c | d | e | f | g |", "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| x | 50.0 [25.0, 100.0] | 0.12 | - | 3 | - | http 2, x\\| 0.50 | - |",
        "| y | 100.0 | - | - | - | - | - | - |"]


def test_plots_are_written(tmp_path, two_models):
    pytest.importorskip("matplotlib")
    write_report(tmp_path, *two_models)
    log = [{"stage": "cat", "step": k, "rank": 1 / (k + 1), "ce": 2.0, "norm": 0.5, "lr": 1e-4,
            "tokens": 10 * k, "seconds": 0.1, "spike": ["a"]} for k in range(20)]
    phases = [{"phase": k // 4, "score": k % 3, "kl": 0.1 * k, "finished": True} for k in range(12)]
    for name, rows in (("log", log), ("rollouts", phases)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    report_training(tmp_path)
    found = {path.name: path.stat().st_size for path in tmp_path.rglob("*.png")}
    assert found.keys() == {"metrics.png", "question.png", "training.png", "ppo.png"}
    assert min(found.values()) > 5000
    panels = [axes.get_title() for axes in plots.plot_training(log).axes]
    assert panels[:4] == ["rank", "ce", "norm", "lr"]
    score, kl = plots.plot_training(phases, "phase").axes[:2]
    assert score.lines[0].get_ydata().tolist() == pytest.approx([0.75, 1.0, 1.25])
    assert kl.lines[0].get_xdata().tolist() == [0, 1, 2]


def test_a_run_without_a_log_has_no_curves(tmp_path):
    report_training(tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_a_report_without_matplotlib_says_so(tmp_path, two_models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path, *two_models)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists() and not list(tmp_path.rglob("*.png"))


# ----- Judges -----

def test_the_page_of_a_meta_evaluation(tmp_path):
    from extras.judges.meta import summarize_judge

    pairs = {"pairs": [{"input": "i", "output_1": "long " * 20, "output_2": "b", "label": 1},
                       {"input": "j", "output_1": "c", "output_2": "d", "label": 2}]}
    rows = [{"winners": ["1", "1"], "draw": False, "failures": []},
            {"winners": ["1", None], "draw": False, "failures": ["http 500: x"]}]
    judged = {"a|b": {"pairs": [rows, rows]}}
    results = {"a|b": summarize_judge(pairs, judged["a|b"])}
    costs = {"a|b": {"requests": 4, "cost": 0.00412, "seconds": 1.25}}
    pool = {"who": {"pairs": 2, "flipped": 1, "before": {"mean": 1.0, "ci95": None, "n": 2}}}
    about = {"judge": "http", "usage": [{"asked": 4}], "costs": costs,
             "controls": {"longer (control)": results["a|b"]}, "annotators": {"a|b": pool}}
    write_judge_report(tmp_path, pairs, results, judged, about)
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["judge"] == "http" and found["evaluators"]["a|b"]["pairs"]["unparsed"] == 1
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[3]["repeat"] == 1
    assert lines[1] == {"evaluator": "a|b", "subset": "pairs", "repeat": 0, **pairs["pairs"][1],
                        **rows[1]}
    text = (tmp_path / "report.md").read_text()
    shown = "50.0 / 100.0 (25.0 % unread)"
    assert f"| a\\|b | {shown} | {shown} |" in text and judge_table(results) in text
    assert f"| longer (control) | {shown} | {shown} |" in text
    assert "| a\\|b | 4 | 0.0041 | 1.2 |" in text and "| who | 2 | 1 | 100.0 |" in text
    assert (tmp_path / "plots/judge.png").exists()


def test_the_section_on_the_rewards_of_a_run():
    from extras.judges.judges import confusion
    from judge import Verdict

    items = [{"instruction": "i", "input": str(k), "target": "red", "response": "blue"}
             for k in range(3)]
    verdicts = [Verdict(True, True, 2, "judged"), Verdict(True, False, 1, "judged"),
                Verdict(None, None, None, "unparsed")]
    truths = [Verdict(True, True, 2, "rule"), Verdict(True, True, 2, "rule"),
              Verdict(False, False, 0, "rule")]
    text = confusion_section(confusion(items, verdicts, truths), "self")
    assert text.startswith("\n## How far to trust the judge\n\nThe self judge's rewards")
    assert "| best, all | 1 | 0 | 1 | 0 | 1 | 0.50 | 1.00 | 0.50 |" in text


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": "3", "loss": 1.0}, {"step": [1]}])
def test_a_damaged_row_of_the_log_is_named(row):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="a row of the log has no step that is a number"):
        plots.plot_training([row], "step")
