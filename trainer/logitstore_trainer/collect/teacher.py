"""The teacher: where it is, what it is, and its weights on a device.

Three kinds are taken: a folder, a .gguf file, and a name on the Hugging Face hub. `inspect_teacher` reads the
configuration and the tokenizer only, so that whatever can be refused is refused in seconds; `load_teacher` then
reads the weights.

dtype "auto" is bf16 where the hardware computes in it and fp32 elsewhere: a CPU without bf16 units runs a bf16 model
several times slower than an fp32 one. A checkpoint saved in fp16 stays fp16 on a GPU.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from logitstore_trainer.collect.teacher_source import TeacherSource, fingerprint, locate_teacher
from logitstore_trainer.devices import choose_device
from logitstore_trainer.dtypes import long_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what transformers, safetensors and torch raise for a folder that is not a whole model
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher before its weights are read.

    `vocab_size` is one more than the largest id that the tokenizer knows, or the head's width if that is smaller;
    columns of the logits from there on are padding. `max_positions` is the longest input, None if nothing says so.
    """

    source: TeacherSource
    config: Any
    tokenizer: Any
    vocab_size: int
    head_width: int
    max_positions: int | None
    sha256: str

    @property
    def name(self) -> str:
        return self.source.name

    def widths_note(self) -> str | None:
        """Returns one line where head and tokenizer differ in width, else None."""
        top_id = max(self.tokenizer.get_vocab().values())
        if top_id >= self.head_width:
            return (
                f"{self.name}: the tokenizer has ids up to {top_id:,}, the head only {self.head_width:,} columns; "
                f"a text that needs one of the others is refused"
            )
        if self.head_width > self.vocab_size:
            return (
                f"{self.name}: the head has {self.head_width:,} columns, the tokenizer {self.vocab_size:,} ids; "
                f"the {self.head_width - self.vocab_size:,} padded columns are masked"
            )
        return None

    def require_ids_in_head(self, input_ids: Any, where: str) -> None:
        """Raises ValueError if an id of `input_ids` ([L] int array) has no column in the head."""
        top_id = int(input_ids.max())
        if top_id >= self.head_width:
            raise ValueError(
                f"{where}: token {self.tokenizer.convert_ids_to_tokens(top_id)!r} has id {top_id}, but the head of "
                f"{self.name} has {self.head_width} columns; remove the token, or resize the model's embeddings"
            )


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode, without gradients and without a cache, on `device`."""

    info: TeacherInfo
    model: Any
    dtype_name: str
    device: torch.device

    @property
    def tokenizer(self) -> Any:
        return self.info.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size


def load_tokenizer(teacher: str | TeacherSource, *, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a teacher or student. Raises ValueError or OSError in one line."""
    source = locate_teacher(teacher) if isinstance(teacher, str) else teacher
    try:
        return AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **source.from_pretrained_arguments()
        )
    except Exception as error:  # the tokenizers library raises a bare Exception for a malformed tokenizer.json
        raise ValueError(
            f"{source.name}: its tokenizer cannot be loaded: {_first_line(error)}; "
            f"put the tokenizer's files (tokenizer.json, tokenizer_config.json) next to the model's"
        ) from None


def inspect_teacher(teacher: str | TeacherSource, *, trust_remote_code: bool = False) -> TeacherInfo:
    """Returns what a teacher is, without reading its weights.

    Raises ValueError or OSError in one line: no such model, not a causal language model, no tokenizer.
    """
    source = locate_teacher(teacher) if isinstance(teacher, str) else teacher
    try:
        config = AutoConfig.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **source.from_pretrained_arguments()
        )
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"{source.name}: not a model that can be loaded: {_first_line(error)}; {_remedy(error)}"
        ) from None
    require_causal_lm(source.name, config)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config(decoder=True)
    n_ids = max(tokenizer.get_vocab().values()) + 1
    return TeacherInfo(
        source=source,
        config=config,
        tokenizer=tokenizer,
        vocab_size=min(n_ids, text_config.vocab_size),
        head_width=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        sha256=fingerprint(source),
    )


def load_teacher(
    teacher: str | TeacherInfo, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Teacher:
    """Returns the teacher with its weights. dtype: auto, float32, bfloat16 or float16; device: auto, cpu, cuda, mps.

    Raises ValueError or OSError in one line, also where the checkpoint lacks weights of a causal language model
    (transformers would fill them with random numbers).
    """
    if isinstance(teacher, str):
        teacher = inspect_teacher(teacher, trust_remote_code=trust_remote_code)
    torch_device = choose_device(device)
    dtype_name = choose_dtype(dtype, torch_device, getattr(teacher.config, "dtype", None))
    on_device = {} if torch_device.type == "cpu" or teacher.source.gguf_file else {"device_map": torch_device}
    try:
        with _bars_on_terminals_only(teacher.source):
            model, loading = AutoModelForCausalLM.from_pretrained(
                teacher.source.location,
                config=teacher.config,
                dtype=DTYPES[dtype_name],
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **on_device,
                **teacher.source.from_pretrained_arguments(),
            )
        model = model if on_device else model.to(torch_device)
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"{teacher.name}: its weights cannot be loaded: {_first_line(error)}; {_remedy(error)}"
        ) from None
    absent = sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise ValueError(
            f"{teacher.name}: not a causal language model: its files lack {absent[0]}"
            f"{f' and {len(absent) - 1} more weights' if len(absent) > 1 else ''}; use the whole checkpoint"
        )
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return Teacher(teacher, model, dtype_name, torch_device)


@contextmanager
def _bars_on_terminals_only(source: TeacherSource) -> Iterator[None]:
    """Hides transformers' bars where standard error is a log file: each would be a hundred lines there."""
    if sys.stderr.isatty():
        yield
        return
    hf_logging.disable_progress_bar()
    if not source.gguf_file:
        yield
        return
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    shown = gguf_reader.tqdm  # tqdm's own class, which does not ask transformers' switch
    gguf_reader.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = shown


def choose_dtype(dtype: str, device: torch.device, saved_dtype: torch.dtype | None = None) -> str:
    """Returns "float32", "bfloat16" or "float16"; see the head of this file for "auto"."""
    dtype = long_name(dtype)
    if dtype in DTYPES:
        return dtype
    if dtype != "auto":
        raise ValueError(f"--dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return "bfloat16" if cpu_computes_bf16() else "float32"
    if saved_dtype == torch.float16:
        return "float16"
    if device.type == "mps":
        return "bfloat16" if torch.backends.mps.is_macos_or_newer(14, 0) else "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def cpu_computes_bf16() -> bool:
    """Returns whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX), as far as torch can tell.

    Arm is not asked: torch has no probe for it.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def require_causal_lm(name: str, config: Any) -> None:
    """Refuses encoders and encoder-decoders; transformers would load some of them and compute nonsense."""
    architectures = config.architectures or []
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = has_own_code or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = any(re.search("MaskedLM|Classification|QuestionAnswering", each) for each in architectures)
    says_causal = has_own_code or not architectures or any(each in causal for each in architectures)
    if config.is_encoder_decoder or not known or encoder or not says_causal:
        raise ValueError(
            f"{name}: not a causal language model: it is {', '.join(architectures) or config.model_type}, expected "
            f"a decoder that AutoModelForCausalLM loads (Llama, Qwen, Gemma, GPT-2, ...)"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".;: ")


def _remedy(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it brings its own code: read it, and if you trust it add --trust-remote-code"
    if isinstance(error, torch.OutOfMemoryError):
        return "use a smaller --dtype, another --device, or a smaller teacher"
    return "check that --teacher names a whole model (config.json, weights, tokenizer) or a .gguf file"
