"""distillation_loss: KL to a compressed teacher plus cross-entropy, the front door of the losses.

Checks the arguments, finds the rows that count, and hands them to the path that fits the tensors (dispatch.py): the
Triton kernel or row chunks in plain PyTorch. reference.py is the same loss written for reading.
"""

from torch import Tensor

from logitstore_kernels.dispatch import loss_rows
from logitstore_kernels.loss_arguments import DistillationLossParts, checked_rows, reduce_rows
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch


def distillation_loss(
    student_logits_NV: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    inplace: bool = False,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weights_N: Tensor | None = None,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
) -> Tensor:
    """alpha * T^2 * KL(p || q) + (1 - alpha) * CE in nats, p the teacher at T, q = softmax(student_logits / T).

    CE = -ln softmax(student_logits)[label] by default. Rows are aligned: logits row i, teacher row i and label i speak
    of the same next token. With k = V this is the usual loop over full teacher logits t and student logits s,

        0.7 * kl_div(log_softmax(s / T), softmax(t / T), "batchmean") * T * T + 0.3 * cross_entropy(s, y)

    except that the mean is over the rows that count, where "batchmean" divides its sum by all rows; the two are equal
    when no row is ignored. A row counts if its label is not ignore_index and its teacher row is present. Any other is
    in neither term nor in the denominator and has a gradient of exactly 0, even if its logits are NaN.

    student_logits_NV: [N, V] or wider, any float dtype. Columns at or beyond t.vocab_size (padding of the model's head)
        take no part in a softmax and have a gradient of 0.
    t: TeacherBatch of N rows; its log-probs are at T = 1 and are tempered here.
    labels_N: [N] int64 or int32.
    temperature: T > 0, for both sides. The factor T^2 keeps the gradient's size as T grows.
    alpha: in [0, 1]; at 0 and 1 the term without weight is not computed.
    tail: what is asked of the tokens that are not entries of a teacher row.
        "bucket": that their summed probability be right. A KL over K + 1 outcomes.
        "uniform": that each have an equal share of it. A KL over V outcomes.
        "dense": that each have the probability which the batch's dense_tail says (TeacherBatch.with_dense_tail). At T
            its logits are divided by T, the tail's mass is that of the moments. A KL over V outcomes; "uniform" is the
            case of equal logits.
        "renormalised": that they have none; p is the head scaled to mass 1. A KL, but not 0 at the teacher itself:
            there it is -ln(kept mass) at T = 1, and it pushes the student above the teacher on every entry.
        "dropped": nothing; p is the head as it is, sum over entries of p ln(p / q). Not a KL: it is negative for a
            student that puts more mass on the entries than the teacher does.
        "sampled": the only one for TeacherBatch.from_samples, and at T = 1 alone. Sum over samples of w ln(w / q),
            with a gradient of q * sum(w) - w. Where the weights w are unbiased, the gradient's expectation is that of
            the KL to the whole teacher; the value's lies above that KL by an amount that is the same for every student.
    reduction: "none" gives [N] (0 in rows that do not count), "sum" their sum, "mean" the sum over the number of rows
        that count, or over num_items_in_batch (int or one-element tensor) where that is given. The mean of no row is 0.
    num_items_in_batch: an int must be positive. A tensor, whose value is not read, may be 0, as it is for an optimizer
        step whose every label is ignored; then no row counts, not even one with a label, which such a count rules out.
    inplace: True writes the gradient over student_logits_NV (mutates it; its version counter moves on) and saves a
        tensor of that size; only where a gradient is wanted. The logits must not be used again; of a leaf the .grad
        would be the leaf's own memory.
    label_smoothing: e in [0, 1): CE is (1 - e) * -ln p[label] - e * the mean of ln p over the vocabulary.
    z_loss: adds z_loss * (ln sum of e^logits)^2 to CE (PaLM, Chowdhery et al. 2022), so it has its weight, too.
    softcap: c > 0 puts c * tanh(logits / c) in the logits' place, in both terms; -inf stays -inf. None for none.
    row_weights_N: [N] of any float dtype, finite: each row's loss is multiplied with its weight. The denominator of
        "mean" does not know them (num_items_in_batch=row_weights_N.sum() makes it a weighted mean). A row of weight 0
        has a gradient of exactly 0.
    divergence: what stands in the KL's place, and the tails that it is defined for. p and q are over entries and tail
        ("bucket", "renormalised") or over all tokens ("uniform", "dense").
        "forward_kl": KL(p || q), for every tail.
        "reverse_kl": KL(q || p), for bucket, uniform and dense; infinite where the teacher's tail has tokens, no mass.
        "jsd": b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = jsd_beta in (0, 1); for bucket, uniform,
            renormalised and dense.
        "tvd": half the sum of |p - q|, for the same tails.

    Computes in float32 (float64 for float64 logits). The gradient has the logits' dtype and cannot be differentiated
    again. Nothing is synchronised with the host, and the loss is a scalar on the logits' device. Label smoothing,
    z-loss and softcap are slower where there is no kernel (chunked_reference.py); divergences other than forward KL
    have none: row chunks under autograd compute them. Under torch.compile inplace is left to the compiler; the kernel
    is one operator of the graph, row chunks break it.

    Raises TypeError / ValueError for arguments that do not go together, among them a student narrower than
    t.vocab_size, a temperature other than 1 with "sampled" or without t.tail_logmoment_half_N (neither at alpha 0, the
    latter not for "renormalised"), a tail for which the TeacherBatch has no data or the divergence is not defined, and
    on a CPU a label outside the vocabulary or a reverse KL that is infinite.
    """
    terms = LossTerms(
        temperature, alpha, tail, alpha != 0, alpha != 1, label_smoothing, z_loss, softcap, divergence, jsd_beta
    )
    return _loss_parts(
        student_logits_NV, t, labels_N, terms, ignore_index, reduction, num_items_in_batch, inplace, row_weights_N
    ).loss


def distillation_loss_parts(
    student_logits_NV: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    inplace: bool = False,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weights_N: Tensor | None = None,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
) -> DistillationLossParts:
    """(loss, kl, ce) with loss = alpha * T^2 * kl + (1 - alpha) * ce; arguments and errors as in distillation_loss.

    kl is the KL at T in nats WITHOUT the factor T^2, and ce the cross-entropy at T = 1 in nats, label smoothing and
    z-loss included where they are asked for. Both are reduced as the loss is (mean or sum over the same rows with the
    same denominator, or [N] for "none"), come from the same pass, are detached and stay on the device: read them when
    you log. Both are computed even where their weight is 0, so the half moment is needed at alpha 0, too. With another
    divergence than forward KL, kl is that divergence.
    """
    terms = LossTerms(temperature, alpha, tail, True, True, label_smoothing, z_loss, softcap, divergence, jsd_beta)
    return _loss_parts(
        student_logits_NV, t, labels_N, terms, ignore_index, reduction, num_items_in_batch, inplace, row_weights_N
    )


def _loss_parts(
    student_logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    terms: LossTerms,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    inplace: bool,
    row_weights_N: Tensor | None,
) -> DistillationLossParts:
    checked = checked_rows(
        student_logits_NW, teacher, labels_N, terms, ignore_index, reduction, num_items_in_batch, row_weights_N
    )
    rows = loss_rows(
        student_logits_NW, teacher, labels_N, checked.counted_N, checked.terms, expected_upstream=checked.weight,
        inplace=inplace,
    )  # fmt: skip
    return reduce_rows(*rows, checked.weight, reduction)
