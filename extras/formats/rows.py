"""Files of records, whatever their kind, as rows: JSON, JSON Lines, CSV, TSV and Parquet.

All readers raise ValueError that names the file and the record or line.
"""

import csv
import io
import json
from pathlib import Path

from extras.formats.checks import check, name_fields, reading, refuse, show

LONGEST_TEXT = 4 * 10**6  # characters; sentencepiece takes some hundred bytes for each
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# What columns of a table hold other than texts: numbers, and what may be absent.
NUMBERS = {"label", "probability", "reward", "score", "score_chosen", "score_rejected", "weight"}
ABSENT = NUMBERS | {"i_ans", "judgment", "refinement", "target", "targets"}


def read_rows(path, what: str, read=dict) -> list[tuple]:
    """[(what `read` makes of an object, "FILE, record N"), ...] of the objects in a file."""
    path = Path(path)
    refuse(not path.exists(), f"{path} does not exist. Give a file of {what}.")
    rows, found = load_rows(path), []
    refuse(not rows, f"{path} holds no list of records. Expected a JSON list, JSON Lines, CSV, TSV "
           f"or Parquet of {what}.")
    for number, row in enumerate(rows):
        where = f"{path}, record {number}"
        check(row, {}, where)
        longest = max((len(text) for text in row.values() if isinstance(text, str)), default=0)
        refuse(longest > LONGEST_TEXT, f"{where} holds a text of {longest:,} characters. Expected "
               f"at most {LONGEST_TEXT:,}. Remove the record.")
        with reading(where, what):
            found.append((read(row), where))
    return found


def load_rows(path: Path) -> list:
    """The values that a file lists; its kind shows in its name, or in how it begins."""
    kind = path.suffix.lower()
    with open(path, "rb") as file:
        begins = file.read(4)
    if kind == ".parquet" or begins == b"PAR1":
        return read_parquet(path)
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        return read_table(text, path)
    begins = text.lstrip()[:1]
    refuse(begins not in ("", "[", "{"), f"{path} begins with {show(text[:30])}, which is no list "
           "or object of JSON. Tables are read from a FILE.csv, FILE.tsv or FILE.parquet.")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if begins == "[":
            raise ValueError(f"{path} is not JSON: {error}.") from None
        return read_lines(text, path)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return whole["data"]
    return whole if isinstance(whole, list) else [whole]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 if its first bytes say so."""
    blob, name = path.read_bytes(), "utf-8"
    for mark, marked in MARKS.items():
        if blob.startswith(mark):
            name = marked
    try:
        return blob.decode(name)
    except UnicodeDecodeError as error:
        line = blob.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not in {name.upper()}: line {line} has the byte "
                         f"0x{blob[error.start]:02x}. If its encoding is Latin-1 or Windows-1252, "
                         f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > "
                         f"utf8-{path.name}") from None


def read_lines(text: str, path: Path) -> list:
    """The JSON value of each line that is not blank."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may stand in a text
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Fix or delete that "
                             "line.") from None
    return found


def read_table(text: str, path: Path) -> list[dict]:
    """The rows of a table in CSV or TSV, whose first line names the columns."""
    delimiter = "\t"
    if path.suffix.lower() == ".csv":  # some programs write semicolons
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
    csv.field_size_limit(2 * LONGEST_TEXT)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [row for row in lines if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}, is no line of a table: {error}. Expected "
                         "texts in double quotes, and two of them for one in a text.") from None
    found, columns = [], rows[0] if rows else []
    for number, row in enumerate(rows[1:]):
        refuse(len(row) != len(columns), f"{path}, record {number} has {len(row)} columns, and the "
               f"first line names {len(columns)} ({name_fields(columns)}). Put texts that hold "
               f"{delimiter!r} or a line break in double quotes.")
        cells = zip(columns, row, strict=True)
        found.append({name: read_cell(name, cell) for name, cell in cells})
    return found


def read_cell(name: str, cell: str):
    """The value of a cell: a text, or a number, true or false where the column is one of those."""
    if name in ABSENT and not cell:
        return None
    if name in NUMBERS:
        try:
            return json.loads(cell.strip().lower())
        except ValueError:
            return cell  # which is refused where the column is read
    return cell


def read_parquet(path: Path) -> list[dict]:
    """The rows of a Parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is read with pyarrow, which is not installed. Type: pip install "
                         "pyarrow") from None
    try:
        with ParquetFile(path) as file:
            return file.read().to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"{path} is not a Parquet file that can be read ({reason}).") from None
