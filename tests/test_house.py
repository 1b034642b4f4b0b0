"""The house: which file may import which, how long and how dense files may be, what stays out."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from extras import tomllib

ROOT = Path(__file__).parent.parent
COURSE = {"losses": 350, "lora": 180, "model": 400, "data": 450, "judge": 400, "eval": 455,
          "train": 420}
SHARED = {"__init__": 250, "candidates": 250, "judged": 250}  # in methods/; any other file: 150
FIRST = {"losses", "lora", "model", "data", "judge"}
MAY_IMPORT = {
    **dict.fromkeys(FIRST, set()),
    "eval": FIRST - {"losses"},
    "methods": FIRST | {"eval", "methods"},
    "train": FIRST | {"eval", "methods"},
    "extras": FIRST | {"eval", "methods", "extras"},
    "tools": FIRST | {"eval", "methods", "extras", "train", "tools"},
}
RUNTIME = {"torch", "sentencepiece", "safetensors", "numpy", "rouge_score", "requests", "urllib3",
           "tqdm", "matplotlib", "tomli", "tomllib"}
# What Python 3.10 lacks; `extras` has tomllib for all versions.
LATER = {
    "tomllib", "annotationlib", "compression", "asyncio.Barrier", "asyncio.Runner",
    "asyncio.TaskGroup", "asyncio.timeout", "contextlib.chdir", "copy.replace", "datetime.UTC",
    "enum.StrEnum", "enum.member", "enum.verify", "glob.translate", "hashlib.file_digest",
    "itertools.batched", "math.cbrt", "math.exp2", "math.fma", "math.sumprod", "operator.call",
    "os.process_cpu_count", "random.binomialvariate", "sys.exception", "typing.LiteralString",
    "typing.Never", "typing.NotRequired", "typing.Required", "typing.Self", "typing.TypeVarTuple",
    "typing.Unpack", "typing.assert_never", "typing.assert_type", "typing.override",
    "typing.reveal_type", "warnings.deprecated"}
LATER_NAMES = {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"}
LATER_METHODS = {"add_note", "is_junction"}
LATER_KEYWORDS = {"case_sensitive", "delete_on_close", "onexc", "recurse_symlinks", "walk_up"}


def files():
    """The Python files of the rooms that have rules."""
    found = [ROOT / f"{name}.py" for name in COURSE]
    for room in ("methods", "extras", "tools"):
        found += sorted((ROOT / room).rglob("*.py"))
    return [path for path in found if path.exists()]


def tracked():
    """All files of the repository that git knows and that are there."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    return [path for path in map(ROOT.joinpath, names.splitlines()) if path.is_file()]


def room(path):
    """losses, ..., train, methods, extras or tools."""
    relative = path.relative_to(ROOT)
    return relative.stem if len(relative.parts) == 1 else relative.parts[0]


def imports(tree):
    """(line, top-level name, whether it is outside functions) of every import."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inside |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            yield node.lineno, name.split(".")[0], id(node) not in inside


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules_of_its_room(path):
    text, own = path.read_text(encoding="utf-8"), room(path)
    tree, lines = ast.parse(text), text.splitlines()
    assert ast.get_docstring(tree) or not lines, "no module docstring"
    assert max(map(len, lines), default=0) <= 100, "a line over 100 columns"
    for line, name, outside in imports(tree):
        if name in MAY_IMPORT and name != own:
            at_a_seam = name == "extras" and own in COURSE and not outside
            assert name in MAY_IMPORT[own] or at_a_seam, f"line {line} imports {name}"
        elif outside and name not in MAY_IMPORT:
            assert name in RUNTIME | set(sys.stdlib_module_names), f"line {line} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert len(given) <= 9, f"{node.name} has {len(given)} parameters"
            public = node.col_offset == 0 and not node.name.startswith("_")
            assert not public or ast.get_docstring(node), f"{node.name} has no docstring"
    assert not re.search(r"except\s*(Exception)?\s*:\s*(pass|continue)", text), "hides an error"
    if own in COURSE:
        assert len(lines) <= COURSE[own]
    elif own == "methods":
        assert len(lines) <= SHARED.get(path.stem, 150)
    else:
        assert len(lines) <= 400
    if own in COURSE or own == "methods":
        check_density(tree, lines)


def check_density(tree, lines):
    """As readable as the model codebases of the field, per line that is not blank."""
    full = [line for line in lines if line.strip()]
    nodes = list(ast.walk(tree))
    loops = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assert sum(map(len, full)) / len(full) <= 65, "mean width"
    assert 1000 * sum(isinstance(x, ast.IfExp) for x in nodes) / len(full) <= 25, "x if y else z"
    assert 1000 * sum(isinstance(x, loops) for x in nodes) / len(full) <= 60, "comprehensions"
    assert len(nodes) / len(full) <= 10, "syntax nodes per line"


def lines_of_code(path):
    """How many lines a file has without blank ones, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    left_out, kinds = set(), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.strip().startswith("#") and number not in left_out
               for number, line in enumerate(text.splitlines(), 1))


def test_the_house_is_small():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in COURSE}
    assert sum(lines.values()) <= 2635
    everything = sum(map(lines_of_code, files()))
    assert everything <= 14950, f"{everything} lines of code outside tests, bench and demo"


def test_the_sources_of_the_report_page_are_short():
    for path in tracked():
        if path.suffix in {".html", ".css", ".js"}:
            lines = path.read_text(encoding="utf-8").splitlines()
            assert len(lines) <= 400 and max(map(len, lines)) <= 100, path


def later(tree):
    """(line, what) of everything in a file that Python 3.10 lacks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names} & LATER
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            found = names & LATER
        elif isinstance(node, ast.Attribute):
            found = {ast.unparse(node)} & LATER | {node.attr} & LATER_METHODS
        elif isinstance(node, ast.Name):
            found = {node.id} & LATER_NAMES
        elif isinstance(node, ast.keyword):
            found = {node.arg} & LATER_KEYWORDS
        else:
            continue
        for what in found:
            yield node.lineno, what


def test_later_sees_what_it_should():
    """Syntax, too: ast.parse refuses it."""
    code = ("import tomllib\nfrom typing import Self\nhashlib.file_digest(x, y)\nExceptionGroup\n"
            "error.add_note('x')\nshutil.rmtree(x, onexc=f)\nfrom extras import tomllib\n")
    assert sorted(later(ast.parse(code))) == [
        (1, "tomllib"), (2, "typing.Self"), (3, "hashlib.file_digest"), (4, "ExceptionGroup"),
        (5, "add_note"), (6, "onexc")]
    for code in ("try:\n    pass\nexcept* ValueError:\n    pass\n", "type x = int\n",
                 "def f[T](x: T): pass\n"):
        with pytest.raises(SyntaxError):
            ast.parse(code, feature_version=(3, 10))


def test_python_3_10_has_all_that_is_used():
    """CI runs 3.10 itself; this finds the same sooner, and names the line."""
    found = []
    for path in tracked():
        if path.suffix == ".py":
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
            found += [f"{path.relative_to(ROOT)}:{line} {what}" for line, what in later(tree)]
    found = [what for what in found if not what.startswith("extras/__init__.py:")]
    assert found == []
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_no_file_of_the_course_names_a_method():
    methods = {path.stem.replace("_", "-") for path in (ROOT / "methods").glob("*.py")
               if "\nTERMS = " in path.read_text()}
    assert len(methods) > 15
    for name in COURSE:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in methods - {"sft", "cat"}, f"{name}.py names {node.value}"


def texts_of(node):
    """The constant parts of the texts in a syntax tree."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def messages():
    """(place, constant parts) of every text that is raised, or given to `fail`, and of each problem
    of a judge's server."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            told = name == "fail" if call is node else name != "AttributeError"
            if told and "describe_problem(" not in ast.unparse(call):  # see below
                yield f"{path.relative_to(ROOT)}:{node.lineno}", list(texts_of(call))
    problems = ROOT / "extras/judges/texts.toml"
    for name, text in tomllib.loads(problems.read_text(encoding="utf-8"))["problems"].items():
        yield f"{problems.name}: {name}", re.split(r"\{[^}]*\}", text)


def windows(text, n=16):
    """All runs of n characters."""
    return {text[start:start + n] for start in range(len(text) - n + 1)}


def test_every_message_stands_in_a_test():
    """16 characters of it, if it has so many in one piece."""
    found, said = {place: set().union(*map(windows, parts)) for place, parts in messages()}, set()
    wanted = set().union(*found.values())
    for path in (ROOT / "tests").rglob("*.py"):
        for text in texts_of(ast.parse(path.read_text(encoding="utf-8"))):
            said |= windows(text.replace("\\", "")) & wanted  # a pattern without its backslashes
    assert not [place for place, mine in found.items() if mine and not mine & said]


def test_nothing_in_the_source_unpickles_or_evaluates():
    """torch.load with weights_only=True alone, and no eval, exec, pickle.load, system or shell."""
    bad = r"eval|exec|compile|__import__|os\.(system|popen)|.*(pickle\.loads?|(yaml|marshal)\.\w+)"
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name, given = ast.unparse(node.func), {x.arg: ast.unparse(x.value)
                                                       for x in node.keywords}
                place = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
                assert not re.fullmatch(bad, name), place
                assert not given.keys() & {"shell", "allow_pickle"}, place
                assert name != "torch.load" or given.get("weights_only") == "True", place


def test_nothing_points_out_of_the_repository():
    for path in tracked():
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yml", ".json", ""}:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.:/])/(home|root|work|mnt|opt)/\w", text), path
            assert "(spec" + " " not in text, path


def test_the_readme_fits_and_its_line_counts_are_true():
    rows = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) <= 220 and max(map(len, rows)) <= 120
    row = r"^\| \[`(\w+)\.py`\]\(\w+\.py\) \| (\d+) \|"
    for name, count in re.findall(row, "\n".join(rows), re.M):
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        assert abs(int(count) - lines) <= 0.1 * lines, f"{name}.py has {lines} lines"
