"""The output folder of a training run: what it was started with, its complete checkpoints, and the final model.

Trainer writes a checkpoint as a folder of files in place, so a run that is killed leaves half of one under a name like
any other. A checkpoint counts here once it holds a marker file, written after everything else; what has none is
ignored when resuming and removed. A complete one that was damaged since is named before anything is built, and never
passed over in silence: the run would go on from another step than the user thinks. The final model is written to a side
folder and moved; the metrics come last, so a folder with metrics is a finished run.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.configuration_utils import CONFIG_NAME
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from logitstore.errors import CorruptionError, SpecMismatchError

METRICS_NAME = "train_metrics.json"
_IDENTITY_NAME = "train_config.json"
_MARKER_NAME = "checkpoint_is_complete"
_PARTIAL_NAME = "final-model.partial"
# torch.save raises a bare RuntimeError; these are the C++ parts of it that write.
_TORCH_SAVE_ERRORS = ("inline_container", "PytorchStreamWriter")


class MarkComplete(TrainerCallback):
    """Marks each checkpoint once Trainer has written all of it, and logs what was trained before it.

    The log is part of the checkpoint: without it the steps since the one before would be missing from the history of a
    run that goes on from here. The last step is logged too, so that the history ends where the run does.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank writes its own random state
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _MARKER_NAME).touch()


def last_complete_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    complete = [path for path in _checkpoints(out) if (path / _MARKER_NAME).exists()]
    return max(complete, key=_step, default=None)


def check_last_checkpoint(out: Path) -> None:
    """Reads the checkpoint that a resumed run goes on from, in a few MiB of memory, and checks that it is whole.

    Archives of torch.save have a checksum each entry, safetensors state their length. Raises CorruptionError naming
    the first file that is damaged or missing, and what to do.
    """
    checkpoint = last_complete_checkpoint(out)
    if checkpoint is None:
        return
    others = [path for path in _checkpoints(out) if path != checkpoint and (path / _MARKER_NAME).exists()]
    before = max((_step(path) for path in others), default=None)
    then = "starts anew" if before is None else f"goes on from checkpoint-{before}"
    advice = f"delete the folder {checkpoint}, and --resume {then}"
    for name in (TRAINER_STATE_NAME, SCHEDULER_NAME):
        if not (checkpoint / name).exists():
            raise CorruptionError(f"{checkpoint / name} is missing, so the checkpoint is not whole; {advice}")
    for path in sorted(checkpoint.iterdir()):
        problem = _damage(path)
        if problem is not None:
            raise CorruptionError(f"{path} is damaged ({problem}); {advice}")


def remove_partial(out: Path) -> None:
    """Deletes what a killed or interrupted run left half-written in its output folder."""
    for path in [*_checkpoints(out), out / _PARTIAL_NAME]:
        if path.is_dir() and not (path / _MARKER_NAME).exists():
            shutil.rmtree(path)
    for path in out.glob("*.partial"):
        if path.is_file():
            path.unlink()


def check_folder(out: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Makes the output folder, or checks that the run in it is the one to continue; `identity` is what the run is.

    Raises ValueError if the folder holds something and resume is False, or if that is no training run,
    SpecMismatchError naming both values if it was started with other settings or data, CorruptionError if what it was
    started with cannot be read, OSError if it cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder to make")
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        return
    recorded = out / _IDENTITY_NAME
    if not recorded.exists():
        raise ValueError(f"--out {out} is not empty and holds no training run: choose another folder")
    if not resume:
        raise ValueError(f"--out {out} holds a training run: continue it with --resume, or choose another folder")
    before = _recorded_identity(out)
    now = json.loads(json.dumps(identity))
    before.setdefault("samples_per_step", now["samples_per_step"])  # runs of earlier versions do not say it
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        what = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in differing)
        raise SpecMismatchError(
            f"cannot resume {out}: {what}. Resume with the settings it was started with, or choose another folder"
        )


def recorded_samples_per_step(out: Path) -> int | None:
    """Samples of an optimizer step of the run that `out` holds, None where it holds none."""
    return _recorded_identity(out).get("samples_per_step") if (out / _IDENTITY_NAME).exists() else None


def start_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Records what the run is, once nothing stands in its way, and removes what an earlier one left half-written."""
    write_json(out / _IDENTITY_NAME, identity)
    remove_partial(out)


def read_metrics(out: Path) -> dict[str, Any] | None:
    """The metrics of a finished run, or None. Raises CorruptionError where there are some that cannot be read."""
    path = out / METRICS_NAME
    if not path.exists():
        return None
    return _read_object(path, "delete it, and --resume goes on from the last checkpoint and writes it again")


def save_final_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes safetensors, configuration and tokenizer files into `out`, each file moved there whole.

    Whoever may read config.json may read the weights: safetensors itself writes them for the owner alone.
    """
    partial = out / _PARTIAL_NAME
    model.save_pretrained(str(partial))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    mode = (partial / "config.json").stat().st_mode & 0o777
    for path in sorted(partial.iterdir()):
        path.chmod(mode)
        os.replace(path, out / path.name)
    partial.rmdir()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file of text in UTF-8 that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def write_errors_named(out: Path) -> Iterator[None]:
    """Turns what safetensors and torch.save raise when a disk is full into an OSError that names the folder."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not isinstance(error, SafetensorError) and not any(name in str(error) for name in _TORCH_SAVE_ERRORS):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(
            f"cannot write to {out}, is the disk full? ({reason}) What was complete is kept, --resume continues"
        ) from error


def _recorded_identity(out: Path) -> dict[str, Any]:
    advice = "without it the run cannot be continued: put a whole copy back, or choose another folder"
    return _read_object(out / _IDENTITY_NAME, advice)


def _read_object(path: Path, advice: str) -> dict[str, Any]:
    problem = _json_damage(path)
    if problem is not None:
        raise CorruptionError(f"{path} is damaged ({problem}); {advice}")
    return json.loads(path.read_bytes())


def _damage(path: Path) -> str | None:
    """What is wrong with a file of a checkpoint, None where nothing is or where resuming does not read it."""
    if path.name in (TRAINER_STATE_NAME, CONFIG_NAME):
        return _json_damage(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return None
        except SafetensorError as error:
            return str(error).splitlines()[0]
    if path.suffix in (".pt", ".pth"):
        try:
            with zipfile.ZipFile(path) as archive:
                entry = archive.testzip()
        except zipfile.BadZipFile as error:
            return f"{error}, as where it was cut"
        return None if entry is None else f"the checksum of {entry} in it is wrong"
    return None


def _json_damage(path: Path) -> str | None:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return f"no JSON: {error}"
    return None if isinstance(value, dict) else f"expected a JSON object, got {type(value).__name__}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
