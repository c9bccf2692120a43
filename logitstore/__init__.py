"""logitstore: a teacher's next-token distributions in tens of bytes a token."""

from logitstore.codecs.registry import calibrate, load_codec, make_codec
from logitstore.errors import CorruptionError, FormatError, LogitStoreError, SpecMismatchError
from logitstore.fingerprint import tokenizer_sha256
from logitstore.logits_source import FactoredLogits
from logitstore.spec import StoreSpec
from logitstore.store import LogitStore, Sample, open
from logitstore.targets import TeacherTargets
from logitstore.verify import VerifyReport, verify
from logitstore.writer import StoreWriter, create

__version__ = "0.1.0"

__all__ = [
    "CorruptionError",
    "FactoredLogits",
    "FormatError",
    "LogitStore",
    "LogitStoreError",
    "Sample",
    "SpecMismatchError",
    "StoreSpec",
    "StoreWriter",
    "TeacherTargets",
    "VerifyReport",
    "calibrate",
    "create",
    "load_codec",
    "make_codec",
    "open",
    "tokenizer_sha256",
    "verify",
]
