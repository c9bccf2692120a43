"""How many questions a model answers with the right number: greedy answers to a file of questions, exact match.

A question is a row of prompt and completion, which goes to the model as `collect` tokenises it, or a conversation,
which goes through the model's own chat template up to its last turn. The right number stands behind "####" in the
completion or the last turn. Answers are decoded greedily, in batches of questions of similar length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from logitstore_trainer.collect.generate import decoded_batch, end_of_text_ids
from logitstore_trainer.collect.prompts import read_dataset
from logitstore_trainer.collect.rows import Row
from logitstore_trainer.collect.tokenise import Tokeniser
from logitstore_trainer.evaluate import in_eval_mode
from logitstore_trainer.final_number import Interval, final_number, marked_number, wilson_interval
from logitstore_trainer.progress import Progress

_SHAPES = ("prompt+completion", "messages")


@dataclass(frozen=True)
class Questions:
    """Made by read_questions. `rows` are of `shape`, and `expected` are their right numbers; sha256: of the file."""

    path: Path
    sha256: str
    shape: str
    rows: tuple[Row, ...]
    expected: tuple[Decimal, ...]


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one question. number: the one that it gave, None without one. is_cut: it did not end."""

    source_row: int
    text: str
    number: Decimal | None
    expected: Decimal
    is_cut: bool

    @property
    def is_right(self) -> bool:
        return self.number == self.expected

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, numbers as text, and `is_right`."""
        number = None if self.number is None else str(self.number)
        return {
            "source_row": self.source_row, "text": self.text, "number": number, "expected": str(self.expected),
            "is_right": self.is_right, "is_cut": self.is_cut,
        }  # fmt: skip


@dataclass(frozen=True)
class ExactMatch:
    """Of n questions, how many have the right number; the 95 % Wilson interval of that share; and what went wrong:
    answers without a number, and answers that were cut before they ended (some of them right)."""

    n: int
    n_right: int
    share: float
    interval: Interval
    n_without_number: int
    n_cut: int

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return {**self.__dict__, "interval": list(self.interval)}


def read_questions(path: str | Path, n_rows: int | None = None) -> Questions:
    """The questions of a data set file, or its first n_rows.

    Raises OSError or ValueError naming the first row without "####" and a number, and what read_dataset raises.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of questions; check --answers")
    dataset = read_dataset(path)
    if dataset.shape not in _SHAPES:
        raise ValueError(
            f"{path}: rows are `{dataset.shape}`, expected `prompt` and `completion`, or `messages`, with the right "
            'number behind "####"'
        )
    rows = tuple(islice(dataset.rows(), n_rows))
    return Questions(path, dataset.sha256, dataset.shape, rows, tuple(_expected(row) for row in rows))


def answer_questions(
    name: str,
    model: Any,
    tokenizer: Any,
    questions: Questions,
    *,
    vocab_size: int,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Answer]:
    """The answers of a causal language model called `name`, in the order of the questions.

    vocab_size: tokens of the tokenizer; columns of the head from there on are never chosen. The model is left in the
    mode (train or eval) in which it was found, also where this raises. Raises ValueError in one line for a model
    without an end-of-text token or a chat template that conversations need, and for a prompt that leaves no room for
    max_new_tokens.
    """
    prompts, stop_ids = _tokenised(name, model, tokenizer, questions, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Answer] = {}
    with in_eval_mode(model), Progress(total=len(prompts), desc=f"answers of {name}", unit="answers") as shown:
        for start in range(0, len(prompts), batch_size):
            batch = by_length[start : start + batch_size]
            written = decoded_batch(
                model, [prompts[i] for i in batch], vocab_size=vocab_size, stop_ids=stop_ids,
                max_new_tokens=max_new_tokens,
            )  # fmt: skip
            for i, ids in zip(batch, written, strict=True):
                answers[i] = _answer(tokenizer, questions, i, ids, stop_ids)
            shown.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


def exact_match(answers: Sequence[Answer]) -> ExactMatch:
    """The score of at least one answer."""
    n, n_right = len(answers), sum(answer.is_right for answer in answers)
    return ExactMatch(
        n=n,
        n_right=n_right,
        share=n_right / n,
        interval=wilson_interval(n_right, n),
        n_without_number=sum(answer.number is None for answer in answers),
        n_cut=sum(answer.is_cut for answer in answers),
    )


def _expected(row: Row) -> Decimal:
    text = row.columns["messages"][-1].get("content") if "messages" in row.columns else row.columns["completion"]
    number = marked_number(text or "")
    if number is None:
        raise ValueError(
            f'{row.where}: its completion has no number behind "####", so no answer can be right; add it, or remove '
            "the row"
        )
    return number


def _tokenised(
    name: str, model: Any, tokenizer: Any, questions: Questions, max_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """(ids of each prompt, ids that end an answer)."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokeniser = Tokeniser(tokenizer, questions.shape, positions or 1 << 30)
    stop_ids = end_of_text_ids(name, tokenizer, model)
    prompts = []
    for row in questions.rows:
        if tokeniser.chat is None:
            prompt_ids = tokeniser.prompt_ids(row.columns["prompt"])
        else:
            prompt_ids, closing_ids = tokeniser.chat.question(row)
            stop_ids += [token for token in closing_ids if token not in stop_ids]
        if positions is not None and len(prompt_ids) + max_new_tokens > positions:
            raise ValueError(
                f"{row.where}: its prompt has {len(prompt_ids)} tokens, which with --max-new-tokens {max_new_tokens} "
                f"are more than the {positions} positions of {name}; lower --max-new-tokens, or leave the row out"
            )
        prompts.append(prompt_ids)
    return prompts, stop_ids


def _answer(tokenizer: Any, questions: Questions, i: int, ids: list[int], stop_ids: list[int]) -> Answer:
    is_cut = not ids or ids[-1] not in stop_ids
    text = tokenizer.decode(ids if is_cut else ids[:-1], skip_special_tokens=True)
    return Answer(questions.rows[i].source_row, text, final_number(text), questions.expected[i], is_cut)
