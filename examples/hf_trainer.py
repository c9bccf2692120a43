"""Distillation in a Trainer that is already yours: our dataset, collator and loss in ten lines.

    python examples/hf_trainer.py --data teacher_logits.parquet --student MODEL --out student

The marked lines are all that changes. A Trainer of several processes also multiplies the loss by their number, since
DDP averages gradients; logitstore_trainer.DistillationTrainer does that, logs both parts and checks the tokenizer.
"""

import argparse

from logitstore_kernels import distillation_loss
from logitstore_trainer import TeacherDecoder, collate
from logitstore_trainer.collator import next_token_labels
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import logitstore


def make_trainer(model: PreTrainedModel, args: TrainingArguments, path: str) -> Trainer:
    """Your Trainer, learning from the store at `path`."""
    # fmt: off
    # plug-in: begin
    store = logitstore.open(path)
    decoder = TeacherDecoder(store)
    class MyTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            loss = distillation_loss(outputs.logits.flatten(0, 1), decoder(inputs), next_token_labels(inputs["labels"]),
                                     temperature=2.0, alpha=0.7, num_items_in_batch=num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
    trainer = MyTrainer(model, args, data_collator=collate, train_dataset=store)
    # plug-in: end
    # fmt: on
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a store made by `logitstore collect`")
    parser.add_argument("--student", required=True, help="a causal LM with the teacher's tokenizer")
    parser.add_argument("--out", required=True, help="folder for the trained student")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.student)
    trainer = make_trainer(model, TrainingArguments(output_dir=options.out, report_to="none"), options.data)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
