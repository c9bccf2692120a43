"""The student: a model loaded by name, or a small Llama built from scratch with the teacher's tokenizer.

Built from scratch it has tied embeddings (at these sizes an untied head is most of the model), plain multi-head
attention and an MLP of 8/3 of the width. A size such as "5M" counts all parameters, embedding included: with a
49,152-token vocabulary 5M leaves a width of 96, so say the shape ("llama:layers=3,width=192,heads=3") where you care.
Both are refused unless their token ids mean what the store's mean.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from logitstore.errors import SpecMismatchError
from logitstore.fingerprint import tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from logitstore import LogitStore, StoreSpec

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMB])")
_SIZE_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
_MAX_MISS = 0.35
_SHAPE_FIELDS = ("layers", "width", "heads", "mlp")


@dataclass(frozen=True)
class LlamaShape:
    """Size of a Llama: `layers` blocks of `width` with `heads` attention heads and an MLP of `mlp` columns."""

    layers: int
    width: int
    heads: int
    mlp: int

    def n_parameters(self, vocab_size: int) -> int:
        """Number of parameters with tied embeddings over `vocab_size` tokens."""
        block = 4 * self.width * self.width + 3 * self.width * self.mlp + 2 * self.width
        return vocab_size * self.width + self.layers * block + self.width


@dataclass(frozen=True)
class Student:
    """A model in float32, its tokenizer (None where the store has none) and whether it starts from random weights."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    from_scratch: bool


def build_student(name: str, store: "LogitStore", *, seed: int = 0) -> Student:
    """The student that `name` asks for, in float32: a size ("5M"), a shape ("llama:layers=3,width=192,heads=3"), else
    a model folder or a name on the Hugging Face hub. A folder called "5M" is "./5M".

    From scratch, equal seeds give equal weights. Raises ValueError for a size or shape that makes no model and for a
    model that cannot be loaded, OSError for a name that is neither on the hub nor in the local cache, SpecMismatchError
    if its tokenizer or vocabulary is not the store's.
    """
    spec = store.spec
    if _SIZE.fullmatch(name):
        return _from_scratch(shape_of_size(name, spec.vocab_size), store, seed)
    if name.startswith("llama:"):
        return _from_scratch(parse_shape(name), store, seed)
    return _load(name, spec)


def check_tokenizer(spec: "StoreSpec", tokenizer: Any, *, who: str = "student") -> None:
    """Raises SpecMismatchError if the tokenizer's {token: id} map is not the one that the store was collected with.

    A store that does not name its tokenizer passes. who: whose tokenizer it is, for the message.
    """
    if spec.tokenizer_sha256 is None:
        return
    token_ids = tokenizer.get_vocab()
    got = tokenizer_sha256(token_ids)
    if got != spec.tokenizer_sha256:
        name = getattr(tokenizer, "name_or_path", "") or "(no name)"
        advice = (
            "Choose a student with the teacher's tokenizer, build one from scratch (--student 20M), or collect from a "
            "teacher of the student's family"
            if who == "student"
            else "Name the model that the store was collected from"
        )
        raise SpecMismatchError(
            f"the {who}'s tokenizer {name} ({len(token_ids)} tokens, sha256 {got[:12]}) is not that of the store's "
            f"teacher, {spec.teacher or '(no name)'} ({spec.vocab_size} tokens, sha256 {spec.tokenizer_sha256[:12]}): "
            f"the stored ids would mean other tokens. {advice}"
        )


def check_vocabulary(spec: "StoreSpec", model: "PreTrainedModel", *, who: str = "student") -> None:
    """Raises SpecMismatchError if the student, or who it is, has fewer columns than the store has tokens; more are
    masked."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "vocab_size", None)
    if width is not None and width < spec.vocab_size:
        raise SpecMismatchError(
            f"the {who} predicts {width} tokens (config.vocab_size), the store holds distributions over "
            f"{spec.vocab_size}: choose a student with the teacher's tokenizer ({spec.teacher or 'not named'}), or "
            "resize its embeddings if only padding is missing"
        )


def parse_shape(text: str) -> LlamaShape:
    """The shape that "llama:layers=3,width=192,heads=3[,mlp=512]" names; mlp defaults to 8/3 of the width.

    Raises ValueError naming the part that is wrong.
    """
    fields: dict[str, int] = {}
    for part in text.removeprefix("llama:").split(","):
        key, _, value = part.partition("=")
        if key not in _SHAPE_FIELDS or not value.isdigit() or int(value) == 0 or key in fields:
            raise ValueError(
                f"cannot read {part!r} in student {text!r}, expected llama:layers=3,width=192,heads=3[,mlp=512]"
            )
        fields[key] = int(value)
    missing = [key for key in ("layers", "width", "heads") if key not in fields]
    if missing:
        raise ValueError(f"student {text!r} lacks {', '.join(missing)}: write llama:layers=3,width=192,heads=3")
    shape = LlamaShape(**{"mlp": _mlp_of(fields["width"]), **fields})
    if shape.width % (2 * shape.heads):
        raise ValueError(
            f"student {text!r}: width {shape.width} must be a multiple of twice its {shape.heads} heads, "
            "since a head's width is even"
        )
    return shape


def shape_of_size(size: str, vocab_size: int) -> LlamaShape:
    """The shape whose number of parameters, embedding included, is nearest to a size such as "5M".

    Width in steps of 32 (64 above 512), one layer for each 64 of width but at least two, heads as wide as a step.
    Raises ValueError if even the nearest misses the size by more than 35 %, as when the vocabulary alone is larger.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"cannot read size {size!r}, expected a number and K, M or B, as in 5M")
    wanted = float(match[1]) * _SIZE_UNITS[match[2]]
    shapes = []
    for width in (*range(32, 512, 32), *range(512, 8193, 64)):
        head_width = 32 if width < 512 else 64
        shapes.append(LlamaShape(max(2, round(width / 64)), width, width // head_width, _mlp_of(width)))
    nearest = min(shapes, key=lambda shape: abs(shape.n_parameters(vocab_size) - wanted))
    got = nearest.n_parameters(vocab_size)
    if abs(got - wanted) > _MAX_MISS * wanted:
        raise ValueError(
            f"no student of {size} parameters over {vocab_size} tokens, the nearest has {got:,}: ask for another size, "
            "or for a shape (llama:layers=3,width=192,heads=3)"
        )
    return nearest


def _mlp_of(width: int) -> int:
    return -(-width * 8 // 3 // 32) * 32


def _from_scratch(shape: LlamaShape, store: "LogitStore", seed: int) -> Student:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = store.tokenizer_folder
    tokenizer = None if folder is None else AutoTokenizer.from_pretrained(str(folder))
    if tokenizer is not None:
        check_tokenizer(store.spec, tokenizer)
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=store.spec.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max(store.spec.max_length or 0, 2048),
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return Student(model=model, tokenizer=tokenizer, from_scratch=True)


def _load(name: str, spec: "StoreSpec") -> Student:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from logitstore_trainer.collect.teacher import require_causal_lm
    from logitstore_trainer.collect.teacher_source import TeacherSource, locate_on_hub

    path = Path(name).expanduser()
    if (name.startswith((".", "/", "~")) or path.is_file()) and not path.is_dir():
        raise ValueError(
            f"student {name!r} is {'a file' if path.is_file() else 'not there'}, expected a model folder, a hub name, "
            "a size (5M) or a shape (llama:layers=3,width=192,heads=3)"
        )
    source = TeacherSource(name, str(path)) if path.is_dir() else locate_on_hub(name)
    where = source.from_pretrained_arguments()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **where)
        check_tokenizer(spec, tokenizer)
        config = AutoConfig.from_pretrained(source.location, **where)
        require_causal_lm(name, config)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=torch.float32, output_loading_info=True, **where
        )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"cannot load student {name!r} as a causal language model: {first_line}") from error
    absent = sorted(set(loading["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if absent:
        raise ValueError(f"student {name!r} is not a whole causal language model: its files lack {absent[0]}")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and spec.max_length is not None and positions < spec.max_length:
        raise ValueError(
            f"student {name!r} has {positions} positions, samples of the store up to {spec.max_length} tokens; "
            "collect with a smaller --max-length, or take another student"
        )
    check_vocabulary(spec, model)
    return Student(model=model, tokenizer=tokenizer, from_scratch=False)
