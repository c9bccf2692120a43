"""DenseTail: the shape of each row's tail as low-rank logits, r numbers a row and one basis for the vocabulary.

The logits of all V tokens of a chunk of rows are one matrix product into a buffer of the caller's; nothing of N * V
elements is made. A basis of another dtype than the buffer's is converted a block at a time, again for every chunk: with
bfloat16 that costs up to a quarter of the loss's time on a CPU, and saves a copy of the whole basis (113 MB at
V = 49,152 and r = 576). On CUDA a float32 product follows torch.set_float32_matmul_precision, as every other of the
program does.

Letters: N rows, C rows of a chunk, V vocabulary, r coefficients. T is the temperature.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from logitstore_kernels.tensor_checks import check_tensor

MAX_COEFS = 1024
# A converted block should stay in a core's own cache until it is multiplied; an accelerator wants few launches.
_CPU_BLOCK_BYTES = 1 << 20
_ACCELERATOR_BLOCK_BYTES = 32 << 20
_COEF_DTYPES = (torch.float32, torch.float64)
_BASIS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class DenseTail:
    """Tail logits at T = 1 up to one constant a row: coefs_Nr @ basis_Vr^T + bias_V, of which tail tokens are used.

    coefs_Nr: float32 or float64, finite in rows that have a tail, anything elsewhere; r in [1, 1024].
    basis_Vr, bias_V: float16, bfloat16, float32 or float64, finite (which is not checked: it would read V * r numbers
        at every step).

    Raises TypeError / ValueError for a wrong dtype or shape, and for tensors on different devices.
    """

    coefs_Nr: Tensor
    basis_Vr: Tensor
    bias_V: Tensor

    def __post_init__(self) -> None:
        check_tensor("coefs_Nr", self.coefs_Nr, n_axes=2, dtypes=_COEF_DTYPES)
        check_tensor("basis_Vr", self.basis_Vr, n_axes=2, dtypes=_BASIS_DTYPES)
        check_tensor("bias_V", self.bias_V, n_axes=1, dtypes=_BASIS_DTYPES)
        n_coefs = self.coefs_Nr.shape[1]
        if not 1 <= n_coefs <= MAX_COEFS:
            raise ValueError(f"coefs_Nr must have 1 to {MAX_COEFS} coefficients a row, got {n_coefs}")
        if self.basis_Vr.shape[1] != n_coefs:
            raise ValueError(
                f"basis_Vr has {self.basis_Vr.shape[1]} columns but coefs_Nr {n_coefs} coefficients a row; "
                "both must be r"
            )
        if not self.coefs_Nr.device == self.basis_Vr.device == self.bias_V.device:
            raise ValueError(
                f"coefs_Nr is on {self.coefs_Nr.device}, basis_Vr on {self.basis_Vr.device}, bias_V on "
                f"{self.bias_V.device}; move them to one device"
            )

    def check_against(self, *, n_rows: int, vocab_size: int, device: torch.device) -> None:
        """Raise ValueError unless this is the tail of n_rows rows over vocab_size tokens on that device."""
        n_coefs = self.coefs_Nr.shape[1]
        expected = {
            "coefs_Nr": (self.coefs_Nr, (n_rows, n_coefs), "ids_NK"),
            "basis_Vr": (self.basis_Vr, (vocab_size, n_coefs), "vocab_size and coefs_Nr"),
            "bias_V": (self.bias_V, (vocab_size,), "vocab_size"),
        }
        for name, (value, shape, other) in expected.items():
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape} to go with {other}, got {tuple(value.shape)}")
        if self.coefs_Nr.device != device:
            raise ValueError(
                f"coefs_Nr is on {self.coefs_Nr.device} but ids_NK is on {device}; move the whole batch with "
                ".to(device)"
            )

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "DenseTail":
        """This tail with every tensor on `device`; tensors that are there already are not copied."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return DenseTail(**{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})

    def tokens(self, tokens: slice) -> "DenseTail":
        """The same rows' logits of these tokens alone, as views."""
        return DenseTail(self.coefs_Nr, self.basis_Vr[tokens], self.bias_V[tokens])

    def write_logits(self, out_CV: Tensor, coefs_Cr: Tensor, *, temperature: float) -> None:
        """Mutates out_CV to (coefs_Cr @ basis_Vr^T + bias_V) / T; both are of the dtype to compute in, without graphs.

        coefs_Cr: what is used of this tail's own coefficients, [C, r].
        """
        beta, dtype = 1 / temperature, out_CV.dtype
        basis_Vr, bias_V = self.basis_Vr, self.bias_V
        n_tokens = len(basis_Vr)
        if basis_Vr.dtype != dtype:
            block_bytes = _CPU_BLOCK_BYTES if out_CV.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
            n_tokens = max(1, block_bytes // (dtype.itemsize * basis_Vr.shape[1]))
        for start in range(0, len(basis_Vr), n_tokens):
            tokens = slice(start, start + n_tokens)
            basis_rV, bias_block_V = basis_Vr[tokens].to(dtype).T, bias_V[tokens].to(dtype)
            # An op with out= is one that autocast leaves alone.
            torch.addmm(bias_block_V, coefs_Cr, basis_rV, beta=beta, alpha=beta, out=out_CV[:, tokens])
