"""Logits files: what is read from good ones, and what is said of bad ones."""

import numpy as np
import pytest
import torch
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.bench.synthetic_logits import write_synthetic_logits
from safetensors.torch import save_file

from logitstore.errors import FormatError


def _tensors(**changes):
    """A file of two samples, 3 and 2 tokens, 7 words; a change of None leaves that tensor out."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "input_ids": torch.tensor([1, 2, 3, 4, 5]),
        "sample_lengths": torch.tensor([3, 2]),
        "logits": torch.randn(5, 7, generator=generator),
        **changes,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _file(tmp_path, tensors):
    path = tmp_path / "logits.safetensors"
    save_file(tensors, str(path))
    return LogitsFile(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_samples_are_read_one_by_one_as_they_were_written(tmp_path, dtype):
    tensors = _tensors(logits=_tensors()["logits"].to(dtype))
    file = _file(tmp_path, tensors)
    assert (len(file), file.vocab_size, file.n_tokens) == (2, 7, 5)
    assert file.sample_lengths.tolist() == [3, 2]
    first, second = file[0], file[1]
    assert first.input_ids.tolist() == [1, 2, 3]
    assert second.input_ids.tolist() == [4, 5]
    assert first.input_ids.dtype == np.int32
    assert torch.equal(first.logits, tensors["logits"][:3])
    assert torch.equal(second.logits, tensors["logits"][3:])
    assert second.logits.dtype == dtype
    with pytest.raises(IndexError, match="no sample 2, the file has 2"):
        file[2]


def test_hidden_states_and_a_head_stand_for_their_product(tmp_path):
    hidden, lm_head = torch.randn(5, 3), torch.randn(7, 3).half()
    sample = _file(tmp_path, _tensors(logits=None, hidden=hidden, lm_head=lm_head))[1]
    assert sample.logits.shape == (2, 7)
    assert torch.equal(sample.logits.hidden, hidden[3:])
    assert torch.equal(sample.logits.lm_head, lm_head.float())


_BAD = {
    "no input_ids": (dict(input_ids=None), "no tensor input_ids; expected input_ids"),
    "neither": (dict(logits=None), r"no logits \(tensors: input_ids, sample_lengths\); expected"),
    "half of the factors": (dict(logits=None, hidden=torch.zeros(5, 3)), "no logits .*hidden.*; expected"),
    "both": (dict(hidden=torch.zeros(5, 3), lm_head=torch.zeros(7, 3)), "both logits and hidden with lm_head"),
    "lengths too long": (dict(sample_lengths=torch.tensor([3, 3])), "add up to 6, input_ids has 5"),
    "a sample of one token": (dict(sample_lengths=torch.tensor([4, 1])), "sample 1 has length 1; a sample needs two"),
    "no samples": (
        dict(sample_lengths=torch.zeros(0, dtype=torch.long), input_ids=torch.zeros(0, dtype=torch.long)),
        "sample_lengths is empty",
    ),
    "too few rows": (dict(logits=torch.zeros(4, 7)), "logits has 4 rows for 5 input_ids"),
    "logits of integers": (
        dict(logits=torch.zeros(5, 7, dtype=torch.long)),
        r"logits is I64 \[5, 7\], expected two axes of float16, bfloat16 or float32",
    ),
    "three axes": (dict(logits=torch.zeros(5, 7, 1)), r"logits is F32 \[5, 7, 1\], expected two axes"),
    "ids of floats": (dict(input_ids=torch.zeros(5)), r"input_ids is F32 \[5\], expected one axis of integers"),
    "an id beyond the vocabulary": (
        dict(input_ids=torch.tensor([1, 2, 3, 7, 5])),
        r"input_ids\[3\] is 7, expected 0 to 6, the vocabulary of the logits",
    ),
    "a negative id": (dict(input_ids=torch.tensor([-100, 2, 3, 4, 5])), r"input_ids\[0\] is -100, expected 0 to 6"),
    "widths that differ": (
        dict(logits=None, hidden=torch.zeros(5, 3), lm_head=torch.zeros(7, 4)),
        "lm_head has width 4, hidden has 3",
    ),
}


@pytest.mark.parametrize(("changes", "message"), _BAD.values(), ids=_BAD.keys())
def test_malformed_files_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message) as caught:
        _file(tmp_path, _tensors(**changes))
    assert str(tmp_path / "logits.safetensors") in str(caught.value)


def test_files_that_are_missing_cut_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file; it should be a \.safetensors"):
        LogitsFile(tmp_path / "nothing.safetensors")
    path = tmp_path / "logits.safetensors"
    not_one = r"not a safetensors file, or cut short; expected input_ids \[N\], .*save_file writes it$"
    path.write_text("prompt,completion\n")
    with pytest.raises(FormatError, match=not_one):
        LogitsFile(path)
    save_file(_tensors(), str(path))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match=not_one):
        LogitsFile(path)


def test_made_up_logits_are_the_same_every_time_and_peaked_like_text(tmp_path):
    sizes = dict(n_samples=2, length=40, vocab_size=2000, width=96)
    first = write_synthetic_logits(tmp_path / "a", **sizes).read_bytes()
    assert write_synthetic_logits(tmp_path / "b", **sizes).read_bytes() == first
    file = LogitsFile(tmp_path / "a")
    assert (len(file), file.vocab_size, file.sample_lengths.tolist()) == (2, 2000, [40, 40])
    logits = file[0].logits
    p = (logits.hidden.double() @ logits.lm_head.double().T).softmax(-1)
    entropy_nats = float(-(p * p.log()).sum(-1).mean())
    assert 1.5 < entropy_nats < 4.0
    labels = torch.from_numpy(file[0].input_ids[1:]).long()
    label_p = p[:-1].gather(1, labels[:, None]).mean()
    assert label_p > 20 / 2000  # tokens are drawn from the row before them
