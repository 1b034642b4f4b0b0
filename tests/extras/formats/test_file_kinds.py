"""Files of every kind give the same rows; each wrong sibling is refused in a sentence."""

import builtins
import csv
import io
import json
import random

import pytest

from extras.formats import read_candidates, read_corpus, read_examples, read_judged
from extras.formats.rows import load_rows

ROWS = [{"instruction": "name it, \"quick\"\nplease", "input": "café", "output": "red; or\tblue"},
        {"instruction": "say a name", "input": "", "output": " tom\u2028anna"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)


def as_table(delimiter, end="\n"):
    """ROWS with a line of names."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


@pytest.mark.parametrize("name, blob", [
    ("a.json", LIST.encode()), ("a.jsonl", LINES.encode()), ("a.txt", LINES.encode()),
    ("a.json", b"\xef\xbb\xbf" + LIST.encode()), ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    ("a.jsonl", ("\n" + LINES.replace("\n", "\r\n\n \r\n")).encode()),
    ("a.json", LIST.encode("utf-16")), ("a.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
    ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
    ("a.json", json.dumps({"data": ROWS}, indent=2).encode()),
    ("a.csv", as_table(",").encode()), ("a.csv", as_table(";", "\r\n").encode("utf-8-sig")),
    ("a.csv", as_table(",").encode("utf-16")), ("a.TSV", as_table("\t").encode())])
def test_a_file_of_any_kind_gives_the_same_rows(name, blob, tmp_path):
    (tmp_path / name).write_bytes(blob)
    assert load_rows(tmp_path / name) == ROWS
    assert read_examples(tmp_path / name) == (ROWS, {})


@pytest.mark.parametrize("indent", [None, 1])
def test_a_single_object_is_a_file_of_one_record(indent, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=indent))
    assert read_examples(tmp_path / "a.json") == (ROWS[:1], {})


def test_parquet_is_read_with_pyarrow(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [ROWS[0] | {"messages": None}, ROWS[1]]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
    parquet.write_table(arrow.Table.from_pylist([*rows, {"messages": turns}]), path)
    assert read_examples(path) == ([*ROWS, {"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], {})
    path.rename(tmp_path / "train")  # its first bytes tell
    assert len(load_rows(tmp_path / "train")) == 3
    path.write_bytes((tmp_path / "train").read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file that can be read"):
        load_rows(path)
    real = builtins.__import__

    def without_pyarrow(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ValueError) as caught:
        load_rows(path)
    assert str(caught.value) == (
        f"{path} is read with pyarrow, which is not installed. Type: pip install pyarrow")


@pytest.mark.parametrize("name, blob, sentence", [
    ("a.json", LIST.encode("latin-1", "replace"),
     "a.json is not in UTF-8: line 1 has the byte 0xe9. If its encoding is Latin-1 or Windows-1252"
     ", convert it: iconv -f WINDOWS-1252 -t UTF-8 a.json > utf8-a.json"),
    ("a.csv", as_table(",").encode("latin-1", "replace"),
     "a.csv is not in UTF-8: line 3 has the byte 0xe9. If its encoding is Latin-1"),
    ("a.json", LIST.encode("utf-16")[:-1], "a.json is not in UTF-16: line"),
    ("a.txt", as_table(",").encode(), 'a.txt begins with "instruction,input,output\\n\\"name", '
     "which is no list or object of JSON. Tables are read from a FILE.csv, FILE.tsv or "
     "FILE.parquet."),
    ("a.json", LIST[:-9].encode(), "a.json is not JSON: "),
    ("a.jsonl", LINES[:-9].encode(), "a.jsonl, line 2, is not JSON: "),
    ("a.csv", b'instruction,output\na,b\nc,d,e\n', "a.csv, record 1 has 3 columns, and the first "
     "line names 2 (instruction, output). Put texts that hold ',' or a line break in double"),
    ("a.csv", b'instruction,output\na,"b\n', "a.csv, line 2, is no line of a table: unexpected end "
     "of data. Expected texts in double quotes, and two of them for one in a text."),
    ("a.csv", b"question,answer\na,b\n", "a.csv, record 0: it has the fields question, answer. "
     "Expected {instruction, input, output} (with system and history, if any), {messages}, "
     "{conversations}, or {prompt, completion}."),
    ("a.csv", b"instruction,output\n", "a.csv holds no list of records. Expected a JSON list, JSON "
     "Lines, CSV, TSV or Parquet of"), ("a.csv", b"", "a.csv holds no list of records."),
    ("a.json", b'{"data": []}', "a.json holds no list of records.")])
def test_a_file_that_cannot_be_read_is_refused_by_name(name, blob, sentence, tmp_path):
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(ValueError) as caught:
        read_examples(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{sentence}")
    assert "\n" not in str(caught.value)


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    rng, blobs = random.Random(0), {"csv": as_table(",").encode(), "tsv": as_table("\t").encode(),
                                    "json": LIST.encode("utf-16")}
    for _ in range(300):
        kind = rng.choice(list(blobs))
        blob, path = bytearray(blobs[kind]), tmp_path / f"a.{kind}"
        for _ in range(rng.choice((1, 3))):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        path.write_bytes(blob[:rng.choice((None, rng.randrange(len(blob))))])
        try:
            read_examples(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_tables_hold_numbers_and_empty_cells_where_these_are_meant(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\nq,a,True\nq,b,0\n")
    assert [row["reward"] for row in read_candidates(path)] == [1, 0]
    path.write_text("prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,8,3.5\n")
    assert [row["reward"] for row in read_candidates(path)] == [8, 3.5]
    path.write_text("prompt,chosen,rejected,score_chosen\nq,a,b,many\n")
    with pytest.raises(ValueError, match='record 0: field "score" is "many". Expected a number.'):
        read_candidates(path)
    path.write_text("instruction,input,output,judgment\na,,c,\nb,x,d,Wrong.\n")
    assert [row["judgment"] for row in read_judged(path)] == [None, "Wrong."]


def test_a_corpus_may_have_a_mark_and_blank_lines(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf[["a", true]]\n\n[["b", false]]\n')
    assert read_corpus(tmp_path / "c.jsonl") == [[["a", True]], [["b", False]]]
