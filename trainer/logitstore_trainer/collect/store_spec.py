"""What a collection writes of itself into its store, so that another one is not mixed into it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import logitstore
from logitstore.codecs.registry import Codec
from logitstore.fingerprint import sha256_json
from logitstore.tables import folder_sha256
from logitstore_trainer.collect.settings import CollectSettings
from logitstore_trainer.collect.source import Source
from logitstore_trainer.collect.teacher import TeacherInfo, choose_dtype
from logitstore_trainer.collect.teacher_source import generation_config_sha256
from logitstore_trainer.devices import choose_device


def store_spec(source: Source, settings: CollectSettings, codec: Codec) -> logitstore.StoreSpec:
    """The spec of the store that this collection writes with this codec."""
    dataset, info = source.dataset, source.info
    device = choose_device(settings.device)
    collection = {"shape": dataset.shape, "max_tokens": settings.max_tokens}
    if dataset.shape == "messages":
        collection["chat_template_sha256"] = sha256_json(info.tokenizer.chat_template)
    if settings.generate is not None:
        collection |= {
            "generate": settings.generate,
            "generate_temperature": settings.generate_temperature,
            "seed": settings.seed,
        }
        if (config_sha256 := generation_config_sha256(info.source)) is not None:
            collection["generation_config_sha256"] = config_sha256
    if settings.is_to_fit:
        collection |= _fitted_for(settings)
    return logitstore.StoreSpec(
        codec=codec,
        vocab_size=info.vocab_size,
        tokenizer_sha256=logitstore.tokenizer_sha256(info.tokenizer.get_vocab()),
        tokenizer_files_sha256=_tokenizer_files_sha256(info),
        teacher=settings.teacher,
        teacher_sha256=info.sha256,
        teacher_dtype=choose_dtype(settings.dtype, device, getattr(info.config, "dtype", None)),
        head_width=info.head_width,
        dataset=settings.dataset.name,
        dataset_sha256=dataset.sha256,
        max_length=source.tokeniser.max_length,
        keep_prompt=settings.keep_prompt,
        collection=collection,
    )


def _tokenizer_files_sha256(info: TeacherInfo) -> str:
    with tokenizer_files(info) as folder:
        return folder_sha256(folder)


@contextmanager
def tokenizer_files(info: TeacherInfo) -> Iterator[Path]:
    """A temporary folder with the tokenizer's files. Raises OSError where it cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            info.tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
            raise OSError(f"the tokenizer's files cannot be written into {folder}: {error}") from None
        yield Path(folder)


def _fitted_for(settings: CollectSettings) -> dict[str, Any]:
    """What decided how the codec was fitted, and for what it was chosen."""
    asked: dict[str, Any] = {"fit_seed": settings.seed, "plan_rows": settings.plan_rows}
    if settings.goal is not None:
        asked |= {
            "max_kl": settings.goal.max_kl,
            "max_bytes_per_token": settings.goal.max_bytes_per_token,
            "goal_temperature": settings.goal.temperature,
            "goal_tokens": settings.goal.tokens,
        }
    return {name: value for name, value in asked.items() if value is not None}
