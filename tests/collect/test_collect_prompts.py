"""Datasets are read, and each thing that can be wrong with one is said in one line that names the place."""

import errno
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logitstore_trainer.collect.prompts import read_dataset


def write(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def columns_of(dataset, start=0):
    return [row.columns for row in dataset.rows(start)]


def test_text_rows_are_read_with_their_place(tmp_path):
    path = write(tmp_path, jsonl({"text": "one", "id": 7}, {"text": "two"}))
    dataset = read_dataset(path)
    assert (dataset.shape, dataset.n_rows) == ("text", 2)
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert columns_of(dataset) == [{"text": "one"}, {"text": "two"}]
    assert [(row.source_row, row.where) for row in dataset.rows()] == [(0, f"{path}:1"), (1, f"{path}:2")]


def test_bom_crlf_and_blank_lines_are_tolerated(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \r\n{"text": "b\\u2028c"}\r\n\r\n\r\n')
    dataset = read_dataset(path)
    assert columns_of(dataset) == [{"text": "a"}, {"text": "b\u2028c"}]
    assert [(row.source_row, row.where) for row in dataset.rows()] == [(0, f"{path}:1"), (1, f"{path}:4")]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_rows_can_start_anywhere(tmp_path, start):
    path = write(tmp_path, '{"text": "a\u00e9"}\n\n{"text": "b"}\n{"text": "c"}')
    rows = list(read_dataset(path).rows(start))
    assert [row.columns["text"] for row in rows] == ["a\u00e9", "b", "c"][start:]
    assert [row.source_row for row in rows] == [0, 1, 2][start:]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3", f"{path}:4"][start:]


def test_text_file_is_one_document_a_line(tmp_path):
    dataset = read_dataset(write(tmp_path, "first\n\n second line \n", "data.txt"))
    assert columns_of(dataset) == [{"text": "first"}, {"text": " second line "}]


def test_shapes_are_told_apart_by_their_columns(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    cases = [
        ({"prompt": "p", "completion": "c"}, "prompt+completion", {"prompt": "p", "completion": "c"}),
        ({"prompt": "p", "prompt_id": "x", "messages": talk}, "messages", {"messages": talk}),
        ({"prompt": "p", "answer": "c"}, "prompt", {"prompt": "p"}),
        ({"prompt": "p", "text": "t"}, "text", {"text": "t"}),
    ]
    for row, shape, columns in cases:
        dataset = read_dataset(write(tmp_path, jsonl(row)))
        assert dataset.shape == shape
        assert columns_of(dataset) == [columns]


def test_tool_turns_and_tool_calls_are_kept(tmp_path):
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": "{}"}]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "4"},
    ]
    dataset = read_dataset(write(tmp_path, jsonl({"messages": talk, "tools": [{"name": "add"}]})))
    assert columns_of(dataset) == [{"messages": talk, "tools": [{"name": "add"}]}]


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
@pytest.mark.parametrize("content", ["", " \n"])
def test_what_is_not_learned_may_be_empty(tmp_path, role, content):
    talk = [{"role": role, "content": content}, USER, ASSISTANT]
    assert columns_of(read_dataset(write(tmp_path, jsonl({"messages": talk})))) == [{"messages": talk}]


@pytest.mark.parametrize("completion", ["", " \n"])
def test_an_empty_completion_refuses_no_data_set(tmp_path, completion):
    rows = [{"prompt": "p", "completion": completion}, {"prompt": "p", "completion": "c"}]
    assert columns_of(read_dataset(write(tmp_path, jsonl(*rows)))) == rows


@pytest.mark.parametrize("start", [0, 1, 2, 4, 6])
def test_parquet_rows(tmp_path, start):
    path = tmp_path / "data.parquet"
    table = pa.table({"prompt": list("abcdef"), "completion": list("uvwxyz"), "n": range(6)})
    pq.write_table(table, path, row_group_size=2)
    dataset = read_dataset(path)
    assert (dataset.shape, dataset.n_rows) == ("prompt+completion", 6)
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    rows = list(dataset.rows(start))
    assert [row.columns["completion"] for row in rows] == list("uvwxyz")[start:]
    assert [row.source_row for row in rows] == list(range(6))[start:]


def test_parquet_messages_lose_the_keys_that_other_messages_have(tmp_path):
    path = tmp_path / "data.parquet"
    talk = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "ho", "name": "bot"},
    ]
    pq.write_table(pa.table({"messages": [talk]}), path)
    assert columns_of(read_dataset(path)) == [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho", "name": "bot"},
            ]
        }
    ]


GOOD = jsonl({"text": "fine"})
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
BAD_FILES = {
    "truncated JSON": (
        GOOD + '{"text": "un\n',
        ":2: malformed JSON at column 10",
        "one JSON object per line",
    ),
    "JSON array": ('[{"text": "a"}]\n', ":1: got a list", "one JSON object per line"),
    "spread JSON array": ('[\n{"text": "a"}\n]\n', ":1: malformed JSON", "jq -c '.[]'"),
    "indented JSON": ('{\n "text": "a"\n}\n', ":1: malformed JSON", "jq -c ."),
    "number": ("3\n", ":1: got a number (3)", "one JSON object per line"),
    "huge number": ('{"text": ' + "1" * 5000 + "}\n", ":1: JSON that cannot be read", "object of strings"),
    "deep JSON": ("[" * 200_000 + "\n", ":1:", "JSON"),
    "null text": (GOOD + "\n" + jsonl({"text": None}), ":3: `text` is null", "expected a string"),
    "non-string text": (GOOD + jsonl({"text": 17}), ":2: `text` is a number (17)", "expected a string"),
    "list text": (jsonl({"text": ["a"]}), ':1: `text` is a list (["a"])', "expected a string"),
    "empty text": (GOOD + jsonl({"text": " \n"}), ":2: `text` is empty", "remove the row"),
    "null completion": (jsonl({"prompt": "p", "completion": None}), ":1: `completion` is null", "string"),
    "surrogate": ('{"text": "a\\ud800"}\n', ":1: `text` holds half of a surrogate pair (\\ud800)", "correct"),
    "no known column": (
        jsonl({"question": "q", "answer": "a"}),
        ":1: found columns `question`, `answer`",
        "expected `text`, `prompt` and `completion`, `messages`, or `prompt` alone",
    ),
    "mixed shapes": (
        GOOD + jsonl({"prompt": "p", "completion": "c"}),
        ":2: this row is `prompt+completion`, but",
        "is `text`; put rows of different shapes into different files",
    ),
    "missing completion": (
        jsonl({"prompt": "p", "completion": "c"}, {"prompt": "p"}),
        ":2: this row is `prompt`, but",
        "different files",
    ),
    "messages string": (jsonl({"messages": "hi"}), ':1: `messages` is a string ("hi")', "list of turns"),
    "no assistant": (jsonl({"messages": [USER]}), ":1: `messages` has no assistant turn", "add one"),
    "message string": (jsonl({"messages": ["hi"]}), ":1: messages[0] is a string", "role and content"),
    "bad role": (
        jsonl({"messages": [USER, {"role": "gpt", "content": "x"}]}),
        ":1: messages[1] has role 'gpt'",
        "expected one of system, developer, user, assistant, tool",
    ),
    "no content": (
        jsonl({"messages": [USER, {"role": "assistant", "value": "x"}]}),
        ":1: messages[1]",
        "role, value",
    ),
    "null content": (
        jsonl({"messages": [USER, {**ASSISTANT, "content": None}]}),
        "messages[1].content is null",
        "",
    ),
    "empty content": (
        jsonl({"messages": [USER, {**ASSISTANT, "content": " "}]}),
        "messages[1].content is empty",
        "remove the row",
    ),
    "null system message": (
        jsonl({"messages": [{"role": "system", "content": None}, USER, ASSISTANT]}),
        "messages[0].content is null",
        "expected a string",
    ),
    "numeric completion": (jsonl({"prompt": "p", "completion": 3}), ":1: `completion` is a number (3)", "string"),
    "empty prompt": (jsonl({"prompt": "", "completion": "c"}), ":1: `prompt` is empty", "remove the row"),
    "empty file": ("", "the dataset is empty", "at least one row"),
    "blank file": ("\n \n\r\n", "the dataset is empty", "at least one row"),
    "latin-1": (GOOD.encode() + b'{"text": "caf\xe9"}\n', ":2: not UTF-8 (byte 0xe9 at position 13", "UTF-8"),
    "utf-16": (GOOD.encode("utf-16"), ":1: not UTF-8 (byte 0xff at position 0", "convert the file to UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, kind):
    content, *expected = BAD_FILES[kind]
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        read_dataset(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for part in expected:
        assert part in message


def test_bad_parquet_files(tmp_path):
    path = write(tmp_path, b"PAR1 but no more", "data.parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file") as caught:
        read_dataset(path)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"data.parquet:row 1: `text` is null, expected a string"):
        read_dataset(path)
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match=r"data.parquet: found columns `body`; expected `text`"):
        read_dataset(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match="the dataset is empty"):
        read_dataset(path)


def test_places_that_are_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such dataset file; check --dataset"):
        read_dataset(tmp_path / "absent.jsonl")
    with pytest.raises(IsADirectoryError, match="is a directory; name one file"):
        read_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"unknown file type '.csv'; expected one of .jsonl"):
        read_dataset(write(tmp_path, "a,b", "data.csv"))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)

    def refused(self, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(PermissionError, match=r"data.jsonl: not readable \(Permission denied\); check its permissions"):
        read_dataset(path)


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path):
    path = write(tmp_path, GOOD + GOOD)
    dataset = read_dataset(path)
    write(tmp_path, GOOD + jsonl({"prompt": "p"}))
    with pytest.raises(ValueError, match="the file changed while it was being read"):
        list(dataset.rows())
