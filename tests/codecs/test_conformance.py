"""Every codec of the registry passes the conformance kit, and the kit finds the faults that it is there to find."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard

import logitstore
from logitstore.codecs import conformance
from logitstore.codecs.registry import CODECS
from logitstore.codecs.topk import TopKCodec
from logitstore.head_values import HEAD_FORMATS, HEADS

CONFIGURATIONS = [
    *({"name": "topk", "k": 12, "head": head} for head in HEADS),
    {"name": "topk", "k": 24, "head": "log", "head_step": 0.5, "min_prob": 0.02},
    *({"name": "varopt", "head": head, "seed": 5} for head in HEAD_FORMATS),
    {"name": "varopt", "max_weight": 0.07},
    {"name": "rskd"},
    {"name": "rskd", "draws": 255, "seed": 7},
]
FITTED = [
    *({"name": "topk", "k": 12, "head": head} for head in HEADS),
    {"name": "topk", "k": 24, "head": "log", "head_step": 0.5, "min_prob": 0.02},
    {"name": "topk", "k": 24, "head": "int8", "top_p": 0.9},
]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: "-".join(map(str, config.values())))
def test_codec_conforms(config: dict[str, Any]) -> None:
    for codec in conformance.variants(logitstore.make_codec(vocab_size=300, **config)):
        conformance.check_codec(codec)


@pytest.mark.parametrize("config", FITTED, ids=lambda config: "-".join(map(str, config.values())))
def test_fitted_codec_conforms(config: dict[str, Any]) -> None:
    codec = conformance.fitted(logitstore.make_codec(vocab_size=300, **config))
    assert codec.tables is not None
    for variant in conformance.variants(codec):
        conformance.check_codec(variant)


@pytest.mark.parametrize("options", [{}, {"tail_step": 0.5}, {"tail_step": 2.0, "min_prob": 0.02}], ids=str)
def test_codec_with_a_predicted_tail_conforms(options: dict[str, Any]) -> None:
    """Fitted at one vocabulary: a tail model takes its time."""
    rng = np.random.default_rng(0)
    logits = [(4 * rng.standard_normal((30, 300))).astype(np.float32) for _ in range(8)]
    input_ids = [rng.integers(0, 300, 30) for _ in logits]
    codec = logitstore.make_codec("topk", vocab_size=300, k=12, head="log", tail="predicted", **options)
    conformance.check_codec(logitstore.calibrate(codec, logits, input_ids))


def test_every_codec_of_the_registry_is_checked_and_has_an_id_of_its_own() -> None:
    assert {config["name"] for config in CONFIGURATIONS} == set(CODECS)
    codecs = [logitstore.make_codec(name, vocab_size=300) for name in CODECS]
    codecs += [codec for codec in map(conformance.fitted, codecs) if codec.tables_sha256 is not None]
    assert sorted(codec.codec_id for codec in codecs) == [1, 2, 3, 4]


def forgets_determinism(codec: TopKCodec, logits, input_ids, keep_mask=None):
    noisy = np.asarray(logits) + np.random.default_rng().standard_normal(logits.shape)
    return TopKCodec.targets_from_logits(codec, noisy.astype(np.float32), input_ids, keep_mask)


def keeps_every_row(codec: TopKCodec, logits, input_ids, keep_mask=None):
    return TopKCodec.targets_from_logits(codec, logits, input_ids)


def hands_out_what_it_does_not_store(codec: TopKCodec, logits, input_ids, keep_mask=None):
    targets = TopKCodec.targets_from_logits(codec, logits, input_ids, keep_mask)
    return dataclasses.replace(targets, tail_logmass=targets.tail_logmass - np.float32(1e-6))


def writes_into_the_logits(codec: TopKCodec, logits, input_ids, keep_mask=None):
    logits += 1
    return TopKCodec.targets_from_logits(codec, logits, input_ids, keep_mask)


def decodes_anything(codec: TopKCodec, blob, input_ids):
    try:
        return TopKCodec.decode(codec, blob, input_ids)
    except logitstore.LogitStoreError:
        return TopKCodec.targets_from_logits(codec, np.zeros((len(input_ids), codec.vocab_size)), input_ids)


def allocates_before_it_looks(codec: TopKCodec, blob, input_ids):
    with contextlib.suppress(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompress(bytes(blob))
    return TopKCodec.decode(codec, blob, input_ids)


def takes_any_targets(codec: TopKCodec, targets, input_ids):
    return TopKCodec.encode(codec, dataclasses.replace(targets, input_ids=np.asarray(input_ids)), input_ids)


def forgets_its_tables(codec: TopKCodec, folder):
    TopKCodec.save(dataclasses.replace(codec, tables_sha256=None, tables=None), folder)


def test_the_kit_finds_a_codec_that_is_saved_without_its_tables() -> None:
    codec = conformance.fitted(TopKCodec(vocab_size=50, k=5))
    conformance.check_config(codec)
    options = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    faulty = type("Faulty", (TopKCodec,), {"save": forgets_its_tables, "__eq__": lambda a, b: a.config == b.config})
    with pytest.raises(AssertionError, match="load_codec gives another configuration"):
        conformance.check_config(faulty(**options))


@pytest.mark.parametrize(
    ("method", "fault", "check", "message"),
    [
        ("targets_from_logits", forgets_determinism, conformance.check_determinism, "peaked: the same call again"),
        ("targets_from_logits", keeps_every_row, conformance.check_rows, "absent: present rows are not keep_mask's"),
        ("targets_from_logits", hands_out_what_it_does_not_store, conformance.check_round_trip, "in tail_logmass"),
        ("targets_from_logits", writes_into_the_logits, conformance.check_determinism, "has changed the logits"),
        ("decode", decodes_anything, conformance.check_damage, r"byte 0 of \d+ changed by 0x01 was accepted, and what"),
        ("decode", decodes_anything, conformance.check_bindings, "a token longer was accepted"),
        ("decode", allocates_before_it_looks, conformance.check_claimed_sizes, "64 MiB of content took 67,.* bytes"),
        ("encode", takes_any_targets, conformance.check_bindings, "targets of other tokens was accepted|raised"),
    ],
)
def test_the_kit_finds(method: str, fault: Callable, check: Callable, message: str) -> None:
    faulty = type("Faulty", (TopKCodec,), {method: fault})(vocab_size=50, k=5)
    with pytest.raises(AssertionError, match=message):
        check(faulty)
    check(TopKCodec(vocab_size=50, k=5))


def test_a_failed_check_names_itself_and_the_codec() -> None:
    faulty = type("Faulty", (TopKCodec,), {"targets_from_logits": hands_out_what_it_does_not_store})(vocab_size=50, k=5)
    with pytest.raises(AssertionError, match=r"check_round_trip of .*'name': 'topk'.*: peaked: decode\(encode"):
        conformance.check_codec(faulty)
