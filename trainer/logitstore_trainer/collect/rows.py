"""What a row of a dataset may be, and the check of one row.

The shapes, in the order in which they are looked for; other columns are ignored:

  messages             [{"role": "system"|"user"|"assistant"|"tool", "content": str}, ...], optionally `tools`
  prompt + completion  two strings
  text                 one string
  prompt               one string, to be completed by the teacher

What is to be read must not be empty: a text, a prompt, an assistant's turn. A completion may be (its row gives no
sample, see tokenise.py), and so may what others say in a conversation, which is rendered as it stands.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = "`text`, `prompt` and `completion`, `messages`, or `prompt` alone"


@dataclass(frozen=True)
class Row:
    """One checked row: its number in the dataset (from 0, blank lines not counted), "path:line", columns."""

    source_row: int
    where: str
    columns: Mapping[str, Any]


def shape_of(value: Any, where: str) -> str:
    """Returns the first of SHAPES whose columns are all in `value`. Raises ValueError if none is."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_described(value)}, expected one JSON object per line with {EXPECTED}")
    for shape, columns in SHAPES.items():
        if all(column in value for column in columns):
            return shape
    found = ", ".join(f"`{name}`" for name in value) or "none"
    raise ValueError(f"{where}: found columns {found}; expected {EXPECTED}; rename the columns")


def checked_row(source_row: int, where: str, value: Any, shape: str) -> Row:
    """Returns `value` as a Row of the given shape. Raises ValueError, naming `where`, if it is not one."""
    if shape_of(value, where) != shape:
        raise ValueError(f"{where}: expected a `{shape}` row; the file changed while it was being read")
    columns: dict[str, Any] = {}
    for name in SHAPES[shape]:
        if name == "messages":
            columns[name] = _checked_messages(value[name], where)
        else:
            columns[name] = _checked_text(value[name], f"{where}: `{name}`", may_be_empty=name == "completion")
    if shape == "messages" and value.get("tools"):
        columns["tools"] = value["tools"]
    return Row(source_row, where, columns)


def _checked_text(text: Any, what: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} is {_described(text)}, expected a string; correct or remove the row")
    if not may_be_empty and not text.strip():
        raise ValueError(f"{what} is empty; correct or remove the row")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which no tokenizer "
                f"reads; correct or remove the row"
            ) from None
    return text


def _checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise ValueError(f"{where}: `messages` is {_described(messages)}, expected a list of turns")
    checked = []
    for i, message in enumerate(messages):
        what = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{what} is {_described(message)}, expected an object with role and content")
        # Parquet gives every message every key that any message has
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{what} has role {role!r}, expected one of {', '.join(ROLES)}; correct the row")
        content = message.get("content")
        if not (message.get("tool_calls") and content in (None, "")):
            if "content" not in message:
                raise ValueError(f"{what} has no content, only {', '.join(message)}; correct the row")
            _checked_text(content, f"{what}.content", may_be_empty=role != "assistant")
        checked.append(message)
    if not any(message["role"] == "assistant" for message in checked):
        raise ValueError(f"{where}: `messages` has no assistant turn to learn; add one or remove the row")
    return checked


def _described(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, default=str)
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
    kind = kinds.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)
    return f"{kind} ({text[:40]}{'...' if len(text) > 40 else ''})"
