"""Tables of gigabytes: the search and the parser give what `json.load` does, in whatever way a file is formatted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.datasets import json_rows
from ditr_cache.datasets.json_rows import check_ends, rows, rows_where
from ditr_cache.errors import DataError, MissingDataError

texts = st.sampled_from(
    ["", "a", "abc", "{", "}", "}{", "},\n{", '"', "\\", 'a","token":"abc', "[1]", "é", "\u2028", "a, b", "true", "~|"]
)
scalars = st.one_of(texts, st.booleans(), st.none(), st.integers(-5, 2**60), st.floats(-1e3, 1e3))
keys = st.sampled_from(["token", "key", "other", "x}", '"key"'])
flat = st.dictionaries(keys, scalars | st.lists(scalars, max_size=3))
nested = st.dictionaries(keys, scalars | st.dictionaries(keys, scalars, max_size=2))


@st.composite
def formatted(draw: st.DrawFn, objects: st.SearchStrategy[dict[str, Any]]) -> str:
    separators = draw(st.sampled_from([None, (",", ":"), (" ,\r\n ", "\t: "), (", ", " :\n")]))
    indent = draw(st.sampled_from([None, 0, 1, "\t"]))
    table = draw(st.lists(objects, max_size=6))
    text = json.dumps(table, indent=indent, separators=separators, ensure_ascii=draw(st.booleans()))
    return text + draw(st.sampled_from(["", "\n", " \r\n\t"]))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A file, written anew by every example."""
    return tmp_path_factory.mktemp("tables") / "table.json"


@given(
    text=formatted(flat) | formatted(nested),
    wanted=st.lists(texts, max_size=3),
    chunk=st.integers(1, 90),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_it_gives_what_json_does(table, text, wanted, chunk, mark):
    table.write_bytes(mark + text.encode())
    every = json.loads(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        check_ends(table, "")
        assert list(rows(table, "")) == every
        of_token = [row for row in every if isinstance(row.get("token"), str) and row["token"] in wanted]
        assert list(rows_where(table, "token", wanted, "")) == of_token
        assert list(rows_where(table, "key", True, "")) == [row for row in every if row.get("key") is True]


@given(text=formatted(flat), data=st.data(), chunk=st.integers(1, 90))
def test_a_file_that_is_cut_is_found(table, text, data, chunk):
    whole = text.strip().encode()
    table.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    every = json.loads(text)
    found_true = [row for row in every if row.get("key") is True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        for found, of in ((rows(table, "get it"), every), (rows_where(table, "key", True, "get it"), found_true)):
            before = []
            with pytest.raises(DataError, match=r"table\.json: expected .*truncated or damaged; get it"):
                before.extend(found)
            assert before == of[: len(before)]


ROWS = [{"token": f"{i:032x}", "is_key_frame": i % 3 == 0, "filename": f"samples/a+0800__{i}.jpg"} for i in range(50)]


@pytest.mark.parametrize("indent", [None, 0, 1])
def test_a_table_as_tools_write_it_is_searched_and_not_parsed(table, monkeypatch, indent):
    table.write_text(json.dumps(ROWS, indent=indent))
    monkeypatch.setattr(json_rows, "rows", None)
    monkeypatch.setattr(json_rows, "CHUNK", 1000)
    assert list(rows_where(table, "is_key_frame", True, "")) == ROWS[::3]
    assert list(rows_where(table, "token", {f"{7:032x}", "no"}, "")) == [ROWS[7]]


@pytest.mark.parametrize(
    "content", ["", "{}", "[", "[{}", "[{},]", "[1]", "[{}] x", "[{} {}]", "[" * 9999, '[{"a": ' + "[" * 9999, "\0"]
)
def test_what_is_no_table(table, content):
    table.write_text(content)
    with pytest.raises(DataError, match=r"table\.json: expected .* at character .*; get it"):
        list(rows(table, "get it"))
    with pytest.raises(DataError, match=r"table\.json: expected .* at character .*; get it"):
        list(rows_where(table, "key", True, "get it"))


def test_a_row_is_bounded(table, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 64)
    monkeypatch.setattr(json_rows, "MAX_ROW", 500)
    table.write_bytes(b'[{"a": "' + b"x" * 5000)
    for found in (rows(table, ""), rows_where(table, "a", True, "")):
        with pytest.raises(DataError, match="expected a whole object at character 1"):
            list(found)


def test_bytes_that_are_no_text(table):
    table.write_bytes(b'[{"a": "\xff\xfe", "key": true}]')
    assert list(rows(table, "")) == list(rows_where(table, "key", True, "")) == [{"a": "\ufffd\ufffd", "key": True}]


def test_no_file(tmp_path):
    for found in (rows(tmp_path / "a.json", "get b.tgz"), rows_where(tmp_path / "a.json", "key", True, "get b.tgz")):
        with pytest.raises(MissingDataError, match=r"a\.json: no such file; get b\.tgz"):
            next(found)
    with pytest.raises(MissingDataError, match=r"a\.json: no such file; get b\.tgz"):
        check_ends(tmp_path / "a.json", "get b.tgz")
    with pytest.raises(DataError, match=r"cannot be read.*get b"):
        next(rows(tmp_path, "get b"))


def test_only_the_ends_are_looked_at(table):
    table.write_bytes(b' [ {"a": } ] \n')
    check_ends(table, "")
    for content in (b"", b"[", b'[{"a": [1]}', b"{}"):
        table.write_bytes(content)
        with pytest.raises(DataError, match=r"table\.json: expected an array, from \[ to \].*; get it"):
            check_ends(table, "get it")
