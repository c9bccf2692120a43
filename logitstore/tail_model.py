"""The tail model: what the tail of a row looks like, from what a decoder knows of the row anyway.

It maps the current token, the next token, the head's ids and log-probs and the tail's moments, of a row and of the
rows around it, to r coefficients c; the tail's logits are basis_Vr @ c + bias_V. Two steps: the posterior mean of a
linear-Gaussian model (prior from the two tokens, the head's log-probs as measurements up to one unknown constant), then
a small network that adds what is not linear. All arithmetic is float32; the same code runs where a codec encodes
(corrections are coded against the prediction) and where a batch is decoded.

Cost of a row at 16 entries, width p = 192, 224 hidden units, r = 576: 0.495 M multiply-adds (see `row_macs`).

torch is imported inside the functions, so that `import logitstore` does not load it.

Letters: B batch, L rows of the longest sequence, K entries, V vocabulary, r coefficients, p width of the embedding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError

if TYPE_CHECKING:
    from torch import Tensor

MEASURED_ENTRIES = 32  # of a row's head; the posterior does not look at later ones
CONTEXT_WIDTH = 64
WINDOWS = (8, 64)  # rows before a row whose mean it sees; and the mean of the whole sequence
N_SCALARS = 7
_SHAPES = {
    "basis": "Vr",
    "bias": "V",
    "embedding": "Vp",
    "embedding_bias": "V",
    "column_weights": "V",
    "prior": "p",
    "current_map": "pp",
    "next_map": "pp",
    "factor": "pp",
    "noise": "2",
    "context_map": "pc",
    "hidden_map": "nh",
    "hidden_bias": "h",
    "output_map": "hp",
    "output_bias": "p",
    "coefs_map": "pr",
    "coefs_bias": "r",
}
_HALF = ("basis", "embedding")


@dataclass(frozen=True, eq=False)
class TailModel:
    """The arrays of a fitted tail model: float16 for basis [V, r] and embedding [V, p], else float32 (see _SHAPES:
    V, r, p as above, h hidden units, n their inputs, c the context's width).

    Raises CorruptionError for arrays that do not fit together.
    """

    arrays: dict[str, NDArray]

    def __post_init__(self) -> None:
        missing = sorted(set(_SHAPES) ^ set(self.arrays))
        if missing:
            raise CorruptionError(f"a tail model has the arrays {', '.join(_SHAPES)}; missing or unknown: {missing}")
        sizes = {"c": CONTEXT_WIDTH, "2": 2}
        for name, letters in _SHAPES.items():
            array = self.arrays[name]
            dtype = np.float16 if name in _HALF else np.float32
            if array.dtype != dtype or array.ndim != len(letters):
                raise CorruptionError(f"tail model's {name} is {array.dtype} {array.shape}, expected {dtype.__name__} ")
            for letter, size in zip(letters, array.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise CorruptionError(f"tail model's {name} has shape {array.shape}, {letter} is {sizes[letter]}")
            if not np.isfinite(array).all():
                raise CorruptionError(f"tail model's {name} holds NaN or infinity")
        if sizes["n"] != n_inputs(sizes["p"]):
            raise CorruptionError(f"tail model's network takes {sizes['n']} inputs, expected {n_inputs(sizes['p'])}")

    @property
    def vocab_size(self) -> int:
        return self.arrays["basis"].shape[0]

    @property
    def rank(self) -> int:
        """r, the number of coefficients."""
        return self.arrays["basis"].shape[1]

    def row_macs(self, n_entries: int) -> int:
        """Multiply-adds of one row with that many entries."""
        p, h = self.arrays["embedding"].shape[1], self.arrays["hidden_bias"].shape[0]
        k = min(n_entries, MEASURED_ENTRIES)
        posterior = 2 * p * p + k * p + k * k * p + k * k * k + k * p + p * p
        network = p * CONTEXT_WIDTH + n_inputs(p) * h + h * p
        return posterior + network + p * self.rank


def n_inputs(width: int) -> int:
    """Inputs of the network: posterior, prior, scalars, and context (two neighbours, the windows, the sequence)."""
    return 2 * width + N_SCALARS + CONTEXT_WIDTH * (3 + len(WINDOWS))


class TailInputs:
    """What the model sees of a batch of sequences: current and following ids [B, L] int64, head ids [B, L, K] int64 (-1
    in pads), logps [B, L, K] float32, tail_logmass and tail_logmoment_half [B, L] float32. A row without entries is
    absent: it is not predicted, and no other row sees it."""

    def __init__(self, current: "Tensor", following: "Tensor", ids: "Tensor", logps: "Tensor", *moments: "Tensor"):
        self.current, self.following = current, following
        self.ids, self.logps = ids[..., :MEASURED_ENTRIES], logps[..., :MEASURED_ENTRIES]
        self.n_entries = (ids >= 0).sum(-1)
        self.tail_logmass, self.tail_logmoment_half = moments


def predicted_coefs(tensors: dict[str, "Tensor"], inputs: TailInputs) -> "Tensor":
    """The predicted coefficients [B, L, r] float32; 0 in absent rows.

    tensors: the model's arrays as float32 tensors on the inputs' device, see `model_tensors`.
    """
    width = latent_mean(tensors, inputs)
    coefs = width @ tensors["coefs_map"] + tensors["coefs_bias"]
    return coefs * (inputs.n_entries > 0)[..., None]


def latent_mean(tensors: dict[str, "Tensor"], inputs: TailInputs) -> "Tensor":
    """The prediction in the p dimensions of the embedding [B, L, p], before coefs_map."""
    import torch

    present = inputs.n_entries > 0
    prior, posterior = _posterior(tensors, inputs)
    context = (posterior @ tensors["context_map"]) * present[..., None]
    features = torch.cat([posterior, prior, _scalars(inputs), *_surroundings(context, present)], dim=-1)
    hidden = torch.nn.functional.silu(features @ tensors["hidden_map"] + tensors["hidden_bias"])
    return posterior + hidden @ tensors["output_map"] + tensors["output_bias"]


def _posterior(tensors: dict[str, "Tensor"], inputs: TailInputs) -> tuple["Tensor", "Tensor"]:
    """(prior mean, posterior mean given the head's log-probs up to a constant) [B, L, p]."""
    import torch

    embedding = tensors["embedding"]
    prior = (
        tensors["prior"]
        + embedding[inputs.current] @ tensors["current_map"]
        + embedding[inputs.following] @ tensors["next_map"]
    )
    kept = (inputs.ids >= 0).float()
    ids = inputs.ids.clamp(min=0)
    expected = (embedding[ids] @ prior[..., None])[..., 0] + tensors["embedding_bias"][ids]
    surprise = torch.where(inputs.ids >= 0, inputs.logps - expected, 0.0)
    surprise = (surprise - surprise.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)) * kept
    scaled = tensors["scaled_embedding"][ids] * kept[..., None]
    noise, unknown = tensors["noise"].exp()
    gram = scaled @ scaled.transpose(-1, -2) + unknown * kept[..., None] * kept[..., None, :]
    gram = gram + torch.diag_embed(noise + (1 - kept))
    weights = _solve(gram, surprise)
    return prior, prior + ((scaled.transpose(-1, -2) @ weights[..., None])[..., 0]) @ tensors["factor"].T


def _solve(gram: "Tensor", right: "Tensor") -> "Tensor":
    """gram^-1 right for positive definite [.., K, K]; by elimination where the device has no Cholesky (MPS)."""
    import torch

    if gram.device.type != "mps":
        return torch.cholesky_solve(right[..., None], torch.linalg.cholesky(gram))[..., 0]
    rows = torch.cat([gram, right[..., None]], dim=-1)
    for j in range(gram.shape[-1]):
        pivot = rows[..., j : j + 1, :] / rows[..., j : j + 1, j : j + 1]
        column = rows[..., :, j : j + 1].clone()
        column[..., j : j + 1, :] = 0
        rows = rows - column * pivot
        rows[..., j : j + 1, :] = pivot
    return rows[..., -1]


def _scalars(inputs: TailInputs) -> "Tensor":
    """[B, L, 7]: moments, first and last log-prob and number of entries, scaled to the order of 1."""
    import torch

    mass = inputs.tail_logmass.nan_to_num(0.0, neginf=-40.0).clamp(min=-40.0)
    excess = (inputs.tail_logmoment_half - inputs.tail_logmass / 2).nan_to_num(0.0, neginf=0.0, posinf=0.0)
    odds = mass - torch.log(-torch.expm1(mass.clamp(max=-1e-6)))
    kept = inputs.ids >= 0
    first = inputs.logps[..., 0].clamp(min=-40.0)
    last = torch.where(kept, inputs.logps, 0.0).amin(-1).clamp(min=-40.0)
    n_entries = inputs.n_entries.clamp(min=1).float().log()
    scalars = [mass / 4, excess / 2, mass.exp(), odds.clamp(-40.0, 40.0) / 4, first / 2, last / 4, n_entries / 2]
    return torch.stack(scalars, dim=-1).nan_to_num(0.0, neginf=-10.0)


def _surroundings(context: "Tensor", present: "Tensor") -> list["Tensor"]:
    """Context of the rows before and behind [B, L, c] each, and means over windows before and over the sequence."""
    import torch

    pad = torch.nn.functional.pad
    around = [pad(context[:, :-1], (0, 0, 1, 0)), pad(context[:, 1:], (0, 0, 0, 1))]
    sums = pad(context.cumsum(1), (0, 0, 1, 0))
    counts = pad(present.float().cumsum(1), (1, 0))
    length = context.shape[1]
    row = torch.arange(length, device=context.device)
    for window in WINDOWS:
        begin = (row - window).clamp(min=0)
        n_rows = (counts[:, row] - counts[:, begin]).clamp(min=1)
        around.append((sums[:, row] - sums[:, begin]) / n_rows[..., None])
    whole = sums[:, -1:] / counts[:, -1:, None].clamp(min=1)
    return [*around, whole.expand(-1, length, -1)]


def model_tensors(model: TailModel, device: Any = "cpu") -> dict[str, "Tensor"]:
    """The model's arrays on a device, in float32 but for the basis, and the scaled embedding that rows gather from."""
    import torch

    tensors = {}
    for name, array in model.arrays.items():
        tensor = torch.from_numpy(array).to(device)
        tensors[name] = tensor if name == "basis" else tensor.float()
    tensors["scaled_embedding"] = tensors["embedding"] @ tensors["factor"]
    return tensors
