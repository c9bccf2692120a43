"""What a store shares between its shards, in the sibling folder `x.parquet.tables/`.

That is a fitted codec's tables, `<sha256>.safetensors` (see codec_tables.py), and the tokenizer's files,
`<sha256>.tokenizer/`, which let `logitstore head` print text. What is in it is named by the SHA-256 of what it holds,
so that it cannot be confused with another, and is checked before it is used.
"""

import hashlib
import os
import shutil
from pathlib import Path

from logitstore.errors import CorruptionError


def tables_path(store_path: str | os.PathLike[str]) -> Path:
    """`x.parquet.tables` for a store at `x.parquet`."""
    path = Path(store_path)
    return path.with_name(path.name + ".tables")


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and bytes of a folder's files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def tokenizer_folder_path(store_path: str | os.PathLike[str], files_sha256: str) -> Path:
    """Where the tokenizer whose files have this hash lies beside the store, there or not."""
    return tables_path(store_path) / f"{files_sha256}.tokenizer"


def put_tokenizer_folder(source: Path, store_path: str | os.PathLike[str]) -> str:
    """Copies a folder of tokenizer files into the store's tables; returns their hash. Does nothing if it is there."""
    files_sha256 = folder_sha256(source)
    target = tokenizer_folder_path(store_path, files_sha256)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.copytree(source, partial)
        partial.chmod(target.parent.stat().st_mode & 0o777)  # a temporary folder's mode would shut others out
        partial.rename(target)
    return files_sha256


def checked_tokenizer_folder(store_path: str | os.PathLike[str], files_sha256: str | None) -> Path | None:
    """The tokenizer's folder, or None where the store has none beside it.

    Raises CorruptionError where its files do not have the hash that its name and the store state.
    """
    if files_sha256 is None:
        return None
    folder = tokenizer_folder_path(store_path, files_sha256)
    if not folder.is_dir():
        return None
    found = folder_sha256(folder)
    if found != files_sha256:
        raise CorruptionError(
            f"tokenizer files in {folder} have SHA-256 {found}, the store expects {files_sha256}; copy them again"
        )
    return folder
