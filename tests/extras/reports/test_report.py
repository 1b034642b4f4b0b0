"""report.md says what was compared, how, and nothing that is not there."""

import random
import re

import pytest

from extras.reports import plots, write_report
from extras.reports.metrics import paired_difference
from extras.reports.report import caption
from extras.reports.tables import cell, fixed, html_table


@pytest.fixture
def models(question, evaluate):
    """models(names): results and tables of that many models on eight questions of two tasks."""
    def make(*names):
        rng, results, tables = random.Random(), {}, {}
        for name in names:
            asked = [question(rng.choices(["red", "blue"], k=3), task=f"task{k % 2}", input=str(k))
                     for k in range(8)]
            results[name], tables[name] = evaluate(asked)
        return results, tables
    return make


def read(folder):
    """report.md without the backslashes of Markdown."""
    return re.sub(r"\\(.)", r"\1", (folder / "report.md").read_text(encoding="utf-8"))


def part(text, title):
    """The section with this title."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_top_says_what_was_compared_and_how(models, tmp_path):
    results, tables = models("base", "CAT")
    for name, metrics in results.items():
        metrics["settings"] = {"split": "dev", "seed": 7, "wordings": 3, "samples": None,
                               "rouge_threshold": 0.95, "temperature": 0.0, "server": name}
    write_report(tmp_path, results, tables)
    text = read(tmp_path)
    assert "Models compared: base, CAT. Questions: 8 of 2 tasks, dev split, each under 3 wordings."\
        in text.split("## ")[0]
    for line in ("| judge | equal |", "| seed | 7 |", "| rouge threshold | 0.95 |",
                 "| temperature | 0.0 |", "| wordings | 3 |",
                 "| server | base: base; CAT: CAT |"):
        assert line in part(text, "Settings"), line
    assert "samples" not in part(text, "Settings")  # nobody said
    assert "Spread evenly over the dev split." in text and "test" not in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Models compared: base, CAT. Questions: 8 of 2 tasks, dev split" in page
    assert '<th scope="row">rouge threshold</th><td>0.95</td>' in page


@pytest.mark.parametrize("split, words", [("test", "the test split"), (None, "all questions")])
def test_the_test_split_is_named_only_if_it_was_used(split, words, models, tmp_path):
    results, tables = models("m")
    if split:
        results["m"]["split"] = split
    write_report(tmp_path, results, tables)
    text = read(tmp_path)
    assert f"Spread evenly over {words}." in text and text.count("test split") == 2 * bool(split)
    assert ("split not recorded" in text) == (not split)


def test_plots_are_linked(models, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(tmp_path, *models("a", "b"))
    text = (tmp_path / "report.md").read_text()
    linked = re.findall(r"^!\[.*\]\((.*)\)$", text, re.M)
    assert linked == ["plots/metrics.png", "plots/question.png"]
    assert all((tmp_path / name).exists() for name in linked)


@pytest.mark.parametrize("names, wanted", [
    (["a"], []), (["a", "b"], ["b - a"]),
    (["base", "SFT", "SFT(IA)", "CAT"], ["SFT - base", "SFT(IA) - base", "SFT(IA) - SFT",
                                         "CAT - base", "CAT - SFT", "CAT - SFT(IA)"]),
    (["a", "b", "c", "d", "e"], ["b - a", "c - a", "c - b", "d - a", "d - c", "e - a", "e - d"])])
def test_every_model_is_compared_with_the_earlier_ones(names, wanted, models, tmp_path):
    results, tables = models(*names)
    write_report(tmp_path, results, tables)
    text = read(tmp_path)
    assert ("## Differences" in text) == bool(wanted)
    if wanted:
        found = re.findall(r"^\| (\S+ - \S+) \| (\S+)", part(text, "Differences"), re.M)
        assert [name for name, _ in found] == wanted
        for name, shown in found:
            after, before = name.split(" - ")
            change = paired_difference(tables[before], tables[after], "cr")["mean"]
            assert float(shown) == pytest.approx(100 * change, abs=0.06)


def test_models_that_answered_different_questions(models, tmp_path):
    """The difference is over those that both have; a row that is absent leaves a gap."""
    results, tables = models("a", "b")
    tables["b"] = [tables["b"][k] for k in (5, 0, 3)]
    tables["b"][1]["wordings"] = ["wording 0", "wording 0", "new"]
    write_report(tmp_path, results, tables)
    text = read(tmp_path)
    both = [tables["a"][k] for k in (0, 3, 5)]
    by_input = sorted(tables["b"], key=lambda row: int(row["input"]))
    change = paired_difference(both, by_input, "mcr")
    assert f"| b - a | {cell(paired_difference(both, by_input, 'cr'))} | {cell(change)} |" in text
    assert "| new | - | " in text and "| wording 0 (sample 2) | - | " in text
    assert "Questions: 8 of 2 tasks, split not recorded, each under 2 to 3 wordings." in text


def test_a_rule_judge_has_no_unread_verdicts(models, tmp_path):
    results, tables = models("a", "b")
    results["b"]["unparsed"], results["b"]["unread_share"] = 3, 0.125
    write_report(tmp_path, results, tables)
    counts = part(read(tmp_path), "Counts")
    assert "| model | questions | responses | unfinished | unread verdicts | unread, percent |" \
        in counts and "| b | 8 | 24 | 0 | 3 | 12.5 |" in counts
    results["a"]["judge"] = results["b"]["judge"] = "rule"
    write_report(tmp_path, results, tables)
    assert "unread" not in read(tmp_path)
    results["b"]["judge"] = "http"  # only one of them was judged
    write_report(tmp_path, results, tables)
    assert "| a | 8 | 24 | 0 | - | - |" in part(read(tmp_path), "Counts")


def test_metrics_without_a_value_leave_no_column_and_no_definition(
        models, without_references, tmp_path):
    results, tables = models("a", "b")
    write_report(tmp_path, results, tables)
    assert "EM: exact match" in read(tmp_path) and "a tick an exact match" in read(tmp_path)
    for name in results:
        results[name], tables[name] = without_references(results[name], tables[name])
    write_report(tmp_path, results, tables)
    text = read(tmp_path)
    assert "| model | CR | MCR |\n" in text and "CR: consistency rate" in text
    for word in ("exact match", "EM", "ROUGE", "C&C", "✓"):
        assert word not in text, word
    assert "Reference: none" in text


@pytest.mark.parametrize("value, digits, text", [
    (-0.04, 1, "0.0"), (-0.0, 2, "0.00"), (-0.004, 2, "0.00"), (-0.06, 1, "-0.1"),
    (0.05, 2, "0.05")])
def test_zero_has_no_sign(value, digits, text):
    assert fixed(value, digits) == text


def test_no_figure_of_a_table_is_minus_zero():
    summary = {"mean": -0.0001, "ci95": [-0.0002, -0.0], "ci95_tasks": [-0.0004, 0.0004]}
    assert cell(summary) == "0.0 [0.0, 0.0] tasks [0.0, 0.0]" and cell(-0.001) == "0.00"
    assert "-0" not in html_table("m", {"a": {"x": summary, "y": -0.0}})


def test_controls_and_samples_under_one_wording(models, tmp_path):
    results, tables = models("a", "b")
    share = {"mean": 0.75, "ci95": [0.5, 1.0], "n": 8}
    for name, mean in (("a", 0.1), ("b", 0.2)):
        results[name]["within"] = share
        results[name]["cr"] = share | {"mean": 0.5}
        results[name]["wording_effect"] = share | {"mean": 0.25, "ci95": [0.0, 0.5]}
        results[name]["controls"] = {
            "always the same": {"cr": share | {"mean": 1.0}},
            "shuffled answers": {"cr": share | {"mean": mean}, "mcr": share}}
    write_report(tmp_path, results, tables)
    text = read(tmp_path)
    within = part(text, "Wording and sampling noise")
    assert "| b | 50.0 [50.0, 100.0] | 75.0 [50.0, 100.0] | 25.0 [0.0, 50.0] |" in within
    assert "The difference is what wording does beyond sampling noise." in within
    controls = part(text, "Controls")
    assert controls.count("| always the same | 100.0 [50.0, 100.0] | - |") == 1
    assert "| shuffled answers, a | 10.0 [" in controls and "answers, b | 20.0 [" in controls
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<section id="controls">' in page and "shuffled answers, b" in page
    assert '<section id="wording-and-sampling-noise">' in page


def test_single_responses_have_no_consistency(question, evaluate, tmp_path):
    """CUT's report asks each question once."""
    metrics, rows = evaluate([question(["red"])])
    write_report(tmp_path, {"CUT": metrics}, {"CUT": rows})
    text = read(tmp_path)
    assert "Model: CUT. Questions: 1 of 1 task, split not recorded, each under 1 wording." in text
    assert "| model | R-1 | R-L | EM |\n" in text and "CR" not in text.split("## 1 question")[0]
    assert "break agreement" not in text


# ----- The plot -----
def texts(figure):
    """All texts in a figure."""
    from matplotlib.text import Text
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_plot_explains_itself_and_shows_zero(models):
    pytest.importorskip("matplotlib")
    results, _ = models("a")
    line = caption(results)
    assert line.startswith("Whiskers: 95 % intervals over 8 questions. CR = consistency rate, MCR")
    zero, one = ({"mean": mean, "ci95": [mean / 2, mean], "n": 8} for mean in (0.0, 0.5))
    nothing = {"mean": None, "ci95": None, "n": 0}
    figure = plots.plot_bars({"a": {"CR": zero, "EM": one}, "b": {"CR": one, "EM": nothing}}, line)
    found = texts(figure)
    assert line in [text.replace("\n", " ") for text in found]
    axes = figure.axes[0]
    notes = [(text.get_text(), round(text.xy[0], 1)) for text in axes.texts]
    assert notes == [("0", -0.2), ("–", 1.2)]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [0, 50, 50, 0]
    plain = texts(plots.plot_bars({"a": {"CR": one}}))
    assert set(plain) == {"a", "CR", "percent"}
