"""What every codec must do, as checks that anyone can run on a codec of their own; numpy is all they need.

    for codec in variants(make_codec("mine", vocab_size=1000)):
        check_codec(codec)

Each check takes a codec and raises AssertionError with one line that says what it did wrong. They look at a codec
from outside: logits go in, bytes come out, and what comes back is held to TeacherTargets and to the errors of
logitstore. How close a codec is to its teacher is not judged here.

Letters: L sequence length, R rows, V vocabulary.
"""

import dataclasses
import json
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import pack_blob, unpack_blob
from logitstore.codecs.interface import Codec
from logitstore.codecs.registry import load_codec, make_codec
from logitstore.errors import LogitStoreError
from logitstore.fingerprint import canonical_json
from logitstore.targets import TeacherTargets

VOCAB_SIZES = (1, 2, 17, 256, 257, 1000, 70_001)
MASS_ERROR = 1e-5
CLAIM_BYTES = 64 << 20
ALLOWED_BYTES = 8 << 20


class Case(NamedTuple):
    """One text with its teacher: logits [L, V] float32, input_ids [L] int32, keep_mask [max(L - 1, 0)] bool."""

    name: str
    logits: NDArray[np.float32]
    input_ids: NDArray[np.int32]
    keep_mask: NDArray[np.bool_]


def variants(codec: Codec) -> Iterator[Codec]:
    """The codec, itself with k = 1 where it has an option k, and itself at each of VOCAB_SIZES. Those of a fitted codec
    are fitted to the rows of `cases`."""
    options = {name: value for name, value in codec.config.items() if name != "tables"}
    changes = [{"k": 1}] if "k" in options else []
    changes += [{"vocab_size": vocab_size} for vocab_size in VOCAB_SIZES]
    yield codec
    for change in changes:
        variant = make_codec(**{**options, **change})
        yield variant if codec.tables_sha256 is None else fitted(variant)


def fitted(codec: Codec) -> Codec:
    """The codec calibrated on the rows of `cases`; itself where nothing of it is fitted."""
    samples = [(case.logits, case.input_ids, case.keep_mask) for case in cases(codec.vocab_size)]
    return codec.calibrated(samples)


def require_same(got: Any, expected: Any, what: str) -> None:
    """Raises AssertionError unless all fields of two targets are equal in type and bits (NaN equals NaN)."""
    for field in dataclasses.fields(expected):
        _require_same_value(getattr(got, field.name), getattr(expected, field.name), what, field.name)


def _require_same_value(a: Any, b: Any, what: str, name: str) -> None:
    if isinstance(b, np.ndarray):
        same = isinstance(a, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        _require(same, f"{what} differs in {name}")
    elif isinstance(b, dict) and isinstance(a, dict):
        _require(a.keys() == b.keys(), f"{what} differs in the names of {name}")
        for key in b:
            _require_same_value(a[key], b[key], f"{what}, {name}", key)
    elif dataclasses.is_dataclass(b):
        _require(type(a) is type(b), f"{what} differs in {name}")
        require_same(a, b, f"{what}, {name}")
    else:
        _require(a is b or a == b, f"{what} differs in {name}: {a!r}, expected {b!r}")


def check_codec(codec: Codec) -> None:
    """Runs every check. Raises AssertionError, naming check, configuration and case, at the first that fails."""
    for check in CHECKS:
        try:
            check(codec)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__} of {codec.config}: {error}") from error


def cases(vocab_size: int) -> list[Case]:
    """Texts that codecs stumble over, the same ones at every call."""
    rng = np.random.default_rng(0)

    def case(name: str, length: int = 7, kept: float = 1.0) -> Case:
        logits_LV = (4 * rng.standard_normal((length, vocab_size))).astype(np.float32)
        input_ids = rng.integers(0, vocab_size, length).astype(np.int32)
        return Case(name, logits_LV, input_ids, rng.random(max(length - 1, 0)) < kept)

    peaked, flat, ties, one_hot = case("peaked"), case("flat"), case("ties"), case("one-hot")
    impossible, steep = case("impossible tokens"), case("steep")
    flat.logits[:] = 1.0
    ties.logits[:] = np.round(ties.logits / 4)
    one_hot.logits[:] = -np.inf
    one_hot.logits[:, vocab_size // 2] = 3.0
    impossible.logits[:, rng.random(vocab_size) < 0.6] = -np.inf
    impossible.logits[:, 0] = 0.0
    steep.logits[:] *= 20
    some_absent, all_absent = case("some rows absent", 12, kept=0.5), case("all rows absent", kept=0.0)
    two, one, none = case("two tokens", 2), case("one token", 1), case("no token", 0)
    return [peaked, flat, ties, one_hot, impossible, steep, some_absent, all_absent, two, one, none]


def check_round_trip(codec: Codec) -> None:
    """decode(encode(targets)) is targets, bit for bit but for teacher_coefs, which say what to encode and are not
    stored; and encoding that gives the same bytes."""
    for case in cases(codec.vocab_size):
        targets = _targets(codec, case)
        blob = codec.encode(targets, case.input_ids)
        decoded = codec.decode(blob, case.input_ids)
        require_same(decoded, _as_stored(targets), f"{case.name}: decode(encode(targets))")
        _require(codec.encode(decoded, case.input_ids) == blob, f"{case.name}: what was decoded encodes to other bytes")
        view = codec.decode(memoryview(blob), case.input_ids)
        require_same(view, decoded, f"{case.name}: decoding a memoryview")


def check_determinism(codec: Codec) -> None:
    """The same logits, text and codec give the same targets and bytes, from the caller's or other memory."""
    again = _made_again(codec)
    for case in cases(codec.vocab_size):
        before = case.logits.copy()
        targets = _targets(codec, case)
        _require(np.array_equal(case.logits, before), f"{case.name}: targets_from_logits has changed the logits")
        other = again.targets_from_logits(case.logits.copy(), case.input_ids.copy(), case.keep_mask.copy())
        require_same(other, targets, f"{case.name}: the same call again")
        same = again.encode(other, case.input_ids) == codec.encode(targets, case.input_ids)
        _require(same, f"{case.name}: the same targets encode to other bytes")


def check_rows(codec: Codec) -> None:
    """A row for each predicted token, present exactly where keep_mask says so, with every invariant of the targets and
    no entry whose probability is 0 in float32."""
    for case in cases(codec.vocab_size):
        targets = _targets(codec, case)
        n_rows = max(len(case.input_ids) - 1, 0)
        _require(targets.n_rows == n_rows, f"{case.name}: {targets.n_rows} rows, expected {n_rows}")
        _require(np.array_equal(targets.present, case.keep_mask), f"{case.name}: present rows are not keep_mask's")
        _require(targets.vocab_size == codec.vocab_size, f"{case.name}: targets have another vocabulary")
        try:
            targets.validate()
        except LogitStoreError as error:
            raise AssertionError(f"{case.name}: {error}") from None
        _require(bool((np.exp(targets.logps) > 0).all()), f"{case.name}: an entry decodes to probability 0")
        impossible = np.isneginf(case.logits[:-1])[np.repeat(np.arange(n_rows), targets.counts), targets.ids]
        _require(not impossible.any(), f"{case.name}: a token of probability 0 is an entry")


def check_distribution(codec: Codec) -> None:
    """dense_logprobs is a distribution in every present row and NaN in the others; a temperature that the rows say
    nothing of raises an error of ours."""
    for case in cases(codec.vocab_size):
        targets = _targets(codec, case)
        for temperature in (1.0, 2.0):
            try:
                dense_RV = targets.dense_logprobs(temperature)
            except (LogitStoreError, ValueError):
                _require(temperature != 1, f"{case.name}: no distribution at temperature 1")
                continue
            where = f"{case.name}, temperature {temperature}"
            _require(dense_RV.dtype == np.float32, f"{where}: dense_logprobs is {dense_RV.dtype}, expected float32")
            _require(dense_RV.shape == (targets.n_rows, codec.vocab_size), f"{where}: shape {dense_RV.shape}")
            _require(bool(np.isnan(dense_RV[~targets.present]).all()), f"{where}: an absent row is not NaN")
            sums = np.exp(dense_RV[targets.present].astype(np.float64)).sum(axis=1)
            worst = float(np.abs(sums - 1).max(initial=0))
            _require(worst <= MASS_ERROR, f"{where}: a row's probabilities sum to 1 +- {worst:.2g}")


def check_damage(codec: Codec) -> None:
    """Each byte of a blob changed, and the blob cut at each length, is an error of ours.

    zstd has a few bits that its decoder does not use. Where one of them is changed the content's checksum holds, and
    what is decoded must be what was encoded, to the bit.
    """
    case, blob = _small(codec)
    targets = _targets(codec, case)
    for position in range(len(blob)):
        for flipped_bits in (0x01, 0xFF):
            damaged = bytearray(blob)
            damaged[position] ^= flipped_bits
            what = f"byte {position} of {len(blob)} changed by {flipped_bits:#04x}"
            try:
                decoded = codec.decode(bytes(damaged), case.input_ids)
            except LogitStoreError:
                continue
            except Exception as error:
                raise AssertionError(f"{what} raised {error!r}, which is no error of ours") from error
            require_same(decoded, _as_stored(targets), f"{what} was accepted, and what it decodes to")
    for length in range(len(blob)):
        what = f"a blob of {len(blob)} bytes cut to {length}"
        _require_refused(lambda length=length: codec.decode(blob[:length], case.input_ids), what)
    _require_refused(lambda: codec.decode(blob + b"\0", case.input_ids), "a blob with a byte behind it")


def check_sound_frames(codec: Codec) -> None:
    """Content that is wrong inside a sound frame is an error of ours or sound targets: never another exception."""
    case, blob = _small(codec)
    header, payload = unpack_blob(blob, max_payload_bytes=CLAIM_BYTES)
    content = bytes(payload)
    _require_refused(lambda: codec.decode(pack_blob(header, [content, b"\0"]), case.input_ids), "a plane too many")
    _require_refused(lambda: codec.decode(pack_blob(header, [content[:-1]]), case.input_ids), "planes a byte short")
    rng = np.random.default_rng(1)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= int(rng.integers(1, 256))
        try:
            with np.errstate(all="ignore"):
                codec.decode(pack_blob(header, [bytes(changed)]), case.input_ids).validate()
        except LogitStoreError:
            pass
        except Exception as error:
            raise AssertionError(f"byte {position} of the content changed: {error!r}, no error of ours") from error


def check_claimed_sizes(codec: Codec) -> None:
    """A blob that claims more than its rows can have is refused before memory is taken for it."""
    case, blob = _small(codec)
    header, payload = unpack_blob(blob, max_payload_bytes=CLAIM_BYTES)
    forged = {"64 MiB of content": pack_blob(header, [bytes(CLAIM_BYTES)])}
    for field in ("n_rows", "n_present", "n_entries"):
        claimed = dataclasses.replace(header, **{field: 0xFFFFFFFF})
        forged[f"{field} of 2^32 - 1"] = pack_blob(claimed, [bytes(payload)])
    for what, claim in forged.items():
        tracemalloc.start()
        try:
            _require_refused(lambda claim=claim: codec.decode(claim, case.input_ids), f"a blob that claims {what}")
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        _require(peak_bytes < ALLOWED_BYTES, f"a blob that claims {what} took {peak_bytes:,} bytes before it failed")


def check_bindings(codec: Codec) -> None:
    """A blob beside another text, and targets of another text or vocabulary, are refused."""
    case, blob = _small(codec)
    targets = _targets(codec, case)
    longer = np.append(case.input_ids, case.input_ids[:1])
    _require_refused(lambda: codec.decode(blob, longer), "a text that is a token longer")
    _require_refused(lambda: codec.decode(blob, case.input_ids[:-1]), "a text that is a token shorter")
    _require_refused(lambda: codec.encode(targets, longer), "targets of a shorter text", ValueError)
    wider = dataclasses.replace(targets, vocab_size=codec.vocab_size + 1)
    _require_refused(lambda: codec.encode(wider, case.input_ids), "targets of another vocabulary", ValueError)
    if codec.vocab_size > 1:
        other = (case.input_ids + 1) % codec.vocab_size
        _require_refused(lambda: codec.decode(blob, other), "a text of other tokens")
        _require_refused(lambda: codec.encode(targets, other), "targets of other tokens", ValueError)


def check_config(codec: Codec) -> None:
    """config is JSON that names the codec and its tables, and save and load_codec give the codec back with them."""
    config = codec.config
    _require(json.loads(canonical_json(config)) == config, f"config {config} is not made of JSON values")
    _require(config.get("vocab_size") == codec.vocab_size, "config has another vocab_size")
    _require(_made_again(codec) == codec, "make_codec(**config) is another codec")
    _require(config.get("tables") == codec.tables_sha256, "config names other tables than the codec has")
    with tempfile.TemporaryDirectory() as folder:
        codec.save(folder)
        loaded = load_codec(folder)
    _require(loaded.config == config, "load_codec gives another configuration than was saved")
    if codec.tables is not None:
        same = loaded.tables is not None and loaded.tables.sha256 == codec.tables.sha256
        _require(same, "load_codec gives a codec without its tables")
        case, blob = _small(codec)
        require_same(loaded.decode(blob, case.input_ids), codec.decode(blob, case.input_ids), "what it loaded decodes")
    _require(codec.tail in ("residual", "sampled", "predicted"), f"tail {codec.tail!r} is none that a loss is for")


CHECKS: tuple[Callable[[Codec], None], ...] = (
    check_round_trip,
    check_determinism,
    check_rows,
    check_distribution,
    check_damage,
    check_sound_frames,
    check_claimed_sizes,
    check_bindings,
    check_config,
)


def _targets(codec: Codec, case: Case) -> TeacherTargets:
    return codec.targets_from_logits(case.logits, case.input_ids, case.keep_mask)


def _as_stored(targets: TeacherTargets) -> TeacherTargets:
    return dataclasses.replace(targets, teacher_coefs=None)


def _small(codec: Codec) -> tuple[Case, bytes]:
    """A case of a few rows, one of them absent, and its blob."""
    case = cases(codec.vocab_size)[0]
    case = case._replace(logits=case.logits[:5], input_ids=case.input_ids[:5], keep_mask=np.arange(4) != 1)
    return case, codec.encode(_targets(codec, case), case.input_ids)


def _made_again(codec: Codec) -> Codec:
    """The codec that its configuration, gone through JSON, and its tables make."""
    again = make_codec(**json.loads(json.dumps(codec.config)))
    return again if codec.tables is None else again.with_tables(codec.tables)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _require_refused(call: Callable[[], Any], what: str, *also: type[Exception]) -> None:
    """Raises AssertionError unless the call raises a LogitStoreError, or one of `also`."""
    try:
        with np.errstate(all="ignore"):
            call()
    except (LogitStoreError, *also):
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {error!r}, which is no error of ours") from error
    raise AssertionError(f"{what} was accepted")
