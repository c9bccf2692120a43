"""A teacher and a data set, opened and found to fit together, as `collect` and `plan` start from them.

The data set is read through and the teacher's configuration and tokenizer are looked at; the weights are loaded when
they are first needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from logitstore_trainer.collect.generate import generate_completions
from logitstore_trainer.collect.prompts import Dataset, read_dataset
from logitstore_trainer.collect.source_settings import DEFAULT_MAX_LENGTH, SourceSettings
from logitstore_trainer.collect.teacher import Teacher, TeacherInfo, inspect_teacher, load_teacher
from logitstore_trainer.collect.tokenise import Tokeniser

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Source:
    """Made by open_source. `say` gets one line at a time."""

    settings: SourceSettings
    dataset: Dataset
    info: TeacherInfo
    tokeniser: Tokeniser
    say: Say

    @cached_property
    def teacher(self) -> Teacher:
        """The weights, loaded when this is first read. Raises ValueError or OSError in one line."""
        settings = self.settings
        teacher = load_teacher(
            self.info, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
        )
        self.say(f"{self.info.name}: {teacher.dtype_name} on {teacher.device}")
        return teacher

    def complete(
        self, prompts: Sequence[Sequence[int]], source_rows: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        """What the teacher writes behind each prompt (token ids), as the settings say."""
        return generate_completions(
            self.teacher,
            prompts,
            source_rows,
            max_new_tokens=max_new_tokens,
            temperature=self.settings.generate_temperature,
            seed=self.settings.seed,
        )


def open_source(settings: SourceSettings, say: Say) -> Source:
    """Raises ValueError or OSError in one line for a data set or teacher that cannot be used, or not together."""
    dataset = read_dataset(settings.dataset)
    info = inspect_teacher(settings.teacher, trust_remote_code=settings.trust_remote_code)
    if dataset.shape == "prompt" and settings.generate is None:
        raise ValueError(
            f"{settings.dataset}: rows have a `prompt` and no `completion`, so there is nothing to learn; "
            "add completions, or let the teacher write them with --generate N"
        )
    if dataset.shape != "prompt" and settings.generate is not None:
        raise ValueError(f"{settings.dataset}: --generate is for rows that are a `prompt` alone, not {dataset.shape}")
    tokeniser = Tokeniser(info.tokenizer, dataset.shape, _max_length(settings, info))
    return Source(settings, dataset, info, tokeniser, say)


def _max_length(settings: SourceSettings, info: TeacherInfo) -> int:
    limit = info.max_positions
    if settings.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and settings.max_length > limit:
        raise ValueError(f"--max-length {settings.max_length} is beyond the {limit} positions of {info.name}; lower it")
    return settings.max_length
