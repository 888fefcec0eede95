"""Data that stays on the disk gives the batches of data in memory, in little memory, and refuses by line."""

from __future__ import annotations

import json
import os
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from tiny import byte_tokenizer

from alignment.config import SftDataConfig, SftSourceConfig
from alignment.data.files import read_file
from alignment.data.sft import load_sft_data
from alignment.data.streaming import JsonlRows, ParquetRows, open_rows

ROWS = [{"prompt": f"q{n % 90}", "completion": f"答 {n % 90}" * (1 + n % 3)} for n in range(101)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)).encode()


def write(folder, name, rows):
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    else:
        file.write_bytes(jsonl(rows))
    return str(file)


def load(tokenizer, *sources, streaming=True, **options):
    made = tuple(source if isinstance(source, SftSourceConfig) else SftSourceConfig(path=source) for source in sources)
    config = SftDataConfig(sources=made, streaming=streaming, **{"held_out": 10, **options})
    return load_sft_data(config, tokenizer, seed=5)


def test_rows_by_place_are_those_of_the_whole_file_whatever_its_line_ends(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = jsonl(ROWS[:9]).splitlines()
    file.write_bytes(
        b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n  \n" + b"\n".join(lines[1:5]) + b"\n\n" + b"\n".join(lines[5:])
    )
    expected = list(read_file(file))
    rows = JsonlRows(file)
    assert list(rows) == expected
    assert [row.where.split(":")[-1] for row in expected] == ["1", "4", "5", "6", "7", "9", "10", "11", "12"]
    assert len(rows) == 9
    assert [rows[index] for index in reversed(range(9))] == expected[::-1]
    assert list(rows) == expected  # a second pass begins again


def test_rows_of_a_parquet_file_come_by_row_group_and_few_groups_are_kept(tmp_path):
    rows = ParquetRows(tmp_path / write(tmp_path, "a.parquet", ROWS))
    assert len(rows) == 101
    assert [row.values for row in rows] == ROWS
    assert [rows[index].values for index in (100, 0, 6, 7, 50)] == [ROWS[index] for index in (100, 0, 6, 7, 50)]
    assert rows[7].where.endswith("a.parquet:row 8")
    assert len(rows._held) == 4
    first = open_rows(SftSourceConfig(path=str(rows.path), limit=9))
    assert [len(first), len(list(first))] == [9, 9]
    assert len(open_rows(SftSourceConfig(path=str(rows.path), limit=900))) == 101


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_streaming_gives_the_batches_of_data_in_memory(tmp_path, tokenizer, name):
    file = write(tmp_path, name, ROWS)
    streamed, held = load(tokenizer, file), load(tokenizer, file, streaming=False)
    assert streamed.num_examples == held.num_examples == 101 - 11 - len(held.held_out)
    steps = 3 * held.num_examples // 8 + 1
    assert [streamed.batch(step, 8) for step in range(steps)] == [held.batch(step, 8) for step in range(steps)]
    assert streamed.held_out == held.held_out
    assert streamed.fingerprint() == held.fingerprint()
    assert "streaming" in streamed.summary()
    assert "tokens" not in streamed.summary()
    assert "trained tokens" in held.summary()
    assert load(tokenizer, file).batch(17, 8) == held.batch(17, 8)


def test_streaming_mixes_files_hub_folders_and_limits_like_memory(tmp_path, tokenizer):
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub", "train.jsonl", [{"text": f"text {n}"} for n in range(30)])
    write(tmp_path, "a.jsonl", ROWS[:20])
    write(tmp_path, "b.jsonl", ROWS[20:])
    sources = [
        SftSourceConfig(path=str(tmp_path / "?.jsonl"), weight=2, limit=33),
        SftSourceConfig(hub=str(tmp_path / "hub"), weight=1),
    ]
    streamed, held = load(tokenizer, *sources), load(tokenizer, *sources, streaming=False)
    assert [streamed.batch(step, 9) for step in range(30)] == [held.batch(step, 9) for step in range(30)]
    assert streamed.num_examples + len(streamed.held_out) == 63
    plain = [source.model_copy(update={"weight": None}) for source in sources]
    assert load(tokenizer, *plain).batch(3, 9) == load(tokenizer, *plain, streaming=False).batch(3, 9)


def test_the_index_of_many_rows_is_small(tmp_path, tokenizer):
    file = tmp_path / "large.jsonl"
    with open(file, "w") as out:
        out.writelines(f'{{"prompt": "question {n}", "completion": "{n:0100d}"}}\n' for n in range(40_000))
    assert file.stat().st_size > 5e6
    load(tokenizer, write(tmp_path, "warm.jsonl", ROWS))
    tracemalloc.start()
    try:
        data = load(tokenizer, str(file))
        data.batch(1000, 8)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data.num_examples == 39_990
    assert now < 30 * 40_000
    assert peak < 100 * 40_000


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl.gz", "a.parquet.gz"])
def test_files_without_rows_to_reach_singly_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(
        ValueError, match=rf"{name}: got '.*' with data\.streaming, expected .*\.jsonl or .* convert it"
    ):
        open_rows(SftSourceConfig(path=str(tmp_path / name)))


def test_a_broken_row_is_refused_by_line_before_the_run(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(ROWS[:30]) + b'{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:31: got columns \['prompt'\], expected prompt\+completion"):
        load(tokenizer, str(file))
    file.write_bytes(b'\n{"prompt": "x", "completion": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: got half of a surrogate pair"):
        load(tokenizer, str(file))
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"data\.sources\.0: got no rows"):
        load(tokenizer, str(file))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match=r"a\.parquet: got broken parquet"):
        load(tokenizer, str(tmp_path / "a.parquet"))


def test_a_row_that_turns_out_bad_when_its_batch_comes_is_refused_by_line(tmp_path, tokenizer):
    rows = [*ROWS[:30], {"prompt": "long", "completion": "x" * 1000}]
    data = load(tokenizer, write(tmp_path, "a.jsonl", rows), held_out=0, on_long="error")
    with pytest.raises(ValueError, match=r"a\.jsonl:31: got over 512 tokens, expected at most data\.max_tokens"):
        data.batch(0, 31)

    file = tmp_path / "b.jsonl"
    data = load(tokenizer, write(tmp_path, "b.jsonl", ROWS[:30]), held_out=0)
    data.batch(0, 30)
    before = file.stat()
    broken = file.read_bytes().replace(b'"prompt"', b'prompt""')
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=r"b\.jsonl:\d+: got a file that has changed since the run began"):
        data.batch(0, 1)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as though nobody had written
    with pytest.raises(ValueError, match=r"b\.jsonl:\d+: broken JSON|b\.jsonl:\d+: got broken JSON"):
        data.batch(0, 1)


def test_in_place_of_a_row_that_is_too_long_comes_the_one_behind_it(tmp_path, tokenizer):
    rows = [{"prompt": f"q{n}", "completion": "x" * (1000 if n % 3 == 0 else 3)} for n in range(30)]
    data = load(tokenizer, write(tmp_path, "a.jsonl", rows), held_out=0, on_long="skip", max_tokens=64)
    asked = [tokenizer.decode(example.input_ids).split("\n")[1] for example in data.batch(0, 30)]
    counts = {n: asked.count(f"q{n}<|im_end|>") for n in range(30)}
    assert counts == {n: (0, 2, 1)[n % 3] for n in range(30)}
    none = load(tokenizer, write(tmp_path, "b.jsonl", rows[::3]), held_out=0, on_long="skip", max_tokens=64)
    with pytest.raises(ValueError, match=r"b\.jsonl:\d+: got 10 rows in a row of which nothing .* fits"):
        none.batch(0, 1)
