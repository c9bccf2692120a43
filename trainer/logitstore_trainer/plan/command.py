"""`logitstore plan`: its command line. Nothing heavy is imported before it runs, so that --help answers at once."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from logitstore_trainer.collect.settings import add_fitting_arguments
from logitstore_trainer.collect.source_settings import (
    DATASET_SHAPES,
    SourceSettings,
    add_running_arguments,
    add_text_arguments,
    require_positive,
)
from logitstore_trainer.plan.goal import add_goal_arguments, goal_from_arguments

if TYPE_CHECKING:
    from logitstore_trainer.plan.sample import PlanSample

EPILOG = f"""\
Fits what has to be fitted on four fifths of the sample, measures every configuration on the last fifth, prints what
each costs and loses, and recommends one for the goal. With --out it leaves the fitted codec for `collect --tables`.
The sample is either rows of --dataset, spread over it, that --teacher reads, or a file of logits. Where text repeats
itself (quoted passages, templates), a fifth text is easier than new text is: give files of other text of yours, one for
each kind, with --choose-on; kinds count equally, and all of the sample is fitted on.

examples:
  logitstore plan --teacher M --dataset my_prompts.jsonl --max-kl 0.2 --out plan
  logitstore plan --logits sample.safetensors --max-bytes-per-token 24 --tokens 1e9 --out plan-24
  logitstore plan --logits train.safetensors --choose-on maths.safetensors chat.safetensors --max-kl 0.2
  logitstore collect --teacher M --dataset my_prompts.jsonl --out teacher_logits.parquet --tables plan-24

{DATASET_SHAPES}
FILE.safetensors holds input_ids [N] and sample_lengths [S] (integers) and either logits [N, V] or hidden [N, D] with
lm_head [V, D], float16, bfloat16 or float32. 50,000 to 200,000 rows of the text that will be stored are a good sample.

A fitted tail model is kept in $LOGITSTORE_CACHE (else $XDG_CACHE_HOME/logitstore or ~/.cache/logitstore) and found
again for the same rows. Exit code 1: no configuration reaches the goal.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore plan`."""
    parser.epilog = EPILOG
    sampled = parser.add_argument_group("the sample: a teacher and its prompts, or a file")
    sampled.add_argument("--teacher", metavar="M", help="a model: hub name, folder, or .gguf file")
    sampled.add_argument("--dataset", type=Path, metavar="F", help="a .jsonl, .parquet or .txt file")
    sampled.add_argument("--logits", type=Path, metavar="FILE", help="a sample of the teacher's logits")
    sampled.add_argument(
        "--choose-on", type=Path, metavar="FILE", nargs="+", default=[], help="logits of other text, to measure on"
    )
    goal = parser.add_argument_group("the goal")
    add_goal_arguments(goal, required=True, tokens="1e9")
    fitting = parser.add_argument_group("how it is fitted and measured")
    add_fitting_arguments(fitting)
    fitting.add_argument("--rows", type=int, default=1020, metavar="N", help="to measure on (default: 1,020)")
    fitting.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the fitted codec, plan.json and report.html"
    )
    add_text_arguments(parser.add_argument_group("which text, as in `logitstore collect`"))
    add_running_arguments(parser.add_argument_group("how the teacher runs"))


def run(args: argparse.Namespace) -> int:
    """Plans, prints and, where there is a folder, writes; returns the exit code: 1 where nothing reaches the goal."""
    goal = goal_from_arguments(args)
    assert goal is not None
    require_positive("rows", args.rows)
    require_positive("plan_rows", args.plan_rows)
    _require_one_sample(args)
    from logitstore.codecs.registry import remove_saved_codec
    from logitstore.fit_cache import FitCache, default_cache_folder
    from logitstore_trainer.bench.environment import environment, output_folder, write_json
    from logitstore_trainer.plan.page import plan_table, recommendation_lines, write_page
    from logitstore_trainer.plan.plan import PLAN_FILE, make_plan
    from logitstore_trainer.plan.sample import FileSample
    from logitstore_trainer.report import format_table
    from logitstore_trainer.units import duration_text

    folder = output_folder(args.out, "the fitted codec, plan.json and report.html") if args.out is not None else None
    cache = FitCache(default_cache_folder(), print) if args.use_cache else None
    choose_on = [FileSample(path) for path in args.choose_on]
    sample = _sample(args)
    planned = make_plan(sample, goal, choose_on=choose_on, n_rows=args.rows, seed=args.seed, cache=cache)
    print(format_table(*plan_table(planned.results, goal)))
    print(
        f"fitted to {planned.rows_fitted:,} rows, measured on {planned.rows_measured:,} others of "
        f"{planned.texts_measured} texts, in {duration_text(planned.seconds)}"
    )
    print("\n".join(recommendation_lines(planned, goal)))
    if folder is not None:
        facts = environment(
            sample=sample.name,
            chosen_on=[other.name for other in choose_on],
            rows_fitted=planned.rows_fitted,
            rows_measured=planned.rows_measured,
            seconds=planned.seconds,
        )
        shown = {"goal": vars(goal), "results": planned.results, "chosen": planned.chosen, "facts": facts}
        remove_saved_codec(folder)  # first, so that no plan ever stands beside the codec of another
        write_json(folder / PLAN_FILE, shown)
        report = write_page(folder / "report.html", planned, goal, facts)
        if planned.codec is not None:
            planned.codec.save(folder)
            print(f"use it: logitstore collect ... --tables {folder}")
        print(f"report: {report}")
    return 0 if planned.codec is not None else 1


def _require_one_sample(args: argparse.Namespace) -> None:
    if args.logits is None and (args.teacher is None or args.dataset is None):
        raise ValueError("plan needs a sample: --teacher M with --dataset F, or --logits FILE")
    if args.logits is not None and (args.teacher is not None or args.dataset is not None):
        raise ValueError("--logits is a sample already; leave out --teacher and --dataset")
    if args.logits is not None and args.plan_rows is not None:
        raise ValueError("--plan-rows is for --teacher with --dataset; of --logits every row is used")


def _sample(args: argparse.Namespace) -> "PlanSample":
    if args.logits is not None:
        from logitstore_trainer.plan.sample import FileSample

        return FileSample(args.logits)
    values = {name: value for name, value in vars(args).items() if name in SourceSettings.__dataclass_fields__}
    settings = SourceSettings(**values)
    from logitstore_trainer.collect.size import planned_size
    from logitstore_trainer.collect.source import open_source
    from logitstore_trainer.collect.teacher_sample import default_rows, draw_sample

    source = open_source(settings, print)
    if note := source.info.widths_note():
        print(note)
    size = planned_size(source.dataset, source.tokeniser, settings)
    sample = draw_sample(source, size, args.plan_rows or default_rows(size))
    print(f"sample: {int(sample.row_counts.sum()):,} rows of {len(sample.texts):,} texts spread over {sample.name}")
    return sample
