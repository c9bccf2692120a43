"""Fingerprints of what a store belongs to: canonical JSON, and the hash of a tokenizer's token map."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_json(value: Any) -> str:
    """SHA-256, in hex, of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def tokenizer_sha256(token_ids: Mapping[str, int]) -> str:
    """SHA-256 of the canonical JSON of the {token: id} map, added tokens included (`tokenizer.get_vocab()`).

    Two tokenizers with the same number are interchangeable for stored ids; two with the same size are not.
    """
    return sha256_json({str(token): int(index) for token, index in token_ids.items()})
