"""Packed samples give the loss and the gradients of separate ones, in float64, and models that mix them are refused."""

import copy

import pytest
import torch
from logitstore_kernels import distillation_loss
from logitstore_trainer import DistillationLoss, DistillationTrainer, TeacherDecoder, collate, collate_packed
from logitstore_trainer.cli import main
from logitstore_trainer.collator import next_token_labels
from logitstore_trainer.packing import SAMPLE_PLACES, model_inputs, require_packing
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)

V = 97
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )
    ),
    "qwen2, sliding window": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, use_sliding_window=True, sliding_window=4,
            max_window_layers=1,
        )
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
}  # fmt: skip


def new_model(kind, attention="sdpa"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[kind]()
    model.set_attn_implementation(attention)
    return model.double().eval()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def summed_loss(loss, model, batch):
    """The sum over a batch's valid tokens."""
    logits_BLV = model(**model_inputs(batch)).logits
    assert logits_BLV.dtype == torch.float64
    return loss(logits_BLV, batch, 1.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_is_separate(kind, attention, mode, store):
    """Every sample alone, in a batch of its own, against all of them in fewer rows."""
    samples = list(store)
    separate, packed_model = new_model(kind, attention), new_model(kind, attention)
    for model in (separate, packed_model):
        model.train(mode == "train")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    loss = DistillationLoss(store, temperature=2.0, alpha=0.7)
    batch = collate_packed(samples)
    assert batch["input_ids"].shape[0] < len(samples)
    packed = summed_loss(loss, packed_model, batch)
    packed.backward()
    total = 0.0
    for sample in samples:
        part = summed_loss(loss, separate, collate([sample]))
        part.backward()
        total += float(part.detach())
    assert float(packed.detach()) == pytest.approx(total, rel=1e-10)
    expected = gradients(separate)
    norm = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients(packed_model).items():
        assert float((gradient - expected[name]).abs().max()) <= 1e-10 * norm, name


@pytest.mark.parametrize("trap", ["mask of ones", "cache", "positions that go on"])
def test_the_ways_to_call_it_wrongly_do_change_the_loss(trap, store):
    """What the test above would find: documents that see each other are off by far more than 1e-10."""
    batch, model = collate_packed(list(store)), new_model("llama")
    inputs = model_inputs(batch)
    right = model(**inputs).logits
    if trap == "mask of ones":
        inputs["attention_mask"] = torch.ones_like(batch["input_ids"])
    elif trap == "cache":
        inputs["use_cache"] = True
    else:
        inputs["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    assert float((model(**inputs).logits - right).detach().abs().max()) > 1e-2


def test_rows_hold_each_sample_once_and_whole(store):
    samples = list(store)
    batch, padded = collate_packed(samples, pad_token_id=5), collate(samples, pad_token_id=5)
    assert "attention_mask" not in batch
    places = batch[SAMPLE_PLACES]
    assert batch["input_ids"].shape[1] == padded["input_ids"].shape[1] == places.shape[1]
    used = places[places >= 0]
    assert len(used) == len(set(used.tolist())) == sum(len(sample.input_ids) for sample in samples)
    for s, sample in enumerate(samples):
        n = len(sample.input_ids)
        own = places[s, :n]
        assert own.tolist() == list(range(int(own[0]), int(own[0]) + n))
        assert int(own[0]) // places.shape[1] == int(own[-1]) // places.shape[1]
        assert batch["position_ids"].flatten()[own].tolist() == list(range(n))
        for name in set(padded) - {"attention_mask"}:
            assert torch.equal(batch[name].flatten(0, 1)[own].nan_to_num(99.0), padded[name][s, :n].nan_to_num(99.0)), (
                name
            )
        assert int(batch["labels"].flatten()[own[0]]) == -100
        assert int((batch["teacher_ids"].flatten(0, 1)[own[-1]] >= 0).sum()) == 0
    empty = torch.ones(batch["input_ids"].numel(), dtype=torch.bool)
    empty[used] = False
    assert set(batch["input_ids"].flatten()[empty].tolist()) <= {5}
    assert set(batch["labels"].flatten()[empty].tolist()) <= {-100}
    assert set(batch["position_ids"].flatten()[empty].tolist()) <= {0}
    assert int((batch["teacher_ids"].flatten(0, 1)[empty] >= 0).sum()) == 0


def test_samples_of_one_length_stay_a_row_each_and_one_sample_is_a_row(store):
    sample = store[3]
    batch = collate_packed([sample, sample])
    assert batch["input_ids"].shape == (2, len(sample.input_ids))
    assert collate_packed([sample])["input_ids"].shape == (1, len(sample.input_ids))


class MixesDocuments(torch.nn.Module):
    """A causal model for which positions are of no account and the row is one text."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, 8)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids=None, use_cache=None):
        hidden_BLD = self.embedding(input_ids).cumsum(dim=1)
        return type("Output", (), {"logits": hidden_BLD @ self.embedding.weight.T})


class TakesNoPositions(MixesDocuments):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_keep_documents_apart_are_taken_and_left_as_they_were(kind, dtype):
    model = new_model(kind).to(dtype).train()
    before = copy.deepcopy(model.state_dict())
    require_packing(model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_models_that_cannot_be_packed_are_refused_in_one_line():
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.3)
    )
    for model, message in (
        (MixesDocuments(), r"MixesDocuments cannot be packed: its logits of a document change by"),
        (MixesDocuments().to(torch.bfloat16), r"MixesDocuments cannot be packed: its logits of a document change by"),
        (TakesNoPositions(), r"TakesNoPositions cannot be packed: it takes no position_ids"),
        (mamba, r"MambaForCausalLM cannot be packed"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            require_packing(model)
        assert "\n" not in str(caught.value)
        assert "train without packing" in str(caught.value)


def trainer_of(model, store, folder, **settings):
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", max_steps=2, per_device_train_batch_size=6,
        gradient_accumulation_steps=2, learning_rate=0.5, optim="sgd", max_grad_norm=0.0, logging_steps=1, seed=1,
        lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    return DistillationTrainer(
        model=model, args=args, train_dataset=store, eval_dataset=store, temperature=2.0, alpha=0.7, **settings
    )


def test_the_trainer_learns_the_same_from_packed_batches(store, tmp_path):
    trainers = []
    for pack in (False, True):
        trainer = trainer_of(new_model("llama"), store, tmp_path / str(pack), pack=pack)
        trainer.train()
        trainers.append(trainer)
    separate, packed = trainers
    for (name, expected), got in zip(separate.model.named_parameters(), packed.model.parameters(), strict=True):
        assert float((expected - got).abs().max()) <= 1e-10 * max(float(expected.abs().max()), 1.0), name
    assert packed.n_tokens_seen() == separate.n_tokens_seen()
    metrics = [trainer.evaluate() for trainer in trainers]
    for name in ("eval_loss", "eval_kl", "eval_ce"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)


def test_the_trainer_refuses_what_cannot_be_packed(store, tmp_path):
    class MixingLlama(LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = MixingLlama(new_model("llama").config)
    trainer_of(model, store, tmp_path)
    with pytest.raises(ValueError, match="MixingLlama cannot be packed"):
        trainer_of(model, store, tmp_path, pack=True)
    with pytest.raises(ValueError, match="pack=True and a data_collator exclude each other"):
        trainer_of(new_model("llama"), store, tmp_path, pack=True, data_collator=collate)


def test_train_takes_pack(store_path, tmp_path):
    options = ["--data", str(store_path), "--steps", "2", "--batch-size", "6", "--device", "cpu"]
    shape = ["--student", "llama:layers=1,width=16,heads=1"]
    assert main(["train", *shape, *options, "--out", str(tmp_path / "packed"), "--pack"]) == 0
    assert main(["train", *shape, *options, "--out", str(tmp_path / "separate")]) == 0
    packed, separate = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "separate"))
    for name, tensor in separate.items():
        assert torch.allclose(packed[name], tensor, rtol=0, atol=2e-4), name


def test_the_decoder_gives_each_place_the_teacher_of_its_sample(store):
    samples, decoder = list(store), TeacherDecoder(store)
    packed, padded = collate_packed(samples), collate(samples)
    logits_SMV = torch.randn(
        *padded["input_ids"].shape, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    places = packed[SAMPLE_PLACES]
    logits_NV = torch.zeros(packed["input_ids"].numel(), V, dtype=torch.float64)
    logits_NV[places[places >= 0]] = logits_SMV[places >= 0]
    losses = [
        distillation_loss(logits, decoder(batch), next_token_labels(batch["labels"]), temperature=2.0, alpha=0.7)
        for logits, batch in ((logits_NV, packed), (logits_SMV.flatten(0, 1), padded))
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-12)
