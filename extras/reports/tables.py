"""Figures and tables as Markdown and as HTML. Texts from outside become plain text in both."""

import html
import re
from dataclasses import dataclass

from extras.reports.plots import printable


@dataclass(frozen=True)
class Block:
    """A table of the report, {name: {column: figure or text}}, and the paragraphs below it."""

    title: str
    corner: str
    rows: dict
    notes: tuple = ()


def markdown(text: str, width: int = 1000) -> str:
    """Text from outside for a Markdown table: no markup, link, HTML or control character."""
    if len(text) > width:
        text = text[:width - 1] + "…"
    return re.sub(r"([\\`*_\[\]<>#|~&$:@!])", r"\\\1", printable(text))


def fixed(value: float, digits: int) -> str:
    """The number with so many digits after the point, and never "-0.0"."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def is_empty(value) -> bool:
    """Whether there is nothing to show: None, {} or a share without a mean."""
    return value is None or value == {} or (
        isinstance(value, dict) and value.get("mean", 0) is None)


def cell(value, escape=markdown) -> str:
    """A figure or a text: a share {"mean", "ci95"} in percent, a number with two digits."""
    if is_empty(value):
        return "-"
    if isinstance(value, dict) and "mean" in value:
        text = fixed(100 * value["mean"], 1)
        for name, words in (("ci95", ""), ("ci95_tasks", "tasks ")):
            if value.get(name):
                bounds = ", ".join(fixed(100 * x, 1) for x in value[name])
                text += f" {words}[{bounds}]"
        return text
    if isinstance(value, dict) and "share" in value:
        return f"{fixed(100 * value['share'], 1)} (n = {value['n']})"
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(key))} {cell(part, escape)}" for key, part in value.items())
    return fixed(value, 2) if isinstance(value, float) else escape(str(value))


def table(corner: str, rows: dict[str, dict]) -> str:
    """A Markdown table from {name: {column: figure or text}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *map(markdown, columns)], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        lines.append([markdown(name), *(cell(row.get(column)) for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Text from outside for HTML."""
    return html.escape(printable(text))


def html_table(corner: str, rows: dict[str, dict]) -> str:
    """`table` as HTML; intervals are set small."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    heads = "".join(f'<th scope="col">{plain(title)}</th>' for title in [corner, *columns])
    lines = [f"<thead><tr>{heads}</tr></thead>", "<tbody>"]
    for name, row in rows.items():
        cells = [f'<th scope="row">{plain(name)}</th>']
        for column in columns:
            value = row.get(column)
            text = cell(value, plain)
            if isinstance(value, dict) and {"mean", "share"} & value.keys():
                text = re.sub(r" (\S*\s?[\[(].*?[\])])", r" <small>\1</small>", text)
            cells.append(f"<td>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>" + "\n".join(lines) + "</tbody></table>"
