"""Teacher rows to fit codecs on, to measure them on and to train students on: SmolLM2-135M-Instruct over four kinds of
text.

    python benchmarks/quality/codec_rows.py --out codec-rows

Text becomes one stream of tokens a kind, documents closed by end-of-text, cut into sequences of 256 tokens. Three
kinds are fitted on (fit.safetensors): GSM8K train, instructions-train and one half of Python's documentation; a fifth
of that half, and what the other two have left, is for choosing among codecs (choose-*.safetensors). Four are measured
(measured-*.safetensors): GSM8K eval, instructions-eval, the other half of the documentation, and Python source, which
is in no fit. The documentation is split by the SHA-256 of the paragraph, repeats dropped; of the others a text that
shares a paragraph of four words or more with a text of the fit is left out (half of instructions-eval quotes what
instructions-train quotes). Students train on the GSM8K train and instructions-train that follow what is fitted on
(train.safetensors). It takes about ten minutes on two cores; files that are there are kept.

Each file is what `logitstore bench storage` reads: the hidden states and the head of the teacher in float16.
"""

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from logitstore_trainer.cli import one_line_errors
from logitstore_trainer.collect.teacher import Teacher, load_teacher
from logitstore_trainer.demo.text import is_held_out, paragraphs, python_documentation
from logitstore_trainer.progress import Progress
from numpy.typing import NDArray
from real_line import ROOT, fetched_teacher
from safetensors.torch import save_file

LENGTH = 256
BATCH_SIZE = 8
FIT_SEQUENCES = {"gsm8k": 324, "instructions": 324, "documentation": 134}  # 199,410 rows
TRAIN_SEQUENCES = 320  # of each of two kinds: 163,200 rows
CHOOSE_SEQUENCES = 30
MEASURED_SEQUENCES = 33
CHOOSE_SHARE = 0.2
LEAST_WORDS = 4
SOURCE_MODULES = ("argparse", "ast", "dataclasses", "email.message", "fractions", "heapq", "ipaddress", "json.encoder")


def main() -> int:
    """Writes the files that are missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("codec-rows"), help="folder for all files")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "fixtures", help="folder of the text")
    parser.add_argument("--teacher", help="another teacher: a folder or a .gguf file, nothing is fetched then")
    args = parser.parse_args()
    return one_line_errors(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Fits the text to sequences, runs the teacher over them and writes what is missing."""
    args.out.mkdir(parents=True, exist_ok=True)
    documents = {"fit": fit_documents(args.data)}
    documents["train"] = {kind: texts for kind, texts in documents["fit"].items() if kind != "documentation"}
    documents |= {f"choose-{kind}": {kind: texts} for kind, texts in choose_documents(args.data)}
    documents |= {f"measured-{kind}": {kind: texts} for kind, texts in measured_documents(args.data)}
    missing = {name: kinds for name, kinds in documents.items() if not (args.out / f"{name}.safetensors").is_file()}
    if not missing:
        print(f"all {len(documents)} files are in {args.out}")
        return 0
    teacher = load_teacher(args.teacher or str(fetched_teacher(args.out)), dtype="float32", device="cpu")
    for name, kinds in missing.items():
        parts = []
        for kind, texts in kinds.items():
            first, n_sequences = _which_sequences(name, kind)
            stream = sequences(texts, teacher, first + n_sequences, f"{name}, {kind}")
            parts.append(stream[first:])
        write_rows(args.out / f"{name}.safetensors", teacher, np.concatenate(parts), name)
    return 0


def _which_sequences(name: str, kind: str) -> tuple[int, int]:
    """(first, how many) of the sequences of a kind's stream that go into a file."""
    if name == "train":
        return FIT_SEQUENCES[kind], TRAIN_SEQUENCES
    if name == "fit":
        return 0, FIT_SEQUENCES[kind]
    return 0, CHOOSE_SEQUENCES if name.startswith("choose") else MEASURED_SEQUENCES


def fit_documents(data: Path) -> dict[str, Sequence[str]]:
    """{kind: texts} of everything that may be fitted on."""
    return {
        "gsm8k": _split(prompts_and_completions(data / "gsm8k-train.jsonl"))[0],
        "instructions": _split(prompts_and_completions(data / "instructions-train.jsonl"))[0],
        "documentation": documentation(0.5 + CHOOSE_SHARE / 2, 1.0),
    }


def choose_documents(data: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """(kind, texts) for choosing among codecs: no text that shares a passage with what may be fitted on."""
    fitted = passages_of_kinds(fit_documents(data))
    rest = {
        "gsm8k": _split(prompts_and_completions(data / "gsm8k-train.jsonl"))[1],
        "instructions": _split(prompts_and_completions(data / "instructions-train.jsonl"))[1],
        "documentation": documentation(0.5, 0.5 + CHOOSE_SHARE / 2),
    }
    for kind, texts in rest.items():
        yield kind, _without(texts, fitted)


def measured_documents(data: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """(kind, texts) of everything that is measured: no text that shares a passage with what is fitted or chosen on."""
    seen = passages_of_kinds(fit_documents(data)) | passages_of_kinds(dict(choose_documents(data)))
    measured = {
        "gsm8k": prompts_and_completions(data / "gsm8k-eval.jsonl"),
        "instructions": prompts_and_completions(data / "instructions-eval.jsonl"),
        "documentation": documentation(0.0, 0.5),
        "source": python_source(),
    }
    for kind, texts in measured.items():
        yield kind, _without(texts, seen)


def passages_of_kinds(documents: Mapping[str, Iterable[str]]) -> set[str]:
    """The passages of all texts of all kinds."""
    return set().union(*(passages(texts) for texts in documents.values()))


def _split(texts: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """(for the fit, for choosing)."""
    n_fit = round(len(texts) * (1 - CHOOSE_SHARE))
    return texts[:n_fit], texts[n_fit:]


def _without(texts: Iterable[str], seen: set[str]) -> list[str]:
    return [text for text in texts if not passages([text]) & seen]


def passages(texts: Iterable[str]) -> set[str]:
    """The paragraphs of at least LEAST_WORDS words, which no two texts share by chance; spaces do not count."""
    words = (paragraph.split() for text in texts for paragraph in paragraphs(text))
    return {" ".join(of_one) for of_one in words if len(of_one) >= LEAST_WORDS}


def prompts_and_completions(path: Path) -> list[str]:
    """Prompt and completion of each row, a line apart, in an order that is none of the file's."""
    if not path.is_file():
        raise FileNotFoundError(f"no text at {path}; name its folder with --data")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def documentation(low: float, high: float) -> list[str]:
    """The distinct paragraphs of Python's documentation whose hash, as a fraction, is in [low, high), page by page.

    Equal words are one paragraph.
    """
    seen: set[str] = set()
    pages = []
    for _, page in sorted(python_documentation().items()):
        kept = []
        for paragraph in paragraphs(page):
            words = " ".join(paragraph.split())
            if words not in seen and is_held_out(paragraph, high) and not is_held_out(paragraph, low):
                kept.append(paragraph)
            seen.add(words)
        if kept:
            pages.append("\n\n".join(kept))
    return sorted(pages, key=lambda text: hashlib.sha256(text.encode()).digest())


def python_source() -> list[str]:
    """Source of a few modules of the standard library."""

    def source(name: str) -> str:
        module: ModuleType = __import__(name, fromlist=["_"])
        return inspect.getsource(module)

    return [source(name) for name in SOURCE_MODULES]


def sequences(texts: Iterable[str], teacher: Teacher, n_sequences: int, what: str) -> NDArray[np.int64]:
    """The first n_sequences x 256 tokens of the stream of texts. Raises ValueError where there is less text."""
    tokenizer = teacher.tokenizer
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= n_sequences * LENGTH:
            return np.array(stream[: n_sequences * LENGTH]).reshape(n_sequences, LENGTH)
    raise ValueError(f"{what}: {len(stream):,} tokens of text, expected at least {n_sequences * LENGTH:,}")


@torch.inference_mode()
def write_rows(path: Path, teacher: Teacher, input_ids_SL: NDArray[np.int64], name: str) -> None:
    """Runs the backbone over the sequences and writes the file in one step."""
    model, tokens_SL = teacher.model, torch.from_numpy(input_ids_SL)
    hidden = []
    with Progress(total=tokens_SL.numel(), desc=name, unit="tokens") as display:
        for batch_BL in tokens_SL.split(BATCH_SIZE):
            hidden.append(model.base_model(input_ids=batch_BL, use_cache=False).last_hidden_state.half().flatten(0, 1))
            display.update(batch_BL.numel())
    tensors = {
        "input_ids": tokens_SL.flatten().int(),
        "sample_lengths": torch.full((len(tokens_SL),), LENGTH, dtype=torch.int32),
        "hidden": torch.cat(hidden),
        "lm_head": model.get_output_embeddings().weight.detach().half(),
    }
    partial = path.with_suffix(".partial")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(partial))
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
