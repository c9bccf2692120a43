"""The demo's text: the language documentation that every Python carries, split without leaking.

pydoc_data.topics holds the pages behind help("for"), some 450 kB. Four in ten of its paragraphs stand on several
pages, so a split by page would test on what was trained on: paragraphs are the unit, repeats are dropped, and the
SHA-256 of a paragraph alone decides whether it is held out. That choice survives other orders and other Pythons; the
text itself differs a little between Python versions, and results with it.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.1
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class SplitText:
    """Texts to train on and texts held out, one for each page that has any; no paragraph is in both or twice.

    n_paragraphs counts the distinct ones, n_repeats those that were dropped.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    n_paragraphs: int
    n_repeats: int

    @property
    def train_bytes(self) -> int:
        """Size of the training text in UTF-8."""
        return sum(len(text.encode()) for text in self.train)

    @property
    def held_out_bytes(self) -> int:
        """Size of the held-out text in UTF-8."""
        return sum(len(text.encode()) for text in self.held_out)


def python_documentation() -> dict[str, str]:
    """{page: text} of this Python's own documentation. Raises OSError for a Python that was stripped of it."""
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        raise OSError(
            "this Python lacks pydoc_data.topics, the documentation behind help('for') that the demo trains on: "
            "use a complete Python (on Debian and Ubuntu: the package libpython3-stdlib)"
        ) from None


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines, indentation kept and trailing spaces dropped; empty ones are left out."""
    return [part for part in (p.strip("\n").rstrip() for p in _BLANK_LINES.split(text)) if part]


def is_held_out(paragraph: str, share: float = HELD_OUT_SHARE) -> bool:
    """True for about `share` of all paragraphs: those whose SHA-256, as a fraction of its range, is below it.

    Indentation does not count, so that a paragraph quoted deeper on another page goes to the same side.
    """
    return _hash_fraction(_words(paragraph)) < share


def split_pages(pages: Mapping[str, str], share: float = HELD_OUT_SHARE) -> SplitText:
    """The pages in order of their names, each paragraph kept where it first occurs and put on its side."""
    seen: set[str] = set()
    sides: tuple[list[str], list[str]] = ([], [])
    n_repeats = 0
    for name in sorted(pages):
        parts: tuple[list[str], list[str]] = ([], [])
        for paragraph in paragraphs(pages[name]):
            if _words(paragraph) in seen:
                n_repeats += 1
                continue
            seen.add(_words(paragraph))
            parts[is_held_out(paragraph, share)].append(paragraph)
        for side, kept in zip(sides, parts, strict=True):
            if kept:
                side.append("\n\n".join(kept))
    return SplitText(train=tuple(sides[0]), held_out=tuple(sides[1]), n_paragraphs=len(seen), n_repeats=n_repeats)


def transfer_texts(texts: Iterable[str], share: float) -> tuple[str, ...]:
    """About `share` of the texts, by the SHA-256 of each: what the teacher is asked about and the students learn."""
    return tuple(text for text in texts if _hash_fraction(text) < share)


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """Writes one {"text": ...} a line, which is what `logitstore collect` reads, and returns the path."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _hash_fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())
