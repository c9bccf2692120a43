"""Tail models that were fitted before, by the hash of what they were fitted on.

A fit takes minutes, and the same rows with the same settings give the same model: so it is kept, one file each, in the
user's cache folder. A file is the SHA-256 of what follows (32 bytes) and the model's arrays as safetensors; it is
written beside its name and renamed, so that two processes may fit the same rows. The KEPT last used ones stay.

Two runs of a teacher that differ in the last bit of a logit have different rows here, and fit twice.
"""

import contextlib
import hashlib
import inspect
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstore.errors import CorruptionError
from logitstore.tail_model import TailModel

if TYPE_CHECKING:
    from logitstore.tail_fit import TailFitSettings
    from logitstore.tail_rows import TailRows

KEPT = 16
CACHE_VARIABLE = "LOGITSTORE_CACHE"
_SUFFIX = ".tail"
_DIGEST_BYTES = 32


def default_cache_folder() -> Path:
    """$LOGITSTORE_CACHE, else $XDG_CACHE_HOME/logitstore, else ~/.cache/logitstore.

    Raises ValueError where there is no home folder either.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "logitstore"
    try:
        return Path.home() / ".cache" / "logitstore"
    except RuntimeError:
        raise ValueError(f"no home folder to keep fitted tables in; set {CACHE_VARIABLE} to a folder") from None


@dataclass(frozen=True)
class FitCache:
    """Tail models in `folder`, made when the first one is kept. say: gets one line for a model that was found, was
    damaged or could not be kept."""

    folder: Path
    say: Callable[[str], Any] = lambda line: None

    def fitted(self, rows: "TailRows", settings: "TailFitSettings", fit: Callable[[], TailModel]) -> TailModel:
        """The model that was kept for these rows and settings, else fit()'s, which is kept."""
        path = self.folder / f"{fit_sha256(rows, settings)}{_SUFFIX}"
        try:
            model = _read(path, len(rows.lm_head))
        except CorruptionError as error:
            self.say(f"{error}; fitting anew")
            model = None
        if model is not None:
            self.say(f"fitted tables found in {path}")
            with contextlib.suppress(OSError):
                os.utime(path)
            return model
        model = fit()
        try:
            _write(path, model)
            self._drop_the_oldest()
        except OSError as error:
            self.say(f"the fit cannot be kept for another run: {error.filename}: {error.strerror}")
        return model

    def _drop_the_oldest(self) -> None:
        last_used_s = {}
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process may drop it first
                last_used_s[path] = path.stat().st_mtime
        for path in sorted(last_used_s, key=last_used_s.__getitem__)[:-KEPT]:
            path.unlink(missing_ok=True)


def fit_sha256(rows: "TailRows", settings: "TailFitSettings") -> str:
    """SHA-256 (hex) of all that a tail model depends on: the rows, the settings, and the code that fits it."""
    from logitstore import tail_fit, tail_loss, tail_model

    digest = hashlib.sha256()
    for module in (tail_fit, tail_loss, tail_model):
        digest.update(inspect.getsource(module).encode())
    digest.update(repr(sorted(asdict(settings).items())).encode())
    for field in fields(rows):
        value = getattr(rows, field.name)
        for array in value if isinstance(value, tuple) else (value.numpy(),):
            digest.update(f"{field.name} {array.dtype} {array.shape}".encode())
            digest.update(memoryview(array.data).cast("B") if array.flags.c_contiguous else array.tobytes())
    return digest.hexdigest()


def _read(path: Path, vocab_size: int) -> TailModel | None:
    """The model in a file, None where there is none. Raises CorruptionError for one that is damaged."""
    from safetensors.numpy import load

    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise CorruptionError(f"fitted tables in {path} do not have their checksum")
    model = TailModel(load(payload))
    if model.vocab_size != vocab_size:
        raise CorruptionError(f"fitted tables in {path} are for {model.vocab_size} tokens, expected {vocab_size}")
    return model


def _write(path: Path, model: TailModel) -> None:
    from safetensors.numpy import save

    payload = save(dict(model.arrays))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(hashlib.sha256(payload).digest() + payload)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
