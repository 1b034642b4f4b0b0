"""README.md and docs/: commands parse, links lead somewhere, the README's method trains."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import data
import eval as evaluation
import train
from methods.finding import find_method, stages
from methods.flags import spelled
from methods.settings import config_class

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, words) of each command in the pages that names a program of ours."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:python|torchrun)[^\n`|]*?(?:train|eval)\.py[^\n`|]*", text):
            words = shlex.split(line.partition("#")[0].partition("&&")[0])
            names = [word for word in words if word in ("train.py", "eval.py")]
            if names:
                found.append((page, words[words.index(names[0]):]))
    return found


def known_flags(words):
    """The flags that the command's program reads."""
    if words[0] == "eval.py":
        return None
    stage = dict(zip(words, words[1:], strict=False)).get("--stage", "cat")
    if stage not in stages():  # NAME, X, a path
        stage = "cat"
    flags = {item.name for item in fields(config_class(find_method(stage), server=True))}
    return {spelled(name) for name in flags} | {spelled(f"no_{name}") for name in flags}


def test_there_are_commands():
    assert len(commands()) > 25
    assert {words[0] for _, words in commands()} == {"train.py", "eval.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_commands_exist(page):
    for place, words in commands():
        given = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
        if place != page:
            continue
        if words[0] == "train.py":
            assert given - {"--help"} <= known_flags(words), words
        else:
            values = [word for word in words[1:] if word not in ("...", "[...]")]
            try:
                evaluation.parse_flags(values)
            except SystemExit as error:
                assert error.code == 0 or "..." in words, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        place = (page.parent / target) if target else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor and place.suffix == ".md":
            heads = re.findall(r"(?m)^#+ (.*)$", place.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", "docs/family.md"])
def test_the_method_of_the_page_trains(page, tmp_path, arguments, candidates):
    text = (ROOT / page).read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(.*?)```", text, re.S)[0])
    argv = ["--stage", str(tmp_path / "mine.py"), *arguments(tmp_path / "run"), "--plain",
            "--candidates", str(candidates), "--steps", "3", "--sft-steps", "2", "--batch-size",
            "4", "--no-evaluate", "--no-compare"]
    assert train.main(argv) == 0
    rows = data.read_records(tmp_path / "run/log.jsonl")
    assert len(rows) == 3 and 0 < rows[-1]["loss"] < 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_link_names_is_in_its_file(page):
    for names, target in re.findall(r"\[([^\]]*)\]\((?!https?:)([^)#\s]*\.py)\)",
                                    page.read_text(encoding="utf-8")):
        text = (page.parent / target).read_text(encoding="utf-8")
        for name in re.findall(r"`(?:\w+\.)*(\w+)`", names):
            if name != "py":
                assert re.search(rf"\b{name}\b", text), f"{page.name}: {name} in {target}"
