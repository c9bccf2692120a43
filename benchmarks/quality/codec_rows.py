"""Teacher rows to fit codecs on and to measure them on: SmolLM2-135M-Instruct over four kinds of text.

    python benchmarks/quality/codec_rows.py --out codec-rows

Text becomes one stream of tokens a kind, documents closed by end-of-text, cut into sequences of 256 tokens. Three
kinds are in the fit (fit.safetensors): GSM8K train, instructions-train and one half of Python's documentation. Four
are measured, each in a file of its own: GSM8K eval, instructions-eval, the other half of the documentation, and
Python source, which is in no fit. The documentation is split by the SHA-256 of the paragraph, repeats dropped; of the
others a text that shares a paragraph of four words or more with any text of the fit is not measured (half of
instructions-eval quotes what instructions-train quotes). It takes about ten minutes on two cores; files that are there
are kept.

Each file is what `logitstore bench storage` reads: the hidden states and the head of the teacher in float16.
"""

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
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
FIT_SEQUENCES = {"gsm8k": 310, "instructions": 310, "documentation": 164}
MEASURED_SEQUENCES = 33
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
    documents = {"fit": fit_documents(args.data), **{f"measured-{k}": {k: d} for k, d in measured_documents(args.data)}}
    missing = {name: kinds for name, kinds in documents.items() if not (args.out / f"{name}.safetensors").is_file()}
    if not missing:
        print(f"all {len(documents)} files are in {args.out}")
        return 0
    teacher = load_teacher(args.teacher or str(fetched_teacher(args.out)), dtype="float32", device="cpu")
    for name, kinds in missing.items():
        counts = FIT_SEQUENCES if name == "fit" else dict.fromkeys(kinds, MEASURED_SEQUENCES)
        parts = [sequences(texts, teacher, counts[kind], f"{name}, {kind}") for kind, texts in kinds.items()]
        write_rows(args.out / f"{name}.safetensors", teacher, np.concatenate(parts), name)
    return 0


def fit_documents(data: Path) -> dict[str, Iterable[str]]:
    """{kind: texts} of everything that may be fitted on."""
    return {
        "gsm8k": prompts_and_completions(data / "gsm8k-train.jsonl"),
        "instructions": prompts_and_completions(data / "instructions-train.jsonl"),
        "documentation": documentation(fit_half=True),
    }


def measured_documents(data: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """(kind, texts) of everything that is measured: no text that shares a passage with what may be fitted on."""
    fitted = set().union(*(passages(texts) for texts in fit_documents(data).values()))
    measured = {
        "gsm8k": prompts_and_completions(data / "gsm8k-eval.jsonl"),
        "instructions": prompts_and_completions(data / "instructions-eval.jsonl"),
        "documentation": documentation(fit_half=False),
        "source": python_source(),
    }
    for kind, texts in measured.items():
        yield kind, [text for text in texts if not passages([text]) & fitted]


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


def documentation(*, fit_half: bool) -> list[str]:
    """The distinct paragraphs of one half of Python's documentation, page by page; equal words are one paragraph."""
    seen: set[str] = set()
    pages = []
    for _, page in sorted(python_documentation().items()):
        kept = []
        for paragraph in paragraphs(page):
            words = " ".join(paragraph.split())
            if words not in seen and is_held_out(paragraph, 0.5) != fit_half:
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
