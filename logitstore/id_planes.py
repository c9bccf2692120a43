"""How token ids become bytes: planes of their bytes, lowest first, in the order in which entries are stored.

One, two or three bytes an id, as the vocabulary needs, before zstd. A better coding of ids replaces these two
functions and nothing else of the codecs that call them.

Letters: E entries.
"""

import numpy as np
from numpy.typing import NDArray

from logitstore.planes import PlaneReader, byte_planes


def id_bytes(vocab_size: int) -> int:
    """Bytes of an id before zstd: 1 up to 256 tokens, 2 up to 65,536, else 3."""
    return 1 if vocab_size <= 1 << 8 else 2 if vocab_size <= 1 << 16 else 3


def encode_ids(ids_E: NDArray[np.int32], order_E: NDArray[np.int64], vocab_size: int) -> list[bytes]:
    """The planes of ids_E[order_E]."""
    return byte_planes(ids_E[order_E], id_bytes(vocab_size))


def decode_ids(planes: PlaneReader, order_E: NDArray[np.int64], vocab_size: int) -> NDArray[np.int32]:
    """The ids of which encode_ids made the next planes. Raises CorruptionError where the planes end before that."""
    ids_E = np.empty(len(order_E), np.int32)
    ids_E[order_E] = planes.take_planes(id_bytes(vocab_size), len(order_E), np.int32)
    return ids_E
