"""A collection that several processes share: each claims units of rows, and the last one joins them into the store.

Nobody waits: a rank does the units of its own share first, then those that no other rank is at, and ends. So the ranks
need not start together, nor all of them at all, and what a killed one has begun, a rank of any later run goes on with.
"""

from logitstore.tables import put_tokenizer_folder
from logitstore.units import RowRange, Units, shared_units
from logitstore.work_folder import read_plan
from logitstore.writer import Acknowledged
from logitstore_trainer.collect.ranks import Rank
from logitstore_trainer.collect.store_spec import tokenizer_files
from logitstore_trainer.collect.teacher_run import TeacherRun
from logitstore_trainer.collect.unit_rows import unit_ranges
from logitstore_trainer.progress import Progress


def collect_units(run: TeacherRun) -> int:
    """Collects what it can as one of several ranks; returns how many units others are still at, 0: the store is there.

    Raises as collect does.
    """
    rank, say = run.settings.rank, run.say
    units = _units(run)
    if units is None:
        return 0
    run.say_size()
    n_left = units.n_left()
    say(f"{len(units):,} units of rows, {n_left:,} of them to do, for {rank.count} ranks")
    run.n_tokens_to_go = round(run.size.n_tokens * n_left / max(len(units), 1) / rank.count)
    if n_left:
        with Progress(total=run.n_tokens_to_go, desc="collecting", unit="tokens") as shown:
            for number in unit_order(len(units), rank):
                _collect_unit(run, units, number, shown)
        say(f"this run: {run.counts.summary()}")
    n_left = units.n_left()
    if n_left == 0:
        say(f"all {len(units):,} units are done: joining them")
        with run.saying_what_is_safe():
            units.join()
    return n_left


def unit_order(n_units: int, rank: Rank) -> list[int]:
    """Every unit once: the share of this rank, then the others from the last on, so that ranks meet late."""
    own = range(rank.index, n_units, rank.count)
    return [*own, *(number for number in reversed(range(n_units)) if number % rank.count != rank.index)]


def _units(run: TeacherRun) -> Units | None:
    """The units of the store, cut by the first rank that comes here; None where they are joined already."""
    out = run.settings.out

    def cut(done: Acknowledged) -> list[RowRange]:
        with tokenizer_files(run.info) as folder:
            put_tokenizer_folder(folder, out)
        return unit_ranges(run.source, run.size, done)

    alone = read_plan(out)
    return shared_units(out, run.spec, alone.shard_samples if alone is not None else run.shard_samples, cut)


def _collect_unit(run: TeacherRun, units: Units, number: int, shown: Progress) -> None:
    if units.is_done(number):
        return
    with units.writer(number) as writer:
        if writer is None:
            return
        n_before = writer.n_acknowledged
        with run.saying_what_is_safe(writer):
            run.fill(writer, units.plan.ranges[number], shown)
            writer.flush()
        run.n_samples_of_units += writer.n_acknowledged - n_before
