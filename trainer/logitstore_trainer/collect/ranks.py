"""Which of several processes this one is: from its options, torchrun's variables, or SLURM's.

A job array of several tasks and the processes of each task make one count: an array of 4 with 8 processes each has 32
ranks. Units of work are claimed one by one (logitstore/units.py), so a rank decides only where a process begins: one
that never starts, or that is started twice, does no harm.
"""

from collections.abc import Mapping
from typing import NamedTuple

# (rank, number of ranks) as launchers state it, the first that is set counts
_PROCESS_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_LOCAL_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID")


class Rank(NamedTuple):
    """Process `index` of `count`; the `local`-th of its machine, counted from 0."""

    index: int = 0
    count: int = 1
    local: int = 0


ALONE = Rank()


def rank_of_process(environment: Mapping[str, str], index: int | None = None, count: int | None = None) -> Rank:
    """The rank that --rank and --ranks state, else the environment of torchrun or SLURM; 0 of 1 where neither does.

    Raises ValueError for numbers that do not make one.
    """
    local = next((_number(environment, name) for name in _LOCAL_VARIABLES if name in environment), 0)
    if index is not None or count is not None:
        if index is None or count is None:
            raise ValueError("--rank and --ranks go together: --rank 2 --ranks 8 is the third of eight processes")
        return _checked(Rank(index, count, local), "--rank", "--ranks")
    inner = ALONE
    for index_name, count_name in _PROCESS_VARIABLES:
        if index_name in environment and count_name in environment:
            inner = Rank(_number(environment, index_name), _number(environment, count_name))
            inner = _checked(inner, index_name, count_name)
            break
    outer = _array_task(environment)
    return Rank(outer.index * inner.count + inner.index, outer.count * inner.count, local)


def _array_task(environment: Mapping[str, str]) -> Rank:
    """The place of a task in its job array, which may start anywhere, go in steps, or be a list of numbers."""
    if "SLURM_ARRAY_TASK_ID" not in environment or "SLURM_ARRAY_TASK_COUNT" not in environment:
        return ALONE
    task, count = _number(environment, "SLURM_ARRAY_TASK_ID"), _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    if count < 1 or step < 1 or task < first:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID {task} of SLURM_ARRAY_TASK_COUNT {count} from SLURM_ARRAY_TASK_MIN {first} in steps "
            f"of {step} is no place in a job array; state it with --rank R --ranks N"
        )
    return Rank((task - first) // step % count, count)


def _checked(rank: Rank, index_name: str, count_name: str) -> Rank:
    if not 0 <= rank.index < rank.count:
        raise ValueError(f"{index_name} {rank.index} of {count_name} {rank.count}: expected 0 to one below the number")
    return rank


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isdecimal():
        raise ValueError(f"the environment has {name}={value!r}, expected a number; or state --rank R --ranks N")
    return int(value)
