"""The errors of logitstore: one class for each way in which stored bytes can be wrong.

A bad argument is a ValueError or TypeError of Python itself; these classes are for what was read.
"""


class LogitStoreError(Exception):
    """Base of every error about stored data; catch it to catch them all."""


class FormatError(LogitStoreError):
    """The bytes are not, or not wholly, in a format that this version reads."""


class CorruptionError(LogitStoreError):
    """The bytes are in our format, and a checksum or an invariant of theirs does not hold."""


class SpecMismatchError(LogitStoreError):
    """Two things that do not belong together: vocabulary, tokenizer, teacher, codec or temperature."""
