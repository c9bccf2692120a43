"""Made-up teacher logits for when the user has none at hand: seeded, peaked, and in the very format of a real file.

They show that the benchmark runs and roughly where the codecs lie; they are not evidence about any model, and every
page that shows them says so. Over a Zipf-like vocabulary rows have an entropy of about 3.4 nats and their 64 most
probable tokens 88 % of the mass, much as on running text, and neighbouring rows resemble each other; but their tail
is Gaussian.

Letters: S samples, L length, N = S * L tokens, V vocabulary, D width.
"""

from pathlib import Path

import numpy as np

SEED = 0
_PEAK_NATS = 4.4
_MEMORY = 0.7


def write_synthetic_logits(
    path: Path, *, n_samples: int = 8, length: int = 129, vocab_size: int = 32_000, width: int = 96
) -> Path:
    """Writes hidden [N, D] and lm_head [V, D] as float16 with input_ids and sample_lengths, and returns the path.

    Column 0 of hidden is 1 and carries the token frequencies. Each token is drawn from the row before it.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(SEED)
    lm_head_VD = rng.standard_normal((vocab_size, width)) / np.sqrt(width - 1)
    frequency_rank_V = rng.permutation(vocab_size) + 10.0
    lm_head_VD[:, 0] = -np.log(frequency_rank_V)
    hidden_SLD = rng.standard_normal((n_samples, length, width))
    for position in range(1, length):
        hidden_SLD[:, position] *= np.sqrt(1 - _MEMORY**2)
        hidden_SLD[:, position] += _MEMORY * hidden_SLD[:, position - 1]
    hidden_SLD *= _PEAK_NATS
    hidden_SLD[:, :, 0] = 1.0
    hidden_ND = hidden_SLD.reshape(-1, width).astype(np.float16)
    lm_head_VD = lm_head_VD.astype(np.float16)
    input_ids = _drawn_tokens(rng, hidden_ND, lm_head_VD)
    lengths = np.full(n_samples, length, np.int64)
    tensors = {"hidden": hidden_ND, "lm_head": lm_head_VD, "input_ids": input_ids, "sample_lengths": lengths}
    save_file(tensors, str(path))
    return path


def _drawn_tokens(rng: np.random.Generator, hidden_ND: np.ndarray, lm_head_VD: np.ndarray) -> np.ndarray:
    """Token i + 1 from row i, by the Gumbel trick; token 0 of the file is 0."""
    input_ids = np.zeros(len(hidden_ND), np.int64)
    lm_head_DV = lm_head_VD.astype(np.float32).T
    for row in range(len(hidden_ND) - 1):
        logits_V = hidden_ND[row].astype(np.float32) @ lm_head_DV
        input_ids[row + 1] = int(np.argmax(logits_V + rng.gumbel(size=logits_V.shape)))
    return input_ids
