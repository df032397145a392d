"""Streams of real models: they decode to the same tokens everywhere, or are refused.

Covers: pipelines/compression/codec.py.
"""

import copy
import hashlib
import io
import math
import os
import struct
import subprocess
import sys
import zlib
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from givens.coded import KINDS, images_of, pipeline_of
from givens.images import encoded
from givens.token_datasets import draw_values
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import PRIORS
from small_pipelines import COLUMNS, make_conditioned

from pipelines.compression import codec, coding
from pipelines.compression.codec import SymbolDecoder, SymbolEncoder, exponentials, grid_steps
from pipelines.compression.coding import exact_pixels, identify_given
from pipelines.compression.container import DamagedStream, ModelMismatch, StreamError, read_stream, write_stream
from prior import Prior
from prior.columns import GridColumn
from tokenizer import TokenGrid
from tokenizer.base import LikelihoodError
from tokenizer.spec import ImageSpec

pytest.importorskip("constriction")


def expected(pipe, images, lossless):
    return pipe.to_images(images) if lossless else pipe.decode(pipe.encode(images), output_type="pt")


def compressed(pipe, images, **options):
    return pipe.compress(images, progress=False, **options)


def decompressed(pipe, data, **options):
    return pipe.decompress(data, output_type="pt", progress=False, **options)


def as_bytes(images):
    """Float images in [-1, 1] as uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


# Round trips


@pytest.mark.parametrize(
    ("prior", "order"),
    [
        *((prior, None) for prior in PRIORS),
        *((prior, "spiral_in") for prior in ("gpt", "made", "causal_conv", "masked")),
        *((prior, "halton:3") for prior in ("blocks", "marginal", "masked")),
    ],
)
def test_every_prior_and_order_codes(prior, order):
    pipe = pipeline_of(prior=prior, **({} if order is None else {"size": (12, 8), "order": order}))
    images = images_of(pipe)
    assert torch.equal(decompressed(pipe, compressed(pipe, images)), expected(pipe, images, False))


@pytest.mark.sparse
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_tokenizer_comes_back(kind, channels):
    pipe, lossless = pipeline_of(kind, "causal_conv", channels=channels), KINDS[kind][2]
    images = images_of(pipe)
    data = compressed(pipe, images, lossless=lossless)
    assert read_stream(data)[0].lossless == kind.startswith("pixels given")  # the others code nothing but tokens
    found = decompressed(pipe, data)
    assert torch.equal(found, expected(pipe, images, lossless))
    assert not lossless or torch.equal(as_bytes(found), images)


@pytest.mark.parametrize(
    ("prior", "channels", "kind"), [("gpt", 1, "bytes"), ("blocks", 3, "levels"), ("gated_pixelcnn", 3, "bytes")]
)
def test_logistic_and_depth_heads_code(prior, channels, kind):
    lossless = kind == "bytes"
    pipe = pipeline_of(kind, prior, channels=channels, head="logistic" if lossless else "depth")
    images = images_of(pipe, 3)
    found = decompressed(pipe, compressed(pipe, images, lossless=lossless), batch_size=2)
    assert torch.equal(found, expected(pipe, images, lossless))


def test_lists_of_images_come_back_also_an_empty_one():
    pipe = pipeline_of("bytes", channels=3, prior="marginal")
    images = [Image.fromarray(image) for image in images_of(pipe).permute(0, 2, 3, 1).numpy()]
    found = pipe.decompress(compressed(pipe, images, lossless=True), progress=False)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in images]
    assert decompressed(pipe, compressed(pipe, torch.zeros(0, 3, 8, 8))).shape == (0, 3, 8, 8)


# Batches, threads, instructions, machines


@pytest.mark.sparse
@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_batch_size_threads_and_autocast_do_not_matter(kind, batch_size, threads, monkeypatch):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    monkeypatch.setattr(coding, "CHUNK_IMAGES", 10)  # the last chunk is not full
    images, before = images_of(pipe, 25), torch.get_num_threads()
    data = compressed(pipe, images, lossless=lossless)
    assert read_stream(data)[0].num_chunks == 3
    torch.set_num_threads(threads)
    try:
        # Of a lossy stream the ids would not change, but the images would be decoded in bfloat16.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lossless and batch_size == 7):
            found = decompressed(pipe, data, batch_size=batch_size)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected(pipe, images, lossless))


@pytest.mark.parametrize("prior", ["gpt", "gated_pixelcnn"])
def test_a_stream_decodes_without_the_cache(prior, monkeypatch):
    pipe = pipeline_of(prior=prior)
    images = images_of(pipe)
    data = compressed(pipe, images)
    monkeypatch.setattr(type(pipe.prior), "start", partialmethod(type(pipe.prior).start, cache=False))
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


def test_float32_would_not_suffice(monkeypatch):
    """The negative control: with float32 models, streams do not decode in other batches."""
    monkeypatch.setattr(coding, "to_double", lambda model, device: model.float().eval())
    pipe = pipeline_of("bytes", "gpt", size=(16, 16))
    data = compressed(pipe, images_of(pipe, 12))
    with pytest.raises(ModelMismatch):
        decompressed(pipe, data, batch_size=1)


@pytest.mark.slow
def test_a_stream_decodes_with_other_instructions(tmp_path):
    """The decoding process is limited to AVX2."""
    pipe = pipeline_of("pixels given tokens")
    images = images_of(pipe, 12)
    (tmp_path / "stream").write_bytes(compressed(pipe, images, lossless=True))
    pipe.save_pretrained(tmp_path / "pipeline")
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import numpy, torch\n"
        "from pipelines import ImagePipeline\n"
        "pipe = ImagePipeline.from_pretrained('pipeline')\n"
        "found = pipe.decompress(open('stream', 'rb').read(), output_type='np')\n"
        "assert (found.transpose(0, 3, 1, 2) == numpy.load('images.npy')).all()\n"
        "print(torch.backends.cpu.get_cpu_capability())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("AVX2", "DEFAULT", "NO AVX")


def perturb(monkeypatch, size):
    """Perturb the logits by up to `size`, as another machine would."""
    generator = torch.Generator().manual_seed(1)

    def noisy(logits):
        return grid_steps(logits + size * (2 * torch.rand(logits.shape, generator=generator, dtype=torch.float64) - 1))

    monkeypatch.setattr(codec, "grid_steps", noisy)


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens", "bytes"])
def test_small_differences_between_machines_decode_and_large_ones_are_refused(kind, monkeypatch):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    images = images_of(pipe, 16)
    data = compressed(pipe, images, lossless=lossless)
    with monkeypatch.context() as patch:
        perturb(patch, 1e-10)
        assert torch.equal(decompressed(pipe, data), expected(pipe, images, lossless))
    perturb(monkeypatch, 1e-2)
    with pytest.raises(ModelMismatch):
        decompressed(pipe, data)


def test_logits_near_a_rounding_boundary_are_coded_uniformly(monkeypatch):
    """Here every logit lies on a boundary, so that its last bits would decide."""
    pipe = pipeline_of(prior="marginal")
    logits = next(pipe.prior.parameters())
    with torch.no_grad():
        logits.copy_((torch.randint(-40, 40, logits.shape, generator=torch.Generator().manual_seed(0)) + 0.5) / 16)
    images = images_of(pipe)
    data = compressed(pipe, images)
    assert len(read_stream(data)[1][0].exceptions) == 9 * 4
    perturb(monkeypatch, 1e-10)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))
    monkeypatch.setattr(codec, "GUARD", 0.0)  # without a guard, it fails
    with pytest.raises(ModelMismatch):
        decompressed(pipe, compressed(pipe, images))


@pytest.mark.parametrize(("device", "used"), [("mps", "cpu"), ("cpu", "cpu"), ("meta", "meta")])
def test_devices_without_float64_are_replaced_by_the_cpu(device, used):
    pipe = pipeline_of()
    given = SimpleNamespace(device=torch.device(device), prior=pipe.prior, tokenizer=pipe.tokenizer)
    models = coding.Models(given, residual=True)
    parameters = [*models.prior.parameters(), *models.tokenizer.parameters()]
    assert models.device.type == used and {p.device.type for p in parameters} == {used}


# Size, and the coder


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens", "bytes"])
def test_streams_are_as_long_as_the_model_says(kind):
    pipe, lossless = pipeline_of(kind, "causal_conv", size=(16, 16)), KINDS[kind][2]
    images = images_of(pipe, 24)
    nats = pipe.bits_per_dim(images) * 256 * np.log(2) if lossless else -pipe.log_prob(images)
    bits = float(nats.double().sum() / np.log(2))
    data = compressed(pipe, images, lossless=lossless, condition={"label": None})
    header, chunks = read_stream(data)
    coded = sum(len(chunk.tokens) + len(chunk.pixels) for chunk in chunks)
    assert 0.999 * bits < 8 * coded < 1.005 * bits + 2 * 64
    assert len(data) - coded < 100 * header.num_chunks, "the container adds little"


def test_exponentials_fit_their_formula():
    table = exponentials()
    assert int(table[0]) == 1 << 32 and int(table[-1]) == 0 and int(table[-2]) == 1
    exact = 2.0**32 * np.exp(-np.arange(len(table)) / 16)
    assert np.abs(table.numpy() - exact).max() <= 0.5 + 1e-5


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_any_logits_code_and_decode(rows):
    """NaN and infinities too; rows near a rounding boundary are uniform."""
    logits = torch.tensor(rows, dtype=torch.float64)
    symbols = torch.arange(len(rows)) % 4
    encoder = SymbolEncoder()
    likely = grid_steps(logits)[0].argmin(1)  # a symbol of probability zero is never coded
    symbols = torch.where(grid_steps(logits)[1], symbols, likely)
    encoder.code(logits, symbols)
    decoder = SymbolDecoder(encoder.bytes(), torch.cat(encoder.unsure))
    assert torch.equal(decoder.code(logits, torch.zeros_like(symbols)), symbols)
    decoder.finish()


def test_symbols_that_are_left_over_are_an_error():
    logits, symbols = torch.zeros(500, 9, dtype=torch.float64), torch.arange(500) % 9
    encoder = SymbolEncoder()
    encoder.code(logits, symbols)
    unsure = torch.zeros(500, dtype=torch.bool)
    with pytest.raises(ModelMismatch):
        SymbolDecoder(encoder.bytes(), unsure).finish()
    with pytest.raises(StreamError):
        SymbolDecoder(bytes(5), unsure)  # not a whole number of words


def test_the_coder_still_makes_the_same_bytes():
    """Fixed symbols under fixed tables: another version of constriction must read the streams of this one."""
    library = codec.constriction()
    coder, family = library.stream.queue.RangeEncoder(), library.stream.model.Categorical(perfect=False)
    for size in (2, 7, 256):
        ids = np.arange(64 * size).reshape(64, size) * 2654435761 % (1 << 32)
        weights = exponentials().numpy()[ids % len(exponentials())].astype(np.float64)
        coder.encode((ids[:, 0] % size).astype(np.int32), family, weights)
    data = coder.get_compressed().astype("<u4").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "e910d83e0700f62c"


# Conditions


def conditioned(prior="gpt", **config):
    """An untrained pipeline with columns."""
    torch.manual_seed(0)
    return make_conditioned(prior, **config)


def rows_of(pipe, count, seed=0):
    """Random raw columns and labels of `count` images, of which some are null."""
    torch.manual_seed(seed)
    return {**draw_values(pipe.prior.config.conditions, count), "label": torch.randint(3, (count,))}


TAKE_CONDITIONS = [name for name in PRIORS if Prior.find(name).Config.takes_conditions]


@pytest.mark.parametrize("prior", TAKE_CONDITIONS)
def test_every_prior_codes_given_a_condition(prior, monkeypatch):
    """With the probabilities of `forward`, in any batches."""
    pipe, seen = conditioned(prior), []
    images, condition = images_of(pipe, 8), rows_of(pipe, 8)
    code = SymbolEncoder.code
    monkeypatch.setattr(
        SymbolEncoder, "code", lambda coder, logits, ids: code(coder, seen.append(logits) or logits, ids)
    )
    data = compressed(pipe, images, condition=condition)
    for batch_size in (1, 3, None):
        found = decompressed(pipe, data, condition=condition, batch_size=batch_size)
        assert torch.equal(found, expected(pipe, images, False))
    model, tokens = coding.to_double(pipe.prior, pipe.device), pipe.encode(images)
    used, whole = torch.stack(seen, 1).log_softmax(-1), pipe.read_given(None, condition, limit=False)
    others = [name for name in whole.names if name != "label"]
    for known, is_used in ((whole, True), (whole.without(["label"]), False), (whole.without(others), False)):
        with torch.no_grad():
            logits = model(tokens, model.encode_given(known))[:, model.order].log_softmax(-1)
        close = (logits - used).abs().amax((1, 2)) < 1e-9
        assert bool(close.all() if is_used else (~close).any())


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 9),
    st.integers(0, 1000),
    st.sets(st.sampled_from([*COLUMNS, "outline", "before", "label"])),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_streams_with_any_columns_come_back(count, seed, null, chunk, batch_size):
    """In chunks; one changed value of one image, or another order, is another condition."""
    pipe = CONDITIONED
    images, condition = images_of(pipe, count), rows_of(pipe, count, seed)
    condition = {name: None if name in null else values for name, values in condition.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "CHUNK_IMAGES", chunk)
        data = compressed(pipe, images, condition=condition)
        found = decompressed(pipe, data, condition=condition, batch_size=batch_size)
    assert len(found) == count
    if count:  # the decoder's float32 rounds differently in other chunks
        torch.testing.assert_close(found, expected(pipe, images, False), rtol=0, atol=1e-5)
    if count and "label" not in null:
        others = {**condition, "label": (condition["label"] + 1) % 3}, {**condition, "label": None}
        for other in (*others, {name: None if v is None else v.flip(0) for name, v in condition.items()}):
            if other["label"] is None or not torch.equal(other["label"], condition["label"]):
                with pytest.raises(StreamError, match="condition"):
                    decompressed(pipe, data, condition=other)


CONDITIONED = conditioned(before=True)


def test_a_chunk_is_coded_given_the_rows_of_its_images(monkeypatch):
    pipe, images, condition = CONDITIONED, images_of(CONDITIONED, 7), rows_of(CONDITIONED, 7)
    monkeypatch.setattr(coding, "CHUNK_IMAGES", 3)
    _, chunks = read_stream(compressed(pipe, images, condition=condition))
    for start, chunk in zip((0, 3, 6), chunks, strict=True):
        rows = slice(start, start + 3)
        own = {name: values[rows] for name, values in condition.items()}
        (alone,) = read_stream(compressed(pipe, images[rows], condition=own))[1]
        assert (bytes(alone.tokens), alone.digest) == (bytes(chunk.tokens), chunk.digest)


def test_a_stream_needs_its_condition_and_says_so():
    pipe, images = CONDITIONED, images_of(CONDITIONED, 3)
    condition = {"age": [20, 30, None], "view": "lateral"}
    data, plain = compressed(pipe, images, condition=condition), compressed(pipe, images)
    assert len(read_stream(data)[0].condition) == 8 and not read_stream(plain)[0].condition
    for wrong in (None, {}, {"age": [20, 30, 40], "view": "lateral"}, {"age": [30, 20, None], "view": "lateral"}):
        with pytest.raises(
            StreamError, match=r"^[^\n]*give condition=[^\n]*3 images[^\n]*label, view, findings, age[^\n]*$"
        ):
            decompressed(pipe, data, condition=wrong)
    with pytest.raises(StreamError, match="without a condition"):
        decompressed(pipe, plain, condition=condition)
    with pytest.raises(StreamError, match="limit"):  # before a value for each of very many images is made
        decompressed(pipe, data, condition={"age": [1, 2]}, max_images=2)
    null = {"age": [None] * 3, "label": [None] * 3}
    assert compressed(pipe, images, condition=null) == plain and plain[7] == 1
    assert torch.equal(decompressed(pipe, plain, condition=null), decompressed(pipe, plain))


def test_a_condition_of_which_some_numbers_are_null_is_coded_as_in_03():
    pipe = make_conditioned(outline=False)
    half = {"motion": torch.tensor([1.0, math.nan])}
    assert identify_given(pipe.read_given(None, half)) == identify_given(pipe.read_given()) == b""
    both = pipe.read_given(None, {**half, "age": 63})
    assert identify_given(both) == bytes.fromhex(both.digest)[:8] != identify_given(both.without(["motion"]))


def test_an_earlier_type_of_the_weights_does_not_matter():
    """Means of numbers, and matrices that average the cells of a grid, are not rounded with the weights."""
    age, sketch = {**COLUMNS["age"], "mean": [50.123]}, GridColumn(grid=TokenGrid((5, 4), 4))
    pipe = conditioned(columns={"age": age, "sketch": sketch}, outline=False)
    stored = pipe.to(dtype=torch.bfloat16).prior.state_dict()
    pipe.to(dtype=torch.float32)
    fresh = copy.deepcopy(pipe)
    fresh.prior = type(pipe.prior)(pipe.prior.config)
    fresh.prior.load_state_dict(stored)
    fresh.prior.eval()
    images, condition = images_of(pipe), rows_of(pipe, 9)
    data = compressed(pipe, images, condition=condition)
    given = pipe.read_given(None, condition, limit=False)
    encoded = coding.Models(pipe, residual=False).prior.encode_given(given)
    for other in (fresh, copy.deepcopy(pipe).to(dtype=torch.float64)):
        assert compressed(other, images, condition=condition) == data
        again = coding.Models(other, residual=False).prior.encode_given(given)
        assert torch.equal(again.vector, encoded.vector) and torch.equal(again.map, encoded.map)


# Classes


@pytest.mark.parametrize("has_classes", [False, True])
def test_exceptions_count_classes_first_then_tokens_then_pixels(has_classes, monkeypatch):
    """A wide guard makes many among tokens and pixels, none among classes."""
    monkeypatch.setattr(codec, "GUARD", 1e-3)
    pipe = with_strong_classes("pixels given tokens")
    images, more = images_of(pipe), {} if has_classes else {"condition": {"label": None}}
    data = compressed(pipe, images, lossless=True, **more)
    (chunk,) = read_stream(data)[1]
    first = 9 * has_classes
    assert chunk.classes == has_classes and first <= chunk.exceptions[0] < first + 9 * 4 <= chunk.exceptions[-1]
    perturb(monkeypatch, 1e-4)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, True))


def with_strong_classes(kind="pixels given levels", prior="gpt", **config):
    """A pipeline of three classes that matter, although it is not trained."""
    pipe = pipeline_of("tokens" if prior == "next_scale" else kind, prior, **config)
    with torch.no_grad():
        for parameter in pipe.prior.parameters():
            if parameter.ndim == 2 and len(parameter) == 4:
                parameter.mul_(30)  # one row for each class
        if prior == "gpt":
            pipe.prior.head.weight.mul_(5)
    return pipe


def nats_of(pipe, images):
    """Nats of the tokens of each image given each class, and the null class: `(4, n)`."""
    tokens = pipe.encode(images)
    with torch.no_grad():
        return -torch.stack([pipe.prior.log_prob(tokens, torch.full((len(tokens),), k)) for k in range(4)]).double()


def no_scores(monkeypatch):
    monkeypatch.setattr(Prior, "log_prob", lambda *_, **__: pytest.fail("a class was tried"))


@pytest.mark.parametrize("prior", ["gpt", "made", "next_scale"])
def test_a_stream_stores_the_best_classes(prior, monkeypatch):
    """In chunks; the decoder tries nothing, in any batches. The null class is one of the choices."""
    pipe = with_strong_classes(prior=prior)
    images = images_of(pipe, 11)
    monkeypatch.setattr(coding, "CHUNK_IMAGES", 4)
    stored, seen = coding.Models.code_classes, []
    with monkeypatch.context() as patch:
        patch.setattr(
            coding.Models, "code_classes", lambda models, ids, *rest: seen.append(ids) or stored(models, ids, *rest)
        )
        data = compressed(pipe, images)
    for part, chunk in zip(images.split(4), read_stream(data)[1], strict=True):
        nats = nats_of(pipe, part)
        saves = float((nats[3] - nats.amin(0)).sum()) > len(part) * np.log(4)
        assert chunk.classes == saves
        if saves:
            assert torch.equal(seen.pop(0), nats.argmin(0))
    assert not seen and len(data) <= len(compressed(pipe, images, condition={"label": None}))
    no_scores(monkeypatch)
    for batch_size in (1, 3, None):
        assert torch.equal(decompressed(pipe, data, batch_size=batch_size), expected(pipe, images, False))


@pytest.mark.parametrize("kind", ["pixels given tokens"])
def test_a_stream_with_classes_is_as_long_as_the_model_says(kind):
    """Each class costs log2(classes + 1) bits."""
    pipe, lossless = with_strong_classes(kind), KINDS[kind][2]
    images = images_of(pipe, 24)
    nats = nats_of(pipe, images)
    bits = float(nats.amin(0).sum() + 24 * np.log(4)) / np.log(2)
    data, without = (compressed(pipe, images, lossless=lossless, **c) for c in ({}, {"condition": {"label": None}}))
    (chunk,) = read_stream(data)[1]
    assert chunk.classes and 0.999 * bits < 8 * len(chunk.tokens) < 1.005 * bits + 2 * 64
    assert len(data) < len(without) - float((nats[3] - nats.amin(0)).sum()) / np.log(2) / 8 * 0.95 + 24 * 2 / 8 + 8
    for stream in (data, without):
        found = decompressed(pipe, stream, batch_size=7)
        assert torch.equal(found, expected(pipe, images, lossless))


def test_classes_are_stored_only_if_that_pays():
    """Otherwise the stream is that of the null class."""
    pipe = pipeline_of()
    images = images_of(pipe)
    data = compressed(pipe, images)
    assert not read_stream(data)[1][0].classes and data == compressed(pipe, images, condition={"label": None})
    nats = nats_of(pipe, images)
    assert 0 < float((nats[3] - nats.amin(0)).sum()) < 9 * np.log(4)


@pytest.mark.parametrize("why", ["labels", "no label", "no labels", "many classes", "no classes"])
def test_otherwise_no_class_is_tried(why, monkeypatch):
    pipe = with_strong_classes(**({"num_classes": 0} if why == "no classes" else {}))
    images, label = images_of(pipe), {"labels": [0, 1, 2] * 3, "no label": None, "no labels": [None] * 9}
    monkeypatch.setattr(coding, "MAX_CLASSES", 2 if why == "many classes" else 3)
    no_scores(monkeypatch)
    given = {"condition": {"label": label[why]}} if why in label else {}
    data = compressed(pipe, images, **given)
    assert not any(chunk.classes for chunk in read_stream(data)[1])
    assert torch.equal(decompressed(pipe, data, **given), expected(pipe, images, False))


def test_classes_are_chosen_given_columns(monkeypatch):
    pipe, images, condition = CONDITIONED, images_of(CONDITIONED, 7), rows_of(CONDITIONED, 7)
    del condition["label"]
    strong = copy.deepcopy(pipe)
    with torch.no_grad():
        strong.prior.class_embedding.weight.mul_(100)
        strong.prior.head.weight.mul_(20)
    tokens, stored, seen = strong.encode(images), coding.Models.code_classes, []
    with torch.inference_mode():
        given, without = (
            torch.stack([strong.prior.log_prob(tokens, torch.full((7,), k), condition=columns) for k in range(4)])
            for columns in (condition, None)
        )
    assert not torch.equal(given.argmax(0), without.argmax(0))
    with monkeypatch.context() as patch:
        patch.setattr(
            coding.Models, "code_classes", lambda models, ids, *rest: seen.append(ids) or stored(models, ids, *rest)
        )
        data = compressed(strong, images, condition=condition)
    assert read_stream(data)[1][0].classes and torch.equal(seen[0], given.argmax(0))
    found = decompressed(strong, data, condition=condition, batch_size=2)
    assert torch.equal(found, expected(strong, images, False))
    with pytest.raises(StreamError, match="condition"):
        decompressed(strong, data)


def test_classes_that_do_not_fit_are_one_error():
    """In a pipeline without classes, beside labels, and other ones."""
    pipe, none = with_strong_classes(), with_strong_classes(num_classes=0)
    images = images_of(pipe)

    def forge(pipe, data, **chunk):
        header, (found,) = read_stream(data)
        write_stream(file := io.BytesIO(), header, [found._replace(**chunk)])
        return file.getvalue()

    for made, other, more in ((none, "pipeline has none", {}), (pipe, "labels, too", {"condition": {"label": 1}})):
        data = compressed(made, images, **more)
        with pytest.raises(DamagedStream, match=f"^[^\n]*{other}[^\n]*$"):
            decompressed(made, forge(made, data, classes=True), **more)
    data = compressed(pipe, images)
    for classes in (True, False):
        stream = data if classes else compressed(pipe, images, condition={"label": None})
        assert read_stream(stream)[1][0].classes == classes
        with pytest.raises(StreamError):
            decompressed(pipe, forge(pipe, stream, classes=not classes))


# Refusals


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
def test_another_model_is_refused(kind):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    data = compressed(pipe, images_of(pipe), lossless=lossless)
    for parameter in [*pipe.prior.parameters(), *pipe.tokenizer.decoder.parameters()]:
        with torch.no_grad():
            before = parameter.clone()
            parameter[(0,) * parameter.ndim] += 1e-4
            with pytest.raises(ModelMismatch):
                decompressed(pipe, data)
            parameter.copy_(before)
    decompressed(pipe, data)


FORGED = pipeline_of("pixels given tokens", "marginal")
FORGED_HEADER, (FORGED_CHUNK,) = read_stream(compressed(FORGED, images_of(FORGED, 2), lossless=True))
OTHER_HEADERS = [
    {"images": 3},
    {"images": 0, "names": ()},
    {"chunk_images": 1},
    {"chunk_images": 65535, "images": 65535},  # whose states would not fit into memory
    {"lossless": False},
    {"condition": b"12345678"},
]
OTHER_CHUNKS = {
    "exceptions": st.lists(st.sampled_from([0, 135, 136, 2**32 - 1]), max_size=5).map(lambda k: np.array(k, np.uint32)),
    "tokens": st.binary(max_size=40),
    "pixels": st.binary(max_size=600),
    "digest": st.integers(0, 2**32 - 1),
    "classes": st.booleans(),
}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.just({}) | st.sampled_from(OTHER_HEADERS), st.fixed_dictionaries({}, optional=OTHER_CHUNKS))
def test_a_forged_stream_with_valid_checksums_is_one_error(header, chunk):
    changed = FORGED_CHUNK._replace(**chunk)
    write_stream(file := io.BytesIO(), forged := FORGED_HEADER._replace(**header), [changed] * forged.num_chunks)
    try:
        found = decompressed(FORGED, file.getvalue())
    except StreamError as error:
        assert "\n" not in str(error)
    else:
        assert len(found) == forged.images


def test_limits_of_the_caller_are_kept():
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe))
    assert len(decompressed(pipe, data, max_images=9)) == 9
    with pytest.raises(StreamError):
        decompressed(pipe, data, max_images=8)
    with pytest.raises(ValueError, match="batch_size"):
        decompressed(pipe, data, batch_size=0)


def test_without_the_coder_the_extra_is_named(monkeypatch):
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe))
    monkeypatch.setitem(sys.modules, "constriction", None)
    for use in (lambda: compressed(pipe, images_of(pipe)), lambda: decompressed(pipe, data)):
        with pytest.raises(StreamError, match="smalti.compress"):
            use()


def test_lossless_needs_a_likelihood_and_8_bit_images():
    with pytest.raises(LikelihoodError):
        compressed(pipeline_of(), images_of(pipeline_of()), lossless=True)
    pipe, grey_levels = pipeline_of("bytes"), torch.arange(256).float() / 127.5 - 1
    coding.check_exact(grey_levels.double() + 1e-6)
    for between in (2e-5, -2e-5, 1 / 255):
        with pytest.raises(ValueError):
            coding.check_exact(grey_levels + between)
    with pytest.raises(ValueError):
        compressed(pipe, torch.full((1, 1, 8, 8), -0.1234), lossless=True)


def deep_png():
    """An RGB image of 5 x 3 pixels and 16 bits per channel, which Pillow reads as 8 bits."""
    values = np.arange(45).reshape(3, 15) * 1000

    def part(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 5, 3, 16, 2, 0, 0, 0)
    parts = part(b"IHDR", header), part(b"IDAT", zlib.compress(rows)), part(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (lambda: Image.new("RGB", (5, 3)), 1),
        (lambda: Image.new("LA", (5, 3)), 1),
        (lambda: Image.open(io.BytesIO(encoded(Image.new("L", (5, 3), 7), transparency=7))), 1),
        (lambda: Image.open(io.BytesIO(encoded(Image.new("RGB", (5, 3), (7, 7, 7)), transparency=(7, 7, 7)))), 3),
        (deep_png, 3),
    ],
    ids=["another mode", "alpha", "transparent grey", "transparent colour", "16 bits"],
)
def test_lossless_refuses_what_8_bits_cannot_hold(image, channels):
    assert exact_pixels(image(), ImageSpec(channels, 3, 5), False).shape == (channels, 3, 5)
    with pytest.raises(ValueError):
        exact_pixels(image(), ImageSpec(channels, 3, 5), True)


def test_images_are_turned_upright_and_not_resized():
    pixels = np.arange(15, dtype=np.uint8).reshape(3, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned, other = (Image.open(io.BytesIO(encoded(stored, exif=exif))) for stored in (np.rot90(pixels), pixels))
    assert np.array_equal(exact_pixels(turned, ImageSpec(1, 3, 5), True)[0], pixels)
    with pytest.raises(ValueError, match="5 x 3"):
        exact_pixels(other, ImageSpec(1, 3, 5), False)
    for images in ([Image.new("L", (9, 8)), torch.zeros(1, 8, 8, dtype=torch.uint8)], torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError):
            compressed(pipeline_of("bytes"), images)
