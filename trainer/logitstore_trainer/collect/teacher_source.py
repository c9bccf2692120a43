"""Where a teacher is (a folder, a .gguf file or the hub) and which one it is, without reading its weights.

A name on the hub is looked up once, with one attempt of five seconds, and pinned to the commit found, so that a
model that changes in the middle of a run is not mixed with itself. Where the hub cannot be reached the commit in the
local cache is used. (from_pretrained itself would retry for 20 seconds per file.)
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (  # HTTPError: the base of the HTTP client's errors, whichever client the hub uses
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)

_HUB_TIMEOUT_S = 5.0
_ENDS_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 16
_N_BLOCKS = 256


@dataclass(frozen=True)
class TeacherSource:
    """What from_pretrained needs. `name` is as the user gave it; `revision` is a commit on the hub."""

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    cached_only: bool = False

    def from_pretrained_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        if self.cached_only:
            arguments["local_files_only"] = True
        return arguments


def locate_teacher(name: str) -> TeacherSource:
    """Returns where the model is. Raises OSError or ValueError in one line if it is nowhere."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"name the file: {path / found[0]}" if found else "check --teacher"
            raise FileNotFoundError(f"{name}: a folder without a config.json, so not a model; {hint}")
        return TeacherSource(name, str(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{name}: a file; expected a folder, a .gguf file or a name on the hub")
        return TeacherSource(name, str(path.parent), gguf_file=path.name)
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local or path.suffix.lower() == ".gguf":
        raise FileNotFoundError(f"{name}: no such folder or .gguf file; check --teacher")
    return locate_on_hub(name)


def fingerprint(source: TeacherSource) -> str:
    """Returns a SHA-256 (hex) that tells one teacher from another, in seconds even for large ones.

    On the hub: of name and commit. On disk: of config.json, and of each weight file its name, size, first and last
    MiB and 256 blocks of 64 KiB spread evenly, so that a fine-tune that leaves most tensors alone is still seen.
    Where the folder lies does not matter.
    """
    if source.revision:
        return hashlib.sha256(json.dumps(["hub", source.location, source.revision]).encode()).hexdigest()
    folder = Path(source.location)
    files = [folder / source.gguf_file] if source.gguf_file else _model_files(folder)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        _digest_sampled(file, size, digest)
    return digest.hexdigest()


def generation_config_sha256(source: TeacherSource) -> str | None:
    """Returns the SHA-256 (hex) of generation_config.json, which says where a completion that the teacher writes ends.

    None where there is none, and on the hub, whose commit the fingerprint has. It is no part of the fingerprint: stores
    of one teacher belong together, whoever wrote their texts.
    """
    file = Path(source.location) / "generation_config.json"
    if source.revision or not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def teacher_fingerprint(name: str) -> str:
    """Returns fingerprint(locate_teacher(name)); the weights are not loaded."""
    return fingerprint(locate_teacher(name))


def locate_on_hub(name: str) -> TeacherSource:
    """Returns the model (a student's, too) at its commit on the hub, or in the local cache if the hub is unreachable.

    Raises ValueError for what is no name, and OSError where no such model is to be had, in one line and within seconds.
    """
    try:
        found = huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        return TeacherSource(name, name, revision=found.sha)
    except HFValidationError:
        raise ValueError(f"{name!r}: no such folder, and not a name that the hub could have; check the name") from None
    except GatedRepoError:
        raise PermissionError(
            f"{name}: gated on the hub; accept its licence on its page there and run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: no such folder here and no such model on the hub (or a private one: `hf auth login`)"
        ) from None
    except (OSError, HTTPError):  # unreachable, or HF_HUB_OFFLINE
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        raise FileNotFoundError(
            f"{name}: no such folder here, not in the local cache, and the hub cannot be reached; "
            f"check the name or the connection"
        )
    return TeacherSource(name, name, revision=Path(cached).parent.name, cached_only=True)


def _model_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return [folder / "config.json", *weights]


def _digest_sampled(file: Path, size: int, digest: Any) -> None:
    with file.open("rb") as stream:
        if size <= 2 * _ENDS_BYTES + _N_BLOCKS * _BLOCK_BYTES:
            while block := stream.read(_ENDS_BYTES):
                digest.update(block)
            return
        digest.update(stream.read(_ENDS_BYTES))
        for i in range(_N_BLOCKS):
            stream.seek(size * i // _N_BLOCKS)
            digest.update(stream.read(_BLOCK_BYTES))
        stream.seek(size - _ENDS_BYTES)
        digest.update(stream.read(_ENDS_BYTES))
