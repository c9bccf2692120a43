"""TeacherBatch: what it keeps, what it derives, and every batch that it refuses."""

import math

import pytest
import torch
from logitstore_kernels import TeacherBatch, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference

IDS = torch.tensor([[4, 1], [0, -1], [-1, -1]], dtype=torch.int32)
LOGPROBS = torch.tensor([[0.5, 0.25], [0.75, 1.0], [1.0, 1.0]]).log()
MASS = torch.tensor([0.25, 0.25, math.nan]).log()
HALF = torch.tensor([0.1, 0.2, math.nan])


def batch_with(*, ids=IDS, logprobs=LOGPROBS, mass=MASS, half=HALF, vocab_size=5):
    return TeacherBatch.from_topk(ids, logprobs, mass, half, vocab_size=vocab_size)


def test_it_holds_what_it_was_given():
    t = batch_with()
    assert torch.equal(t.ids_NK, IDS)
    assert torch.equal(t.logprobs_NK, LOGPROBS)
    assert torch.equal(t.tail_logmoment_half_N[:2], HALF[:2])
    assert t.n_rows == 3
    assert t.present_N.tolist() == [True, True, False]
    assert t.n_tail_N.tolist() == [3, 4, 5]
    assert t.gather_ids_NK.tolist() == [[4, 1], [0, 0], [0, 0]]
    assert batch_with(half=None).tail_logmoment_half_N is None


def test_floats_are_widened_and_float64_is_kept():
    assert batch_with(logprobs=LOGPROBS.half(), mass=MASS.bfloat16()).tail_logmass_N.dtype == torch.float32
    t = batch_with(logprobs=LOGPROBS.double())
    assert t.logprobs_NK.dtype == t.tail_logmass_N.dtype == t.tail_logmoment_half_N.dtype == torch.float64
    assert torch.equal(t.logprobs_NK, LOGPROBS.double())


def test_uniform_moment_is_that_of_a_flat_tail():
    t = batch_with(half=None).uniform_moment()
    each = torch.tensor([0.25 / 3, 0.25 / 4])  # three and four tokens share a quarter
    expected = (torch.tensor([3.0, 4.0]) * each.sqrt()).log()
    torch.testing.assert_close(t.tail_logmoment_half_N[:2], expected)
    assert torch.equal(t.tail_logmass_N[:2], MASS[:2])


def test_uniform_moment_tempers_a_flat_tail_exactly():
    logits_NV = torch.tensor([[3.0, 2.0, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    logp_NV = logits_NV.log_softmax(-1)
    tail = logp_NV[:, 2:].logsumexp(1)
    t = TeacherBatch.from_topk(torch.tensor([[0, 1]]), logp_NV[:, :2], tail, vocab_size=6).uniform_moment()
    for temperature in (0.7, 1.5, 2.0, 4.0):
        parts = distillation_loss_parts(logits_NV, t, torch.tensor([0]), temperature, tail="uniform")
        assert abs(parts.kl.item()) < 1e-14


def test_to_moves_every_tensor():
    t = batch_with().to("meta")
    devices = {x.device.type for x in (t.ids_NK, t.logprobs_NK, t.tail_logmass_N, t.tail_logmoment_half_N)}
    assert devices == {"meta"}
    assert t.vocab_size == 5
    assert batch_with(half=None).to("cpu").tail_logmoment_half_N is None


def test_from_collated_flattens_batch_and_length():
    batch = {
        "input_ids": torch.zeros(1, 3),
        "teacher_ids": IDS[None],
        "teacher_logprobs": LOGPROBS[None],
        "teacher_tail_logmass": MASS[None],
        "teacher_tail_logmoment_half": HALF[None],
    }
    batch = {key: torch.cat([value, value.flip(1)]) for key, value in batch.items()}
    t = TeacherBatch.from_collated(batch, vocab_size=5)
    assert torch.equal(t.ids_NK, torch.cat([IDS, IDS.flip(0)]))
    assert torch.equal(t.logprobs_NK, torch.cat([LOGPROBS, LOGPROBS.flip(0)]))
    torch.testing.assert_close(t.tail_logmass_N, torch.cat([MASS, MASS.flip(0)]), equal_nan=True)
    torch.testing.assert_close(t.tail_logmoment_half_N, torch.cat([HALF, HALF.flip(0)]), equal_nan=True)
    del batch["teacher_tail_logmoment_half"]
    assert TeacherBatch.from_collated(batch, vocab_size=5).tail_logmoment_half_N is None
    with pytest.raises(ValueError, match="value_table is for one-byte codes, but the batch holds teacher_logprobs"):
        TeacherBatch.from_collated(batch, vocab_size=5, value_table=torch.zeros(256))
    with pytest.raises(ValueError, match=r"teacher_ids must be \[B, L, K\], got shape \(3, 2\)"):
        TeacherBatch.from_collated({**batch, "teacher_ids": IDS}, vocab_size=5)
    del batch["teacher_logprobs"]
    with pytest.raises(ValueError, match=r"the batch lacks teacher_logprobs \(it has input_ids, teacher_ids,"):
        TeacherBatch.from_collated(batch, vocab_size=5)


TABLE = -torch.arange(256, dtype=torch.float32) / 8
CODES = torch.tensor([[4, 9], [2, 255], [0, 0]], dtype=torch.uint8)
SCALE, OFFSET = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([-0.25, 0.125, 0.0])


def batch_of_codes(
    *, ids=IDS, codes=CODES, table=TABLE, scale=SCALE, offset=OFFSET, mass=MASS, half=HALF, vocab_size=5
):
    return TeacherBatch.from_codes(
        ids, codes, table, scale_N=scale, offset_N=offset, tail_logmass_N=mass, tail_logmoment_half_N=half,
        vocab_size=vocab_size,
    )  # fmt: skip


def test_codes_stand_for_scale_times_table_plus_offset():
    t = batch_of_codes()
    assert t.logprobs_NK[:2].tolist() == [[-0.5, -0.8125], [-0.375, -63.625]]
    assert batch_of_codes(scale=None, offset=None).logprobs_NK[:2].tolist() == [[-0.5, -1.125], [-0.25, -31.875]]
    assert torch.equal(t.values_NK, CODES)
    assert (
        batch_of_codes(table=TABLE.double(), scale=SCALE.half(), mass=MASS.bfloat16()).logprobs_NK.dtype
        == torch.float32
    )
    assert {x.device.type for x in (t.to("meta").values_NK, t.to("meta").code_values.scale_N)} == {"meta"}


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalised", "dropped"])
def test_codes_and_their_log_probs_are_one_loss(tail):
    coded, leaf = batch_of_codes(), torch.randn(3, 5, requires_grad=True)
    floats = batch_with(logprobs=coded.logprobs_NK)
    labels_N = torch.tensor([1, 2, 3])
    for loss_parts in (distillation_loss_parts, distillation_loss_parts_reference):
        for got, expected in zip(
            loss_parts(leaf, coded, labels_N, tail=tail), loss_parts(leaf, floats, labels_N, tail=tail), strict=True
        ):
            assert got.item() == expected.item()


def test_a_slot_of_codes_takes_five_bytes():
    n, k = 1024, 64
    ids_NK = torch.arange(k, dtype=torch.int32).expand(n, k).contiguous()
    ids_NK[:, 40:] = -1
    moments_N = torch.full((n,), -3.0)
    t = TeacherBatch.from_codes(
        ids_NK, torch.full((n, k), 7, dtype=torch.uint8), TABLE, scale_N=torch.ones(n), offset_N=torch.zeros(n),
        tail_logmass_N=moments_N, tail_logmoment_half_N=moments_N, vocab_size=49_152,
    )  # fmt: skip
    held = (t.ids_NK, t.values_NK, t.tail_logmass_N, t.tail_logmoment_half_N, *vars(t.code_values).values())
    assert sum(x.nbytes for x in held) == n * k * 5 + n * 16 + 256 * 4


def test_from_collated_takes_codes_with_their_table():
    batch = {
        "teacher_ids": IDS[None], "teacher_codes": CODES[None], "teacher_tail_logmass": MASS[None],
        "teacher_tail_logmoment_half": HALF[None], "teacher_code_scale": SCALE[None],
        "teacher_code_offset": OFFSET[None],
    }  # fmt: skip
    t = TeacherBatch.from_collated(batch, vocab_size=5, value_table=TABLE)
    assert torch.equal(t.logprobs_NK, batch_of_codes().logprobs_NK)
    with pytest.raises(ValueError, match=r"holds teacher_codes.*pass value_table=codec\.value_table"):
        TeacherBatch.from_collated(batch, vocab_size=5)
    del batch["teacher_code_scale"], batch["teacher_code_offset"]
    t = TeacherBatch.from_collated(batch, vocab_size=5, value_table=TABLE)
    assert torch.equal(t.logprobs_NK, TABLE[CODES.int()])


def test_codes_of_a_whole_vocabulary_need_no_half_moment():
    ids_NK, codes_NK = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([[1, 2]], dtype=torch.uint8)
    t = batch_of_codes(
        ids=ids_NK, codes=codes_NK, scale=None, offset=None, mass=torch.tensor([-math.inf]), half=None, vocab_size=2
    )
    assert t.tail_logmoment_half_N.tolist() == [-math.inf]


WRONG_CODES = [
    ({"codes": CODES.int()}, TypeError, r"codes_NK must be torch\.uint8, got torch\.int32"),
    ({"codes": None}, TypeError, "codes_NK must be a torch.Tensor, got NoneType"),
    ({"codes": CODES[:, :1]}, ValueError, r"codes_NK must have shape \(3, 2\).*got \(3, 1\)"),
    ({"table": TABLE[:255]}, ValueError, "value_table_256 must have one number for each of 256 codes, got 255"),
    ({"table": TABLE.int()}, TypeError, r"value_table_256 must be torch\.float32, got torch\.int32"),
    ({"table": TABLE.to("meta")}, ValueError, "value_table_256 is on meta but ids_NK is on cpu"),
    ({"scale": None}, ValueError, "scale_N is missing: give scale_N and offset_N together, or neither"),
    ({"offset": None}, ValueError, "offset_N is missing"),
    ({"scale": SCALE[:2]}, ValueError, r"scale_N must have shape \(3,\).*got \(2,\)"),
    ({"offset": OFFSET[:, None]}, ValueError, r"offset_N must have 1 axes.*got shape \(3, 1\)"),
    ({"mass": MASS[:2]}, ValueError, r"tail_logmass_N must have shape \(3,\).*got \(2,\)"),
    ({"table": torch.full((256,), math.nan)}, ValueError, "row 0 has NaN log-probs"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CODES)
def test_wrong_codes_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        batch_of_codes(**change)


def test_a_batch_without_any_entry_is_all_absent():
    t = TeacherBatch.from_topk(
        torch.empty(3, 0, dtype=torch.int32), torch.empty(3, 0), torch.full((3,), math.nan), torch.full((3,), math.nan),
        vocab_size=5,
    )  # fmt: skip
    assert t.present_N.tolist() == [False, False, False]
    leaf = torch.randn(3, 5, requires_grad=True)
    parts = distillation_loss_parts(leaf, t, torch.tensor([1, 2, 3]))
    parts.loss.backward()
    assert [x.item() for x in parts] == [0, 0, 0]
    assert (leaf.grad == 0).all()


WRONG_TYPES_AND_SHAPES = [
    ({"ids": IDS.tolist()}, TypeError, "ids_NK must be a torch.Tensor, got list"),
    ({"mass": None}, TypeError, "tail_logmass_N must be a torch.Tensor, got NoneType"),
    ({"ids": IDS.to(torch.int16)}, TypeError, r"ids_NK must be torch\.int32 or torch\.int64, got torch\.int16"),
    ({"logprobs": IDS}, TypeError, r"logprobs_NK must be torch\.float32 or torch\.float64, got torch\.int32"),
    ({"mass": IDS[:, 0]}, TypeError, r"tail_logmass_N must be torch\.float32, got torch\.int32"),
    ({"ids": IDS[0]}, ValueError, r"ids_NK must have 2 axes .*got shape \(2,\)"),
    ({"logprobs": LOGPROBS[:, :1]}, ValueError, r"logprobs_NK must have shape \(3, 2\).*got \(3, 1\)"),
    ({"mass": MASS[:2]}, ValueError, r"tail_logmass_N must have shape \(3,\).*got \(2,\)"),
    ({"half": HALF[:2]}, ValueError, r"tail_logmoment_half_N must have shape \(3,\).*got \(2,\)"),
    ({"mass": MASS.to("meta")}, ValueError, "tail_logmass_N is on meta but ids_NK is on cpu"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
    ({"vocab_size": 5.0}, TypeError, "vocab_size must be an int, got float"),
    ({"vocab_size": 1}, ValueError, "ids_NK has 2 entries a row, more than vocab_size=1"),
]
NEGATIVE_IDS, REPEATED_IDS = torch.tensor([[4, 1], [0, -2], [-1, -1]]), torch.tensor([[4, 1], [3, 3], [-1, -1]])
WRONG_VALUES = [
    ({"vocab_size": 4}, r"row 0 has ids outside \[0, 4\).*got \[4, 1\] \(1 such rows\)"),
    ({"ids": NEGATIVE_IDS}, r"row 1 has ids outside \[0, 5\).*got \[0, -2\]"),
    ({"ids": REPEATED_IDS}, r"row 1 has an id more than once.*got \[3, 3\] \(1 such rows\)"),
    ({"logprobs": LOGPROBS * math.nan}, r"row 0 has NaN log-probs.*\(2 such rows\)"),
    ({"mass": torch.tensor([-1.0, 0.5, -1.0])}, r"row 1 has a tail log-mass that is not at most 0.*got 0\.5"),
    ({"mass": torch.tensor([math.nan, -1.0, -1.0])}, "row 0 has a tail log-mass that is not at most 0.*got nan"),
    ({"half": torch.tensor([1.0, math.nan, math.nan])}, "row 1 has entries, yet no tail log-moment"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_TYPES_AND_SHAPES)
def test_wrong_types_and_shapes_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        batch_with(**change)


@pytest.mark.parametrize(("change", "message"), WRONG_VALUES)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match="teacher " + message):
        batch_with(**change)


def test_a_tail_of_no_tokens_has_no_mass():
    ids, logprobs = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.5]]).log()
    with pytest.raises(ValueError, match="row 0 has all 2 tokens as entries, yet a tail log-mass"):
        TeacherBatch.from_topk(ids, logprobs, torch.tensor([-3.0]), vocab_size=2)
