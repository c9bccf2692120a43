"""What differs between two tokenizers of one token map: special tokens, what is put before a text, chat template.

None of it makes stored ids mean other tokens, so nothing is refused; but a student that ends its texts otherwise than
its tokenizer expects does not stop when it generates. The store's side is read from the tokenizer's files beside it.
Token maps that differ are another matter: see student.check_tokenizer.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from logitstore.tables import checked_tokenizer_folder, tables_path

if TYPE_CHECKING:
    from os import PathLike

    from logitstore import StoreSpec

_ROLES = {
    "bos": "prompts should begin as the store's texts do",
    "eos": "the student learns to end as the store's texts do, and generation that waits for the other does not stop",
    "pad": "pads are masked, so training is the same; batches of prompts are padded with the student's own",
    "unk": "text that the vocabulary lacks becomes another id than in the store",
}


def special_token_notes(
    store_path: "str | PathLike[str] | None", spec: "StoreSpec", tokenizer: Any, *, name: str = "the student"
) -> list[str]:
    """One line for each thing in which a tokenizer differs from the store's, and what it means; [] where none does.

    tokenizer: of the model that is called `name`, with the store's token map. A store that names tokenizer files which
    are not beside it gets a line that says so; one that names none cannot be compared and gets none.

    Raises CorruptionError for files with another hash than the store states.
    """
    if store_path is None or spec.tokenizer_files_sha256 is None:
        return []
    folder = checked_tokenizer_folder(store_path, spec.tokenizer_files_sha256)
    if folder is None:
        return [
            f"special tokens and chat template of {name} are not compared with the store's: the tokenizer's files are "
            f"not in {tables_path(store_path)}; copy that folder along with the store"
        ]
    from logitstore_trainer.collect.teacher import load_tokenizer
    from logitstore_trainer.collect.teacher_source import TeacherSource

    try:
        ours = load_tokenizer(TeacherSource("the store's tokenizer", str(folder)))
        return list(_differences(ours, tokenizer, name))
    except ValueError as error:
        return [f"special tokens and chat template of {name} are not compared with the store's: {error}"]


def say_notes(notes: Iterable[str]) -> None:
    """Prints each note as a line on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _differences(ours: Any, theirs: Any, name: str) -> Iterable[str]:
    from logitstore_trainer.collect.tokenise import prefix_ids

    in_roles = set()
    for role, meaning in _ROLES.items():
        our_token, their_token = (getattr(each, f"{role}_token", None) for each in (ours, theirs))
        in_roles |= {our_token, their_token}
        if our_token != their_token:
            yield f"{role} token: {_shown(our_token)} in the store, {_shown(their_token)} in {name}: {meaning}"
    our_prefix, their_prefix = (each.convert_ids_to_tokens(prefix_ids(each)) for each in (ours, theirs))
    if our_prefix != their_prefix:
        yield (
            f"before a text: {_listed(our_prefix)} in the store, {_listed(their_prefix)} in {name}: "
            "prompts should begin as the store's texts do"
        )
    our_special, their_special = (_special(each) - in_roles for each in (ours, theirs))
    if our_special != their_special:
        only_ours, only_theirs = _listed(our_special - their_special), _listed(their_special - our_special)
        yield (
            f"special tokens: {only_ours} in the store alone, {only_theirs} in {name} alone: the ids are the same, but "
            "decoding without special tokens drops others, and text that spells them may be split otherwise"
        )
    if ours.chat_template != theirs.chat_template:
        if ours.chat_template is None:
            yield f"chat template: the store has none, {name} has one: nothing in the store is written in it"
        else:
            its = "none" if theirs.chat_template is None else "another"
            yield (
                f"chat template: {name} has {its}: conversations of the store are written in the store's, so that is "
                "the one to prompt the student in"
            )


def _special(tokenizer: Any) -> set[str]:
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _shown(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _listed(tokens: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(tokens))) or "nothing"
