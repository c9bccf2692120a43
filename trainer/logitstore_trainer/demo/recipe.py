"""The two recipes of the demo: FULL, whose numbers mean something, and QUICK, which only shows that everything runs.

The teacher learns all of the training text, the students half of its pages: as elsewhere, the teacher has seen more
than what it is asked about, and what it says of a page carries some of the rest. FULL was settled on seeds 0 and 11,
which are not among those that it is reported on (benchmarks/results/demo_seeds.jsonl).
"""

from dataclasses import dataclass

from logitstore_trainer.demo.models import TeacherTraining
from logitstore_trainer.student import LlamaShape


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run. length: tokens of a sample, for teacher and students. transfer_share: of the teacher's pages,
    what it is asked about and the students learn. student: a shape as build_student reads it. k: tokens kept of each
    distribution. max_tokens: of each store, None for all the text."""

    name: str
    vocab_size: int
    length: int
    teacher: LlamaShape
    training: TeacherTraining
    transfer_share: float
    student: str
    student_steps: int
    student_batch_size: int
    student_lr: float
    k: int
    max_tokens: int | None = None


FULL = Recipe(
    name="full",
    vocab_size=2048,
    length=128,
    teacher=LlamaShape(layers=4, width=192, heads=6, mlp=512),
    training=TeacherTraining(steps=800, batch_size=8, length=128, lr=1e-3),
    transfer_share=0.5,
    student="llama:layers=2,width=96,heads=3",
    student_steps=700,
    student_batch_size=8,
    student_lr=2e-3,
    k=64,
)
QUICK = Recipe(
    name="quick",
    vocab_size=512,
    length=64,
    teacher=LlamaShape(layers=1, width=64, heads=2, mlp=128),
    training=TeacherTraining(steps=40, batch_size=8, length=64, lr=5e-3),
    transfer_share=0.5,
    student="llama:layers=1,width=32,heads=1",
    student_steps=20,
    student_batch_size=8,
    student_lr=5e-3,
    k=256,
    max_tokens=4_000,
)
