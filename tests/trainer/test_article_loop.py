"""The loop that distillation articles show, over our store in place of its loader: the same loss and gradient."""

import numpy as np
import torch
from logitstore_trainer import DistillationLoss, collate
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.data import DataLoader

import logitstore


def test_the_loop_over_the_store_is_our_loss(new_student, teacher_model, tmp_path):
    """Every token is kept and learned, so that the store stands for all of the teacher and both means are over rows."""
    vocab_size = teacher_model.config.vocab_size
    codec = logitstore.make_codec("topk", vocab_size=vocab_size, k=vocab_size, head="fp16", tail="residual")
    rng = np.random.default_rng(3)
    with logitstore.create(
        tmp_path / "all.parquet", logitstore.StoreSpec(codec=codec, vocab_size=vocab_size)
    ) as writer:
        for i in range(4):
            ids = rng.integers(2, vocab_size, size=9).astype(np.int32)
            with torch.no_grad():
                logits = teacher_model(torch.from_numpy(ids)[None].long()).logits[0]
            writer.append(i, ids, codec.targets_from_logits(logits, ids))
    store = logitstore.open(tmp_path / "all.parquet")

    def rows(samples):
        ids = torch.stack([torch.from_numpy(sample.input_ids).long() for sample in samples])
        logits = np.concatenate([sample.targets.dense_logprobs(temperature=1.0) for sample in samples])
        return ids[:, :-1], torch.from_numpy(logits).double(), ids[:, 1:].flatten()

    student, ours = new_student(2).double(), new_student(2).double()
    loader = DataLoader(store, batch_size=4, collate_fn=rows)
    T = 2.0
    for input_ids, t, y in loader:
        s = student(input_ids).logits.flatten(0, 1)
        loss = 0.7 * kl_div(log_softmax(s / T, -1), softmax(t / T, -1), reduction="batchmean") * T * T
        loss = loss + 0.3 * cross_entropy(s, y)
        loss.backward()

    batch = collate(list(store))
    logits = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss_of = DistillationLoss(store, temperature=2.0, alpha=0.7)
    found = loss_of(logits, batch)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for (name, weight), theirs in zip(ours.named_parameters(), student.parameters(), strict=True):
        assert float((weight.grad - theirs.grad).norm()) < 1e-6 * float(theirs.grad.norm()) + 1e-12, name
