"""Rows of a dataset into token sequences with a loss mask: what the student should learn is marked.

One rule a shape:

  text               the document and a closing EOS, all learned, cut into windows of at most `max_length`.
  prompt+completion  tokenised apart, as a model meets them when it is used; the completion and a closing EOS are
                     learned. A completion that does not fit is truncated (then it has no EOS), a row whose prompt
                     leaves no room for one learned token is skipped, and so is one whose completion is empty: the EOS
                     alone would teach the student to say nothing.
  messages           the tokenizer's chat template, see chat.py; too long is truncated, as above.

Windows of a text overlap by one token. The first token of a window has no prediction, so without the overlap one
token per window would have no row in the store; with it every token of a document but its very first has exactly
one. If the tokenizer puts a BOS before a text, every window begins with it (teachers that lean on it, Gemma and
Llama 3, are badly off without) and the repeated token is context only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitstore_trainer.collect.chat import ChatTokeniser
from logitstore_trainer.collect.rows import Row


@dataclass(frozen=True)
class TokenisedSample:
    """input_ids [L] int32 with L >= 2, and loss_mask [L] bool: True where that token is to be learned.

    loss_mask[0] is always False, since nothing predicts the first token, and at least one other is True.
    """

    source_row: int
    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass
class Counts:
    """What became of the rows. `windows` are the samples that came from texts longer than one window."""

    rows: int = 0
    samples: int = 0
    windows: int = 0
    truncated: int = 0
    prompt_too_long: int = 0
    empty_completion: int = 0
    too_short: int = 0
    tokens: int = 0
    learned_tokens: int = 0

    def add(self, sample: TokenisedSample) -> None:
        """Counts one more sample and its tokens. Mutates self."""
        self.samples += 1
        self.tokens += len(sample.input_ids)
        self.learned_tokens += int(sample.loss_mask.sum())

    def summary(self) -> str:
        """Returns one line for the terminal; what did not happen is left out."""
        parts = [f"{self.rows:,} rows -> {self.samples:,} samples"]
        parts.append(f"{self.tokens:,} tokens, {self.learned_tokens:,} of them learned")
        if self.windows:
            parts.append(f"{self.windows:,} windows cut from longer texts")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.prompt_too_long:
            parts.append(f"{self.prompt_too_long:,} rows skipped: the prompt fills the window")
        if self.empty_completion:
            parts.append(f"{self.empty_completion:,} rows skipped: the completion is empty")
        if self.too_short:
            parts.append(f"{self.too_short:,} rows skipped: too short to learn from")
        return "; ".join(parts)


class Tokeniser:
    """Turns rows of one shape into samples of at most `max_length` tokens.

    Raises ValueError on construction if the tokenizer lacks what the shape needs: an EOS, or a chat template.
    """

    def __init__(self, tokenizer: Any, shape: str, max_length: int) -> None:
        self.tokenizer, self.shape, self.max_length = tokenizer, shape, max_length
        self.prefix_ids = prefix_ids(tokenizer)
        self.chat = ChatTokeniser(tokenizer) if shape == "messages" else None
        if max_length < len(self.prefix_ids) + 2:
            raise ValueError(f"max_length is {max_length}, expected at least {len(self.prefix_ids) + 2}; raise it")
        if self.chat is None and tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, which closes every `{shape}` row; "
                f"set eos_token in its tokenizer_config.json"
            )

    def samples(self, rows: Iterable[Row], counts: Counts) -> Iterator[TokenisedSample]:
        """Yields the 0, 1 or more samples of each row, in order. Mutates `counts`."""
        for row in rows:
            counts.rows += 1
            for sample in self._samples_of(row, counts):
                counts.add(sample)
                yield sample

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the ids of a prompt, with BOS if the tokenizer adds one."""
        return [*self.prefix_ids, *self._plain_ids(prompt)]

    def completed(
        self, row: Row, prompt_ids: list[int], completion_ids: list[int], counts: Counts
    ) -> list[TokenisedSample]:
        """Returns the sample of a prompt and its completion (closed by EOS or not), or [] if it is skipped."""
        if len(prompt_ids) >= self.max_length:
            counts.prompt_too_long += 1
            return []
        input_ids = [*prompt_ids, *completion_ids]
        learned = [False] * len(prompt_ids) + [True] * len(completion_ids)
        return self._fitted(row, input_ids, learned, counts)

    def _samples_of(self, row: Row, counts: Counts) -> list[TokenisedSample]:
        if self.shape == "text":
            return self._windows(row, counts)
        if self.chat is not None:
            return [
                sample
                for input_ids, learned in self.chat.tokenised(row)
                for sample in self._fitted(row, input_ids, learned, counts)
            ]
        if not row.columns["completion"].strip():
            counts.empty_completion += 1
            return []
        completion_ids = self._closed_ids(row.columns["completion"])
        return self.completed(row, self.prompt_ids(row.columns["prompt"]), completion_ids, counts)

    def _windows(self, row: Row, counts: Counts) -> list[TokenisedSample]:
        ids = self._closed_ids(row.columns["text"])
        prefix = self.prefix_ids
        # the first window has no token to carry over, and without BOS its first token is that context itself
        n_first = self.max_length - len(prefix)
        n_next = n_first - 1
        samples = []
        for start in [0, *range(n_first, len(ids), n_next)]:
            stop = start + (n_next if start else n_first)
            context = [*prefix, *ids[start - 1 : start]] if start else prefix
            new_ids = ids[start:stop]
            learned = [False] * len(context) + [True] * len(new_ids)
            samples += _sample(row, [*context, *new_ids], learned)
        if not samples:
            counts.too_short += 1
        if len(samples) > 1:
            counts.windows += len(samples)
        return samples

    def _fitted(self, row: Row, input_ids: list[int], learned: list[bool], counts: Counts) -> list[TokenisedSample]:
        """Returns the sample cut to max_length, or [] if nothing is learned in what is left."""
        samples = _sample(row, input_ids[: self.max_length], learned[: self.max_length])
        if samples:
            counts.truncated += len(input_ids) > self.max_length
        elif len(input_ids) > self.max_length:
            counts.prompt_too_long += 1
        else:
            counts.too_short += 1
        return samples

    def _closed_ids(self, text: str) -> list[int]:
        """Returns the ids of a text and an EOS; people also write the EOS into the text themselves."""
        ids = self._plain_ids(text)
        return ids if ids and ids[-1] == self.tokenizer.eos_token_id else [*ids, self.tokenizer.eos_token_id]

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _sample(row: Row, input_ids: list[int], learned: list[bool]) -> list[TokenisedSample]:
    loss_mask = np.array(learned, dtype=bool)
    loss_mask[:1] = False
    if not loss_mask.any():
        return []
    return [TokenisedSample(row.source_row, np.array(input_ids, dtype=np.int32), loss_mask)]


def prefix_ids(tokenizer: Any) -> list[int]:
    """Returns the special tokens that the tokenizer puts before a text (BOS, or nothing)."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for i in range(len(with_special) - len(plain) + 1):
        if with_special[i : i + len(plain)] == plain:
            return with_special[:i]
    raise ValueError(
        f"the tokenizer {tokenizer.name_or_path!r} changes a text when it adds its special tokens "
        f"({plain} became {with_special}); it cannot be used for collecting"
    )
