"""report.html: one file with all questions, to sort, filter and search. It needs no network.

The page is page.html, page.css, table.js and page.js put together. Tables are made here, so that
they are there without a script; the questions go in as JSON. The page's policy (CSP) allows this
one script and this one style sheet by their hashes, images that are in the file, and nothing else.
"""

import base64
import hashlib
import json
import re
import string
from pathlib import Path

from extras.reports.agreement import rank_wordings, styles_of
from extras.reports.tables import Block, html_table, plain

HERE = Path(__file__).parent
PLOTS = "<!-- plots -->"  # no text from outside can hold this: < is always escaped


def write_page(folder: Path, about: str, blocks: list[Block], names: list[str],
               questions: list[dict]) -> None:
    """Write report.html.

    about: HTML; names: the models; questions: those of agreement.match_questions.
    """
    css = (HERE / "page.css").read_text(encoding="utf-8")
    parts = [HERE / name for name in ("table.js", "page.js")]
    script = "\n".join(part.read_text(encoding="utf-8") for part in parts)
    template = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    policy = (f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(css)}'; "
              "img-src data:; base-uri 'none'; form-action 'none'")
    text = template.substitute(
        policy=policy, css=css, script=script, about=about, plots=PLOTS + PLOTS,
        blocks="\n".join(map(section, blocks)), data=json_block(page_data(names, questions)))
    (folder / "report.html").write_text(text, encoding="utf-8")
    embed_plots(folder)


def digest(text: str) -> str:
    """The hash of an inline script or style sheet, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def section(block: Block) -> str:
    """A block as HTML."""
    name = block.title.lower().replace(" ", "-")
    notes = "".join(f"<p>{plain(note)}</p>" for note in block.notes)
    return (f'<section id="{name}"><h2>{plain(block.title)}</h2>'
            f'<div class="wide" tabindex="0" role="region" aria-label="{plain(block.title)}">'
            f"{html_table(block.corner, block.rows)}</div>{notes}</section>")


def json_block(value) -> str:
    r"""JSON in ASCII that can stand in a script element: < is written as \u003c, as > and & are."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def embed_plots(folder: Path) -> None:
    """Put the plots that are under the folder into its report.html, if there is one.

    train.py draws its curves after the page was written, and calls this again.
    """
    path, images = folder / "report.html", []
    if not path.exists():
        return
    found = sorted(folder.glob("plots/*.png"))
    if (folder / "log.jsonl").exists():  # a run, which holds its earlier stages
        found += sorted(set(folder.rglob("plots/*.png")).difference(found))
    for image in found:
        name = image.relative_to(folder).as_posix().replace("plots/", "").removesuffix(".png")
        if name != "question":  # the page shows all questions
            code = base64.b64encode(image.read_bytes()).decode()
            images.append(f'<figure><figcaption>{plain(name)}</figcaption><img alt="{plain(name)}" '
                          f'src="data:image/png;base64,{code}"></figure>')
    made = PLOTS + "\n".join(images) + PLOTS
    text = re.sub(f"{PLOTS}.*{PLOTS}", lambda _: made, path.read_text(encoding="utf-8"),
                  flags=re.S)
    path.write_text(text, encoding="utf-8")


# ----- The data of the page -----
class Interned:
    """A list in which equal values stand once; calling it with a value gives its place."""

    def __init__(self):
        self.values, self.places = [], {}

    def __call__(self, value) -> int:
        """The place of the value, which is added where it is new."""
        place = self.places.setdefault(value, len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place


def page_data(names: list[str], questions: list[dict]) -> dict:
    """What page.js reads. Texts are places in "strings"; lists of texts are places in "lists"."""
    strings, lists, found, wordings = Interned(), Interned(), [], []

    def text_list(texts):
        return lists(tuple(map(strings, texts)))

    for rows in questions:
        first, models = next(iter(rows.values())), []
        for name in names:
            models.append(None)
            if row := rows.get(name):
                styles = [style for style in styles_of(row) if style is not None]
                models[-1] = {
                    "wordings": text_list(row["wordings"]), "styles": text_list(styles),
                    "responses": [strings(text) for text in row["responses"]],
                    "cluster": row["cluster"], "cr": rounded(row["cr"]),
                    "correct": [None if x is None else int(x) for x in row["correct"]],
                    "mcr": rounded(row["mcr"])}
        found.append({"task": strings(first["task"]), "id": strings(str(first.get("id") or "")),
                      "input": strings(first["input"]), "targets": text_list(first["targets"]),
                      "models": models})
    for entry in rank_wordings(questions):
        shares = [entry["models"].get(name) for name in names]
        wordings.append({
            "task": strings(entry["task"]), "wording": strings(entry["wording"]),
            "style": strings(entry["style"] or ""),
            "shares": [share and [rounded(share["share"]), share["n"]] for share in shares]})
    return {"names": names, "questions": found, "ranking": wordings, "lists": lists.values,
            "strings": strings.values}


def rounded(value: float | None) -> float | None:
    """The share with four digits, which is what the page shows."""
    return None if value is None else round(value, 4)
