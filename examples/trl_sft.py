"""Distillation in TRL's SFTTrainer. It wants a datasets.Dataset, which here hands out the store's samples by number.

SFTTrainer computes its loss without model.loss_function, so replacing that would train on labels alone; the mixin
replaces compute_loss.
"""

from datasets import Dataset
from logitstore_trainer import DistillationMixin, TeacherDecoder, collate
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import logitstore


def make_trainer(model: PreTrainedModel, args: SFTConfig, tokenizer: PreTrainedTokenizerBase, path: str) -> SFTTrainer:
    """Your SFTTrainer, learning from the store at `path`; args of SFTConfig are changed in two places."""
    # fmt: off
    # plug-in: begin
    store = logitstore.open(path)
    class MyTrainer(DistillationMixin, SFTTrainer):
        pass
    rows = Dataset.from_dict({"row": range(len(store))})
    rows = rows.with_transform(lambda picked: {"sample": [store[i] for i in picked["row"]]})
    args.dataset_kwargs, args.remove_unused_columns = {"skip_prepare_dataset": True}, False
    trainer = MyTrainer(model, args, train_dataset=rows, processing_class=tokenizer, decoder=TeacherDecoder(store),
                        data_collator=lambda rows: collate([row["sample"] for row in rows]))
    # plug-in: end
    # fmt: on
    return trainer
