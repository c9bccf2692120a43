"""topk_with_tail_linear: the same reduction from hidden states and the head, the logits of some rows at a time.

Letters: N rows, C rows of a chunk, D width, K entries kept, V vocabulary.
"""

import torch
from torch import Tensor

from logitstore_kernels.linear_arguments import check_head, logits_dtype
from logitstore_kernels.linear_chunks import LinearHead, free_bytes_on, linear_chunk_rows, new_logits, write_logits
from logitstore_kernels.topk import TopKWithTail, check_topk, topk_with_tail


@torch.no_grad()
def topk_with_tail_linear(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    min_prob: float | None = None,
    chunk_rows: int | None = None,
) -> TopKWithTail:
    """topk_with_tail(logits, k, ...) of logits = softcap * tanh(scale * (hidden_ND @ weight_VD^T + bias) / softcap).

    hidden_ND: [N, D], weight_VD: [V, D] or longer (the padding of a head), bias: as long; one float dtype, which is
        that of the logits (under autocast they have its dtype), so that they are rounded as a Linear's are. softcap
        None: no cap.
    chunk_rows: rows whose logits are held at a time; None for what suits the device (linear_chunk_rows).
    k, vocab_size, min_prob, and what is returned: as in topk_with_tail.

    Raises TypeError / ValueError as topk_with_tail does, for a head whose parts do not go together, and for a scale or
    softcap that is not above 0.
    """
    check_head(hidden_ND, weight_VD, bias)
    for name, value in (("scale", scale), ("softcap", 1.0 if softcap is None else softcap)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    # For the checks of k and its like: logits of the right shape that take no memory.
    logits_NV = hidden_ND.new_empty(1).expand(len(hidden_ND), len(weight_VD))
    _, vocab_size = check_topk(logits_NV, k, vocab_size, min_prob, chunk_rows)
    tokens = slice(0, vocab_size)
    dtype = logits_dtype(hidden_ND)
    hidden_ND = hidden_ND.to(dtype)
    head = LinearHead(hidden_ND, weight_VD[tokens].to(dtype), None if bias is None else bias[tokens].to(dtype))
    n_rows = len(hidden_ND)
    if chunk_rows is None:
        device = hidden_ND.device
        chunk_rows = linear_chunk_rows(
            n_rows, vocab_size, dtype, device, free_bytes=free_bytes_on(device)
        )  # fmt: skip
    buffer_CV = new_logits(head, min(chunk_rows, n_rows))
    parts = []
    for start in range(0, max(n_rows, 1), chunk_rows):
        hidden_CD = hidden_ND[start : start + chunk_rows]
        logits_CV = buffer_CV[: len(hidden_CD)]
        write_logits(logits_CV, hidden_CD, head)
        if scale != 1:
            logits_CV.mul_(scale)
        if softcap is not None:
            logits_CV.div_(softcap).tanh_().mul_(softcap)
        parts.append(topk_with_tail(logits_CV, k, min_prob=min_prob))
    return TopKWithTail(*(torch.cat(column) for column in zip(*parts, strict=True)))
