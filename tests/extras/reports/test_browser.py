"""report.html in a real browser: sorting, filters, opened questions, and hostile texts."""

import json
import random
import shutil
import string
from types import SimpleNamespace

import pytest

from eval import write_results
from extras.reports.page import PLOTS, embed_plots

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium, chromedriver missing")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1300,1000")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a reader does with the page."""

    def __init__(self, driver):
        self.run = driver.execute_script

    def rows(self):
        """The texts of the cells of the rows that are shown."""
        return self.run("return [...document.querySelectorAll('#table .wide > table > tbody > "
                        "tr:not(.opened)')].map(row => [...row.cells].map(x => x.textContent))")

    def status(self):
        """How many questions are shown, of how many."""
        return self.run("return document.querySelector('#table .status').textContent")

    def sort(self, title, number=0):
        """Click on a column's title; the one with this number among equal ones."""
        return self.run("""
            const heads = [...document.querySelectorAll("#table thead button")];
            const head = heads.filter(x => x.textContent === arguments[0])[arguments[1]];
            head.click();
            return head.closest("th").ariaSort;""", title, number)

    def choose(self, name, value):
        """Set a filter to the option with this text, or type this text."""
        self.run("""
            const field = document.getElementById(arguments[0]);
            const option = [...field.options ?? []].find(x => x.textContent === arguments[1]);
            field.value = option ? option.value : arguments[1];
            field.dispatchEvent(new Event("input", {bubbles: true}));""", name, value)

    def open(self, number=0):
        """Click on a question, and return the element below it."""
        return self.run("""
            const button = document.querySelectorAll("#table button.open")[arguments[0]];
            button.click();
            return button.closest("tr").nextSibling;""", number)


@pytest.fixture
def page(browser, tmp_path, evaluate):
    """page(questions by model): the page of their evaluation, in the browser."""
    def show(asked):
        results, tables = {}, {}
        for name, questions in asked.items():
            results[name], tables[name] = evaluate(questions)
        write_results(SimpleNamespace(out=tmp_path, plain=False), results, tables)
        browser.get_log("browser")
        browser.get((tmp_path / "report.html").as_uri())
        return Page(browser)
    return show


@pytest.fixture
def asked(question):
    """Questions of two models: random answers of a few words."""
    rng, tables = random.Random(), {}
    for name in ("base", "tuned"):
        tables[name] = []
        for k in range(120):
            answers = rng.choices(["red", "blue", "dark red"], k=4)
            styles = ["plain", "question", "", "plain"]
            tables[name].append(question(answers, input=f"lamp {k}", task=f"task{k % 3}",
                                         styles=styles, id=f"i{k}"))
    return tables


def figures(rows, column):
    """The numbers of a column; -1 where there is none."""
    return [float(row[column]) if row[column] != "-" else -1 for row in rows]


def test_a_click_sorts_and_a_second_click_turns_the_order(page, asked):
    shown = page(asked)
    assert shown.status() == "1 to 50 of 120"
    groups = shown.run("return [...document.querySelector('#table thead tr').cells].map("
                       "cell => [cell.textContent, cell.colSpan])")
    assert groups == [["", 2], ["base", 3], ["tuned", 3]]
    for number, column in ((0, 2), (1, 5)):  # CR of both models
        assert shown.sort("CR", number) == "ascending"
        up = figures(shown.rows(), column)
        assert up == sorted(up) and len(up) == 50
        assert shown.sort("CR", number) == "descending"
        down = figures(shown.rows(), column)
        assert down == sorted(down, reverse=True) and down[0] > up[0]
    shown.sort("MCR")
    assert figures(shown.rows(), 3) == sorted(figures(shown.rows(), 3))
    shown.sort("Task")
    assert {row[1] for row in shown.rows()} == {"task0", "task1"}
    shown.run("document.querySelectorAll('#table .pager button')[1].click()")
    assert shown.status() == "51 to 100 of 120"
    assert [row[1] for row in shown.rows()] == ["task1"] * 30 + ["task2"] * 20


def test_filters_by_task_correctness_agreement_and_search(page, asked, browser):
    shown, right = page(asked), {"all": 0, "some": 0, "none": 0}
    wanted = {name: [sum(text == "red" for text in question["responses"])
                     for question in questions] for name, questions in asked.items()}
    for hits in wanted["tuned"]:
        right["all" if hits == 4 else "some" if hits else "none"] += 1

    def count():
        status = shown.status()
        return 0 if status == "none" else int(status.split()[-1])
    shown.choose("model", "tuned")
    for words in right:
        shown.choose("correct", f"{words} right")
        assert count() == right[words], words
    shown.choose("correct", "any")
    whole = sum(len(set(question["responses"])) == 1 for question in asked["tuned"])
    shown.choose("agreement", "all responses agree")
    assert count() == whole
    shown.choose("agreement", "some response outside the largest cluster")
    assert count() == 120 - whole
    # With a style, only responses to its wordings count: here the second.
    shown.choose("style", "question")
    broken = 0
    for question in asked["tuned"]:
        answers = question["responses"]
        sizes = sorted((answers.count(text) for text in set(answers)), reverse=True)
        tied = sizes[1:] and sizes[0] == sizes[1]
        broken += bool(tied) or answers.count(answers[1]) < sizes[0]
    assert count() == broken
    shown.run("document.querySelector('#filters button').click()")
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert count() == 120
    shown.choose("task", "task1")
    assert count() == 40 and {row[1] for row in shown.rows()} == {"task1"}
    shown.choose("search", "LAMP 7")
    found = [k for k in range(120) if f"lamp {k}".startswith("lamp 7") and k % 3 == 1]
    assert [row[0] for row in shown.rows()] == [f"lamp {k}" for k in found]
    shown.choose("search", "no such text")
    assert shown.status() == "none" and shown.rows() == []


def test_a_click_opens_a_question_with_clusters_and_marked_words(page, question, browser):
    answers = ["a dark red lamp", "a dark red lamp", "a red lamp", "a dark red", "?", "a red lamp"]
    base = question(answers, targets=["a red lamp"], input="which lamp?")
    base["wordings"] = ["w0", "w0", "w1", "w2", "w3", "w4"]  # two samples under w0
    tuned = question(["a red lamp"] * 3, targets=["a red lamp"], input="which lamp?")
    tuned["wordings"] = ["w0", "w2", "new"]  # another model need not have all wordings
    shown = page({"base": [base], "tuned": [tuned]})
    opened = shown.open()
    lines = shown.run("""
        return [...arguments[0].querySelectorAll(".responses tbody tr")].map(row =>
            [...row.cells].map(cell => [cell.textContent, cell.className,
                [...cell.querySelectorAll("mark")].map(x => x.textContent)]))""", opened)
    heads = [line[0][0].strip() for line in lines]
    assert heads == ["w0", "w0 sample 2", "w1", "w2", "w3", "w4", "new"]
    first, again, other, shorter = (line[1] for line in lines[:4])
    assert first == again == ["A ✗ a dark red lamp", "cluster c0", []]
    assert other == ["B ✓ a red lamp", "cluster c1", []]  # a word less, none that differs
    assert shorter == ["C ✗ a dark red", "cluster alone", []]
    assert lines[4][1] == ["D ✗ ?", "cluster alone", ["?"]] and lines[5][1] == other
    assert [line[2][0] for line in lines] == [
        "A ✓ a red lamp", "-", "-", "A ✓ a red lamp", "-", "-", "A ✓ a red lamp"]
    colours = shown.run("""
        return [...arguments[0].querySelectorAll(".responses td.cluster")].map(
            cell => getComputedStyle(cell).backgroundColor)""", opened)
    assert len(set(colours)) == 3  # two clusters and grey
    button = browser.find_element("css selector", "#table button.open")
    for expanded in ("false", "true", "false"):  # by the keyboard, too
        button.send_keys("\n")
        assert button.get_attribute("aria-expanded") == expanded
        assert bool(shown.run("return document.querySelector('.opened')")) == (expanded == "true")


def test_the_marked_words_are_those_outside_the_common_subsequence(page, question):
    """Against a brute force over all subsequences."""
    from itertools import combinations

    shown, rng = page({"m": [question(["a", "a"])]}), random.Random()
    for _ in range(200):
        words, reference = ([rng.choice("abc") for _ in range(rng.randrange(7))] for _ in range(2))
        differs = shown.run("return differingWords(...arguments)", words, reference)
        kept = [word for word, marked in zip(words, differs, strict=True) if not marked]
        subsequences = {part for n in range(7) for part in combinations(reference, n)}
        longest = max(len(part) for n in range(7) for part in combinations(words, n)
                      if part in subsequences)
        assert tuple(kept) in subsequences and len(kept) == longest


HOSTILE = ["<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 1'>", "</script>"
           "<script>window.hit = 1</script>", "\u2028\u2029", "<!-- plots -->", "<!--<script>",
           "&lt;b&gt;&amp;", "\ud800", "\x00\x08", "'\"`${window.hit = 1}$policy", "]]>",
           "__proto__", "<style>* { display: none }</style>", "\u202ereversed",
           "<svg onload='window.hit = 1'>", "<a href='javascript:window.hit = 1'>x</a>",
           "<iframe src='http://127.0.0.1:9/x'></iframe>",
           "<link rel=stylesheet href=//127.0.0.1:9>"]


def test_hostile_texts_do_nothing(page, question, browser):
    asked = {}
    for name in HOSTILE[1:3]:
        asked[name] = []
        for text in HOSTILE:
            row = question(HOSTILE, targets=[text], task=text, input=text, styles=HOSTILE, id=text)
            row["wordings"] = list(HOSTILE)
            asked[name].append(row)
    shown = page(asked)
    for number in range(len(HOSTILE)):
        assert shown.open(number)
    for title in ("Input", "Task", "CR", "Right"):
        shown.sort(title)
    assert shown.run("return document.querySelectorAll('.opened').length") == len(HOSTILE)
    shown.choose("search", "<SCRIPT>")
    assert shown.status() == f"1 to {len(HOSTILE)} of {len(HOSTILE)}"
    assert shown.run("return window.hit ?? null") is None
    assert shown.run("return document.querySelectorAll('body img:not([src^=\"data:image/png\"]), "
                     "svg, a, iframe, link').length") == 0
    assert shown.run("return document.scripts.length") == 2
    assert shown.run("return document.querySelectorAll('style').length") == 1
    assert shown.run("return performance.getEntriesByType('resource')"
                     ".filter(x => !x.name.startsWith('data:')).length") == 0
    assert browser.get_log("browser") == []  # no error, and nothing that the policy had to stop
    texts = json.loads(shown.run("return JSON.stringify(data.strings)"))
    assert set(HOSTILE) <= set(texts)


def test_the_policy_stops_what_would_slip_in(page, question, browser):
    shown = page({"m": [question(["a", "b"])]})
    shown.run("""
        window.stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          window.stopped.push(event.effectiveDirective);
        });
        const script = document.createElement("script");
        script.textContent = "window.hit = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", `<img src="http://127.0.0.1:9/x"
            onerror="window.hit = 1" style="color: red">`);
        fetch("http://127.0.0.1:9/x").catch(() => { window.refused = 1; });""")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert shown.run("return [window.hit ?? 0, window.refused]") == [0, 1]
    assert set(shown.run("return window.stopped")) == {
        "script-src-elem", "script-src-attr", "style-src-attr", "img-src", "connect-src"}


def test_curves_come_into_a_page_that_is_there(page, question, tmp_path, browser):
    from extras.reports.runs import report_training

    pytest.importorskip("matplotlib")
    page({"m": [question(["a", "b"])]})
    log = [{"stage": "sft", "step": k, "ce": 3.0 - k} for k in range(3)]
    for folder in (tmp_path, tmp_path / "sft"):
        folder.mkdir(exist_ok=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        report_training(folder)
    for _ in range(2):  # a second time replaces them
        embed_plots(tmp_path)
    assert (tmp_path / "report.html").read_text().count(PLOTS) == 2
    browser.get((tmp_path / "report.html").as_uri())
    loaded = browser.execute_script("""
        return [...document.images].map(x => [x.alt, x.naturalWidth > 100])""")
    assert loaded == [["metrics", True], ["training", True], ["sft/training", True]]


def test_a_page_without_references_has_no_column_for_right(
        page, question, evaluate, without_references, tmp_path, browser):
    hidden = "return document.getElementById('correct').parentElement.hidden"
    shown = page({"m": [question(["a", "b"], targets=["a"])]})
    assert len(shown.rows()[0]) == 5 and not shown.run(hidden)
    results, tables = without_references(*evaluate([question(["a", "b"])]))
    write_results(SimpleNamespace(out=tmp_path, plain=False), {"m": results}, {"m": tables})
    browser.get((tmp_path / "report.html").as_uri())
    assert len(shown.rows()[0]) == 4 and shown.run(hidden)
    assert shown.run("return arguments[0].textContent", shown.open()).endswith("A awording 1B b")


def test_ten_thousand_questions(page, browser, tmp_path):
    """Three models and ten wordings: few rows are in the document, and all are sorted."""
    rng, tables, results = random.Random(), {}, {}
    metric = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 10_000, "ci95_tasks": None}
    names = ("cr", "mcr", "rouge1", "rougeL", "exact_match", "consistent_and_correct")
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(500)]
    wordings = [[f"{' '.join(rng.choices(words, k=12))}" for _ in range(10)] for _ in range(50)]
    for model in ("one", "two", "three"):
        results[model] = {**dict.fromkeys([*names, "within"], metric), "wording_effect": metric,
                          "questions": 10_000, "judge": "rule",
                          "responses": 100_000, "unfinished": 0, "unparsed": 0, "mcr_inexact": 0}
        tables[model] = []
        for k in range(10_000):
            cluster = [0, 0, 0, *sorted(rng.choices(range(4), k=7))]
            tables[model].append({
                "task": f"task{k % 50}", "input": f"question {k}", "targets": ["x"], "id": str(k),
                "wordings": wordings[k % 50], "styles": ["plain"] * 10, "cluster": cluster,
                "responses": [" ".join(rng.choices(words, k=8)) for _ in range(10)],
                "correct": [rng.random() < 0.5 for _ in range(10)], "unparsed": 0,
                "cr": rng.random(), "mcr": rng.random(),
                **dict.fromkeys(names[2:], 0.5)})
    write_results(SimpleNamespace(out=tmp_path, plain=False), results, tables)
    assert (tmp_path / "report.html").stat().st_size < 40e6
    browser.get((tmp_path / "report.html").as_uri())
    shown = Page(browser)
    assert shown.status() == "1 to 50 of 10000"
    shown.sort("CR", 1)
    lowest = sorted(row["cr"] for row in tables["two"])[:50]
    assert figures(shown.rows(), 5) == pytest.approx([100 * x for x in lowest], abs=0.06)
    shown.choose("task", "task7")
    assert shown.status() == "1 to 50 of 200"
    shown.choose("correct", "all right")
    shown.choose("model", "three")
    wanted = sum(all(row["correct"]) for row in tables["three"] if row["task"] == "task7")
    status = shown.status()
    assert (0 if status == "none" else int(status.split()[-1])) == wanted
    shown.choose("correct", "any")
    needle = tables["one"][4321]["responses"][3]
    shown.choose("task", "all")
    shown.choose("search", needle)
    assert ["question 4321", "task21"] in [row[:2] for row in shown.rows()]
    assert shown.open() and shown.run("return document.querySelectorAll('tr').length") < 250
