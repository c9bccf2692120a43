"""Which codec a collection stores with: the one that is named, the one of an earlier run, or one that is fitted first.

What has to be fitted is fitted once, to a sample of the data set, before the first shard. A run that goes on reads what
the first one left in `x.parquet.tables/`; it never fits again, since that could give another codec.
"""

import time
from dataclasses import replace

import logitstore
from logitstore.codecs.registry import CONFIG_FILE, Codec, load_codec, with_tables_of
from logitstore.errors import SpecMismatchError
from logitstore.fit_cache import FitCache, default_cache_folder
from logitstore.spec import require_same_spec
from logitstore.tables import tables_path
from logitstore.work_folder import has_samples, read_plan, work_path
from logitstore_trainer.collect.settings import AUTO, CollectSettings
from logitstore_trainer.collect.size import PlannedSize
from logitstore_trainer.collect.source import Source
from logitstore_trainer.collect.store_spec import store_spec
from logitstore_trainer.collect.teacher_sample import TeacherSample, default_rows, draw_sample
from logitstore_trainer.plan.page import choice_text, warnings_of
from logitstore_trainer.plan.plan import PLAN_FILE, make_plan
from logitstore_trainer.plan.sample import TextsOf
from logitstore_trainer.progress import StageProgress
from logitstore_trainer.units import bytes_text, duration_text


def settled_codec(source: Source, settings: CollectSettings) -> Codec | None:
    """The codec of this collection as far as it can be told without fitting one: None where that is still to be done.

    Raises ValueError for options that make no codec and a plan that found none, SpecMismatchError for tables of another
    vocabulary and where settings.out holds samples of another collection, FileNotFoundError or CorruptionError where
    its tables are missing or damaged.
    """
    if settings.tables is not None:
        return _codec_of_tables(source, settings)
    named = None
    if settings.codec != AUTO:
        named = logitstore.make_codec(settings.codec, vocab_size=source.info.vocab_size, **settings.codec_options)
    return _codec_of_earlier_run(source, settings, named) if settings.is_to_fit else named


def fitted_codec(source: Source, settings: CollectSettings, size: PlannedSize) -> Codec:
    """The codec fitted to a sample of the data set, and with `--codec auto` chosen on it; says what it took.

    Raises ValueError where no configuration reaches the goal or the data set is too small.
    """
    start_s = time.monotonic()
    sample = draw_sample(source, size, settings.plan_rows or default_rows(size))
    about = f"{int(sample.row_counts.sum()):,} rows of {len(sample.texts):,} texts spread over {sample.name}"
    cache = FitCache(default_cache_folder(), source.say) if settings.use_cache else None
    if settings.goal is not None:
        source.say(f"choosing a codec on {about}: {settings.goal.text()}")
        return _chosen_codec(sample, settings, size, cache, source, start_s)
    source.say(f"fitting the codec to {about}")
    unfitted = logitstore.make_codec(settings.codec, vocab_size=source.info.vocab_size, **settings.codec_options)
    with StageProgress() as display:
        cache = cache and replace(cache, say=display.between_stages(source.say))
        texts = TextsOf(sample, range(len(sample.texts)))
        codec = unfitted.calibrated(texts, on_progress=display, cache=cache)
    assert codec.tables is not None
    tables = f"{bytes_text(len(codec.tables.file_bytes))} of tables in {tables_path(settings.out)}"
    source.say(f"fitted in {duration_text(time.monotonic() - start_s)}: {tables}")
    return codec


def _chosen_codec(
    sample: TeacherSample,
    settings: CollectSettings,
    size: PlannedSize,
    cache: FitCache | None,
    source: Source,
    start_s: float,
) -> Codec:
    assert settings.goal is not None
    goal = replace(settings.goal, tokens=settings.goal.tokens or size.n_stored_rows)
    planned = make_plan(sample, goal, seed=settings.seed, cache=cache)
    for warning in warnings_of(planned, goal):
        source.say(f"warning: {warning}")
    text = choice_text(planned, goal)
    codec = planned.codec
    if codec is None:
        raise ValueError(f"{text}; ask for less, or see what there is: logitstore plan --teacher ... --dataset ...")
    source.say(f"chosen in {duration_text(time.monotonic() - start_s)}: {text}")
    if codec.is_fitted:
        source.say(f"its tables: {tables_path(settings.out)}")
    return codec


def _codec_of_tables(source: Source, settings: CollectSettings) -> Codec:
    assert settings.tables is not None
    is_saved = (settings.tables / CONFIG_FILE).is_file()
    if not is_saved and (settings.tables / PLAN_FILE).is_file():
        raise ValueError(
            f"--tables {settings.tables} holds a plan without a codec: nothing reached its goal, or it was "
            "interrupted; plan again"
        )
    codec = load_codec(settings.tables) if is_saved else logitstore.open(settings.tables).spec.codec
    if codec.vocab_size != source.info.vocab_size:
        raise SpecMismatchError(
            f"--tables {settings.tables}: fitted for a vocabulary of {codec.vocab_size:,}, {source.info.name} has "
            f"{source.info.vocab_size:,}; fit a codec to this teacher"
        )
    return codec


def _codec_of_earlier_run(source: Source, settings: CollectSettings, named: Codec | None) -> Codec | None:
    """The codec that an earlier run of the same collection into settings.out fitted, None where there was none."""
    plan = read_plan(settings.out)
    if plan is not None:
        found, where = plan.spec, f"the unfinished store in {work_path(settings.out)}"
        advice = f"choose another --out, or delete {work_path(settings.out)} to start anew"
    elif settings.out.exists():
        found, where = logitstore.open(settings.out).spec, str(settings.out)
        advice = "choose another --out, or delete that store"
    else:
        return None
    codec = found.codec if named is None or _unfitted_config(found.codec) == named.config else named
    try:
        require_same_spec(found, store_spec(source, settings, codec), where=where, advice=advice)
    except SpecMismatchError:
        if has_samples(settings.out):
            raise
        return None
    return with_tables_of(codec, tables_path(settings.out))


def _unfitted_config(codec: Codec) -> dict:
    return {name: value for name, value in codec.config.items() if name != "tables"}
