"""F34: every broken row is refused by file and line; what is only unusual is read."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from alignment.config import SourceConfig
from alignment.data.files import MAX_LINE_BYTES
from alignment.data.sources import Row, column, read_rows

ROWS = [{"question": "How is hypertension treated?", "n": 1}, {"question": "高血压怎么治疗？", "n": 2}]


def values(path, **options):
    return [row.values for row in read_rows(SourceConfig(path=str(path), **options))]


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path, gz):
    assert values(write(tmp_path / f"a.jsonl{gz}", jsonl(ROWS))) == ROWS
    assert values(write(tmp_path / f"a.json{gz}", json.dumps(ROWS).encode())) == ROWS
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    assert values(write(tmp_path / f"a.parquet{gz}", table.getvalue().to_pybytes())) == ROWS
    text = "question,n\r\n" + "".join(f'"{row["question"]}",{row["n"]}\r\n' for row in ROWS)
    assert values(write(tmp_path / f"a.csv{gz}", text.encode())) == [{**row, "n": str(row["n"])} for row in ROWS]


def test_mark_crlf_and_blank_lines_are_fine_and_lines_still_count(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \r\n{"a": 2}\r\n\r\n')
    rows = read_rows(SourceConfig(path=str(file)))
    assert rows == [Row({"a": 1}, f"{file}:1"), Row({"a": 2}, f"{file}:4")]


def test_last_line_needs_no_line_end(tmp_path):
    assert values(write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2}')) == [{"a": 1}, {"a": 2}]


def test_quoted_csv_cells_may_hold_line_breaks_and_commas(tmp_path):
    file = write(tmp_path / "a.csv", b'a,b\n"x\ny","1,5"\n\nz,2\n')
    rows = read_rows(SourceConfig(path=str(file)))
    assert [row.values for row in rows] == [{"a": "x\ny", "b": "1,5"}, {"a": "z", "b": "2"}]
    assert [row.where for row in rows] == [f"{file}:3", f"{file}:5"]


def test_glob_reads_in_order_of_name_and_limit_counts_over_files(tmp_path):
    for name, start in (("b", 3), ("a", 0), ("c", 6)):
        write(tmp_path / f"{name}.jsonl", jsonl({"n": n} for n in range(start, start + 3)))
    assert [v["n"] for v in values(tmp_path / "*.jsonl")] == list(range(9))
    assert [v["n"] for v in values(tmp_path / "*.jsonl", limit=4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "where", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2", "broken JSON at column"),
        ("a.jsonl", b'{"a": 1}\n\n[1, 2]\n', ":3", "got a JSON list, expected an object"),
        ("a.jsonl", b'{"a": 1}\n"text"\n', ":2", "got a JSON str"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\x00"}\n', ":2", "NUL byte"),
        ("a.jsonl", b'{"a": "\\u0000"}\n', ":1", "NUL character"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff\xfe"}\n', ":2", "bytes at column 8 that are no UTF-8"),
        ("a.jsonl", b'{"a": {"b": ["\\ud800"]}}\n', ":1", "half of a surrogate pair"),
        ("a.jsonl", b'{"a": NaN}\n', ":1", "got NaN, which is not JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", ":1", "nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a": "' + b"x" * MAX_LINE_BYTES + b'"}\n', ":2", "over 10,000,000 bytes"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", ":1", "got an integer of 5,000 digits"),
        ("a.json", b'[{"a": 1}, 3]', ":row 2", "got a JSON int"),
        ("a.json", b'{"a": 1}', "", "expected a list of rows"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "", "broken JSON at line 2"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3", "got 3 cells, expected 2"),
        ("a.csv", b"a,a\n1,2\n", ":1", "expected different names"),
        ("a.csv", b'a,b\n1,"2\n', ":2", "broken CSV"),
        ("a.parquet", b"PAR1 no table", ":row 1", "broken parquet"),
        ("a.txt", b"text", "", "got suffix '.txt', expected one of"),
    ],
)
def test_broken_rows_name_their_place_and_the_remedy(tmp_path, name, content, where, reason):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=r".*; .*") as caught:
        values(file)
    assert str(caught.value).startswith(f"{file}{where}: ")
    assert reason in str(caught.value)


def test_all_rows_of_a_json_list_may_stand_in_one_line(tmp_path):
    rows = [{"text": "x" * (MAX_LINE_BYTES // 2)}] * 3
    assert values(write(tmp_path / "a.json", json.dumps(rows).encode())) == rows


def test_cut_off_gz_is_refused_though_its_first_rows_are_whole(tmp_path):
    whole = gzip.compress(jsonl({"n": n, "text": str(n) * 50} for n in range(5000)))
    file = tmp_path / "a.jsonl.gz"
    for content in (whole[: len(whole) // 2], whole[:-4], b"no gz at all"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: got a \.gz that is cut off or damaged"):
            values(file)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_source_without_rows_is_refused(tmp_path, name, content):
    with pytest.raises(ValueError, match="got no rows, expected at least one"):
        values(write(tmp_path / name, content))


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match="matches no file, expected at least one; correct the path"):
            values(path)
    with pytest.raises(ValueError, match=r"got folder .* expected a file or a glob"):
        values(tmp_path)


def test_unknown_asset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'treatment-plans'"):
        read_rows(SourceConfig(asset="treatment-plan"))
    with pytest.raises(ValueError, match="expected one of"):
        read_rows(SourceConfig(asset="smollm2-135m-instruct"))  # a model, not a table


def test_hub_data_set_from_a_local_folder(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(ROWS))
    rows = read_rows(SourceConfig(hub=str(tmp_path)))
    assert [row.values for row in rows] == ROWS
    assert rows[1].where.endswith("[train]:row 2")
    with pytest.raises(ValueError, match=r"split 'test', which could not be loaded .*Unknown split"):
        read_rows(SourceConfig(hub=str(tmp_path), hub_split="test"))


def test_missing_column_names_the_nearest_and_the_place():
    row = Row({"Question": "x", "empty": None}, "f.jsonl:7")
    with pytest.raises(ValueError, match=r"f\.jsonl:7: 'question': got no such column.*did you mean 'Question'"):
        column(row, "question")
    with pytest.raises(ValueError, match=r"'empty': got null"):
        column(row, "empty")
    assert column(row, "Question") == "x"
