"""A conversation into token ids and a mask of what the assistant says, by the tokenizer's own chat template.

The whole conversation is rendered and tokenised once, exactly as the teacher's chat template writes it. Which
characters are the assistant's is found in one of two ways:

- the template marks them with {% generation %}: transformers gives the mask;
- otherwise by rendering prefixes: what rendering turns 0..i adds to turns 0..i-1 plus the generation prompt is
  turn i. A token that straddles the boundary belongs to the prompt.

The token that ends an assistant turn is learned; white space that the template puts after it (SmolLM2's "\\n" after
<|im_end|>) is not, since nobody generates it. Tool calls are the assistant's and learned, tool output is not.

Some templates rewrite the past (Qwen 3 drops the reasoning of earlier turns), so that no single rendering holds
every turn as the model wrote it. There each assistant turn becomes a sample of its own: the history as the
template shows it at that point, and that turn learned.
"""

from typing import Any

from jinja2 import TemplateError

from logitstore_trainer.collect.rows import Row

_TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError)


class ChatTokeniser:
    """Raises ValueError on construction if the tokenizer has no chat template, or gives no offsets."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which `messages` rows need; "
                f"use an instruction-tuned teacher, or a dataset of `prompt` and `completion`"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} gives no character offsets (it is not a fast tokenizer), "
                f"which `messages` rows need; use a dataset of `prompt` and `completion`"
            )
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template]
        self.has_generation_tags = any("{% generation" in t or "{%- generation" in t for t in templates)
        self.added_tokens = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())

    def tokenised(self, row: Row) -> list[tuple[list[int], list[bool]]]:
        """Returns (input_ids, learned) of the row's conversation, or of each of its assistant turns.

        Raises ValueError, naming the row, where the template refuses the conversation.
        """
        try:
            if self.has_generation_tags:
                return [self._by_generation_tags(row)]
            return self._by_prefixes(row)
        except _TEMPLATE_ERRORS as error:
            raise _refused(row, error) from None

    def question(self, row: Row) -> tuple[list[int], list[int]]:
        """Returns (ids before the row's last turn, the header of the assistant's turn included; tokens that end it).

        Raises ValueError, naming the row, where the last turn is not the assistant's or the template refuses the row.
        """
        messages = row.columns["messages"]
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{row.where}: `messages` ends with the turn of {messages[-1]['role']!r}, expected the assistant's "
                f"answer; correct or remove the row"
            )
        input_ids, learned = self.tokenised(row)[-1]
        last = max((i for i, is_learned in enumerate(learned) if is_learned), default=0)
        closing = [input_ids[last]] if input_ids[last] in self.tokenizer.added_tokens_decoder else []
        try:
            text = self._rendered(row, len(messages) - 1, add_generation_prompt=True)
        except _TEMPLATE_ERRORS as error:
            raise _refused(row, error) from None
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], closing

    def _by_generation_tags(self, row: Row) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer.apply_chat_template(
            row.columns["messages"],
            tools=row.columns.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        input_ids = encoded["input_ids"]
        learned = [bool(x) for x in encoded["assistant_masks"]]
        eos = self.tokenizer.eos_token_id
        closing = [  # a template may leave the closing token outside of its tags
            i for i in range(1, len(input_ids)) if input_ids[i] == eos and input_ids[i - 1] != eos and learned[i - 1]
        ]
        for i in closing:
            learned[i] = True
        return input_ids, learned

    def _by_prefixes(self, row: Row) -> list[tuple[list[int], list[bool]]]:
        messages = row.columns["messages"]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._rendered(row, len(messages))
        renderings = [self._rendered(row, i + 1) for i in turns]
        starts = [self._start_of_turn(row, i, until) for i, until in zip(turns, renderings, strict=True)]
        spans = [(start, self._end_of_turn(until)) for start, until in zip(starts, renderings, strict=True)]
        if all(whole.startswith(until[:end]) for until, (_, end) in zip(renderings, spans, strict=True)):
            return [self._masked(whole, spans)]
        return [self._masked(until, [span]) for until, span in zip(renderings, spans, strict=True)]

    def _rendered(self, row: Row, n_messages: int, *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            row.columns["messages"][:n_messages],
            tools=row.columns.get("tools"),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _start_of_turn(self, row: Row, i: int, until: str) -> int:
        """Returns where in `until` (turns 0..i rendered) the assistant's turn i begins, its header left out."""
        if i > 0:
            # not always a whole prefix: some generation prompts open a <think> that the rendered turn lacks
            start = _common_prefix_chars(until, self._rendered(row, i, add_generation_prompt=True))
            if row.columns["messages"][i - 1]["role"] != "assistant":
                return start
            # a template may render the turn before differently once it is not the last: the two part inside of it
            header = self._assistant_header()
            return max(start, until.rindex(header) + len(header)) if header and header in until else start
        header = self._assistant_header()
        return until.index(header) + len(header) if header and header in until else 0

    def _assistant_header(self) -> str:
        """Returns what the template puts before an assistant's turn."""
        probe = [{"role": "user", "content": "a"}]
        plain, prompted = (
            self.tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=prompt)
            for prompt in (False, True)
        )
        return prompted.removeprefix(plain)

    def _end_of_turn(self, until: str) -> int:
        stripped = until.rstrip()
        return len(stripped) if stripped.endswith(self.added_tokens) else len(until)

    def _masked(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learned = [
            any(begin <= start and end <= stop and start < end for begin, stop in spans)
            for start, end in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], learned


def _refused(row: Row, error: Exception) -> ValueError:
    return ValueError(
        f"{row.where}: the teacher's chat template refuses this conversation: {error}; correct or remove the row"
    )


def _common_prefix_chars(a: str, b: str) -> int:
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
