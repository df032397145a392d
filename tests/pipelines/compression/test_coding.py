"""Streams of real models: what comes back, in how many bytes, on which machine, and what is refused.

Covers: pipelines/compression/codec.py.
"""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from givens.coded import KINDS, images_of, pipeline_of
from givens.image_files import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import PRIORS

from pipelines.compression import codec
from pipelines.compression import coding as compression
from pipelines.compression.codec import exponentials, grid_steps, weights_of
from pipelines.compression.container import ModelMismatch, StreamError, read_stream, write_stream
from tokenizer.base import LikelihoodError

pytest.importorskip("constriction")


def expected(pipe, images, lossless):
    return pipe.to_images(images) if lossless else pipe.decode(pipe.encode(images), output_type="pt")


def compressed(pipe, images, **options):
    return pipe.compress(images, progress=False, **options)


def decompressed(pipe, data, **options):
    return pipe.decompress(data, output_type="pt", progress=False, **options)


# Round trips


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_codes(prior):
    pipe = pipeline_of(prior=prior)
    images = images_of(pipe)
    data = compressed(pipe, images)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


@pytest.mark.parametrize(
    ("prior", "order"),
    [
        *((prior, "spiral_in") for prior in ("gpt", "made", "causal_conv", "masked")),
        *((prior, "halton:3") for prior in ("blocks", "marginal", "masked")),
    ],
)
def test_every_order_codes(prior, order):
    pipe = pipeline_of(prior=prior, size=(12, 8), order=order)
    images = images_of(pipe)
    data = compressed(pipe, images)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


@pytest.mark.sparse
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_tokenizer_comes_back(kind, channels):
    pipe, lossless = pipeline_of(kind, "causal_conv", channels=channels), KINDS[kind][2]
    images = images_of(pipe)
    data = compressed(pipe, images, lossless=lossless)
    assert read_stream(data)[0].lossless == kind.startswith("pixels given")  # of the others, tokens are all there is
    found = decompressed(pipe, data)
    assert torch.equal(found, expected(pipe, images, lossless))
    if lossless:
        assert torch.equal(((found + 1) * 127.5).round().to(torch.uint8), images)


@pytest.mark.sparse
@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_batch_size_and_threads_do_not_matter(kind, batch_size, threads, monkeypatch):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    monkeypatch.setattr(compression, "CHUNK_IMAGES", 10)  # the last chunk is not full
    images, before = images_of(pipe, 25), torch.get_num_threads()
    data = compressed(pipe, images, lossless=lossless)
    assert read_stream(data)[0].num_chunks == 3
    try:
        torch.set_num_threads(threads)
        assert torch.equal(decompressed(pipe, data, batch_size=batch_size), expected(pipe, images, lossless))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("head", ["logistic", None])
@pytest.mark.parametrize(("prior", "channels"), [("gpt", 1), ("gpt", 3), ("blocks", 3), ("gated_pixelcnn", 3)])
def test_intensities_and_positions_come_back(prior, channels, head):
    """Of pixels under logistics, and of levels under a depth head."""
    kind, head = ("bytes", "logistic") if head else ("levels", "depth")
    pipe = pipeline_of(kind, prior, channels=channels, head=head)
    images = images_of(pipe, 3)
    data = compressed(pipe, images, lossless=kind == "bytes")
    found = decompressed(pipe, data, batch_size=2)
    assert torch.equal(found, expected(pipe, images, kind == "bytes"))
    if kind == "bytes":
        assert torch.equal(((found + 1) * 127.5).round().to(torch.uint8), images)


@pytest.mark.parametrize("prior", ["gpt", "made", "gated_pixelcnn", "pixelcnn_pp"])
def test_a_stream_decodes_without_the_cache(prior, monkeypatch):
    pipe = pipeline_of(prior=prior)
    images = images_of(pipe)
    data = compressed(pipe, images)
    member = type(pipe.prior)
    monkeypatch.setattr(member, "start", member.start_uncached)
    monkeypatch.setattr(member, "next_logits", member.next_logits_uncached)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


@pytest.mark.slow
def test_a_stream_decodes_with_other_instructions(tmp_path):
    """Of what the processor has: AVX2 here, and what torch chooses there."""
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
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.environ["PYTHONPATH"],
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("AVX2", "DEFAULT", "NO AVX")


def test_a_batch_has_an_image_at_least():
    pipe = pipeline_of()
    with pytest.raises(ValueError, match="batch_size"):
        decompressed(pipe, compressed(pipe, images_of(pipe, 2)), batch_size=0)


def test_no_images_make_an_empty_stream():
    pipe = pipeline_of()
    data = compressed(pipe, torch.zeros(0, 1, 8, 8))
    assert decompressed(pipe, data).shape == (0, 1, 8, 8)


def test_weights_of_another_type_are_coded_alike():
    pipe = pipeline_of()
    pipe.to(dtype=torch.bfloat16).to(dtype=torch.float32)  # now both types hold the same numbers
    images = images_of(pipe)
    data = compressed(pipe, images)
    assert compressed(pipe.to(dtype=torch.float64), images) == data


# Bytes


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens", "bytes"])
def test_streams_are_as_long_as_the_model_says(kind):
    pipe, lossless = pipeline_of(kind, "causal_conv", size=(16, 16)), KINDS[kind][2]
    images = images_of(pipe, 24)
    nats = pipe.bits_per_dim(images) * 256 * np.log(2) if lossless else -pipe.log_prob(images)
    bits = float(nats.double().sum() / np.log(2))
    _, chunks = read_stream(compressed(pipe, images, lossless=lossless))
    size = 8 * sum(len(chunk.tokens) + len(chunk.pixels) for chunk in chunks)
    assert 0.999 * bits < size < 1.005 * bits + 2 * 64


def test_the_container_adds_little():
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe, 64))
    assert len(data) - sum(len(chunk.tokens) for chunk in read_stream(data)[1]) < 100


# The numbers that are coded with


def test_exponentials_are_those_of_the_formula():
    table = exponentials()
    assert int(table[0]) == 1 << 32 and int(table[-1]) == 0 and int(table[-2]) == 1
    exact = 2.0**32 * np.exp(-np.arange(len(table)) / 16)
    assert np.abs(table.numpy() - exact).max() <= 0.5 + 1e-5


def test_grid_steps_are_differences_and_doubt_what_is_near_a_boundary():
    logits = torch.tensor(
        [
            [0.0, -1.0, -1 / 16],
            [0.0, 0.0, 0.0],
            [0.5 / 16, -1.0, -2.0],
            [0.5 / 16 - 1e-8, -1.0, -2.0],
            [0.0, -40.0 - 0.5 / 16, -torch.inf],
        ]
    ).double()
    steps, unsure = grid_steps(logits)
    assert steps[0].tolist() == [0, 16, 1] and steps[1].tolist() == [0, 0, 0]
    assert unsure.tolist() == [False, False, True, False, False]  # what is cut off the table may be anywhere
    assert int(steps[4, 1]) == int(steps[4, 2]) == len(exponentials()) - 1


def test_doubtful_rows_are_uniform():
    steps = torch.tensor([[0, 5], [0, 5]])
    weights = weights_of(steps, torch.tensor([False, True]))
    assert weights[0, 0] == 2**32 and weights[0, 1] == int(exponentials()[5])
    assert weights[1, 0] == weights[1, 1]


def boundary_pipeline():
    """A prior whose every logit lies on a rounding boundary, so that the last bits decide the integers."""
    pipe = pipeline_of(prior="marginal")
    logits = next(pipe.prior.parameters())
    with torch.no_grad():
        logits.copy_((torch.randint(-40, 40, logits.shape, generator=torch.Generator().manual_seed(0)) + 0.5) / 16)
    return pipe


def shaken(monkeypatch, size):
    """Logits of another machine: off by up to `size`."""
    generator = torch.Generator().manual_seed(1)

    def noisy(logits):
        return grid_steps(logits + size * (2 * torch.rand(logits.shape, generator=generator, dtype=torch.float64) - 1))

    monkeypatch.setattr(codec, "grid_steps", noisy)


def test_what_machines_may_disagree_on_is_written_down(monkeypatch):
    pipe = boundary_pipeline()
    images = images_of(pipe)
    data = compressed(pipe, images)
    _, (chunk,) = read_stream(data)
    assert len(chunk.exceptions) == 9 * 4
    shaken(monkeypatch, 1e-10)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))
    monkeypatch.setattr(codec, "GUARD", 0.0)  # the bug: no guard
    with pytest.raises(ModelMismatch):
        decompressed(pipe, compressed(pipe, images))


def test_doubts_are_counted_through_tokens_and_pixels(monkeypatch):
    """With a guard so wide that there are many of both, machines may differ by as much less."""
    monkeypatch.setattr(codec, "GUARD", 1e-3)
    pipe = pipeline_of("pixels given tokens")
    images = images_of(pipe)
    data = compressed(pipe, images, lossless=True)
    _, (chunk,) = read_stream(data)
    tokens = 9 * 4
    assert chunk.exceptions[0] < tokens <= chunk.exceptions[-1]
    shaken(monkeypatch, 1e-4)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, True))


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
def test_what_was_decoded_is_checked_itself(kind):
    """Where nothing else is amiss but what comes out."""
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    header, chunks = read_stream(compressed(pipe, images_of(pipe), lossless=lossless))
    write_stream(file := io.BytesIO(), header, [chunk._replace(digest=chunk.digest ^ 1) for chunk in chunks])
    with pytest.raises(ModelMismatch):
        decompressed(pipe, file.getvalue())


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens", "bytes"])
def test_small_differences_decode_and_large_ones_are_found(kind, monkeypatch):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    images = images_of(pipe, 16)
    data = compressed(pipe, images, lossless=lossless)
    with monkeypatch.context() as patch:
        shaken(patch, 1e-10)
        assert torch.equal(decompressed(pipe, data), expected(pipe, images, lossless))
    shaken(monkeypatch, 1e-2)
    with pytest.raises(ModelMismatch):
        decompressed(pipe, data)


def test_float32_would_not_do(monkeypatch):
    """The negative control: the same codec on float32 makes streams that do not decode in other batches."""
    monkeypatch.setattr(compression, "doubled", lambda model, device: model.float().eval())
    pipe = pipeline_of("bytes", "gpt", size=(16, 16))
    data = compressed(pipe, images_of(pipe, 24))
    with pytest.raises(ModelMismatch):
        decompressed(pipe, data, batch_size=1)


# What is refused


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
def test_another_model_is_told_apart(kind):
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


def test_a_model_that_is_not_the_streams_is_not_run(monkeypatch):
    pipe, other = pipeline_of(), pipeline_of(prior="made")
    data = compressed(pipe, images_of(pipe))
    monkeypatch.setattr(type(other.prior), "forward", lambda *arguments: pytest.fail("it was run"))
    with pytest.raises(ModelMismatch):
        decompressed(other, data)


def test_every_byte_matters():
    pipe = pipeline_of("pixels given tokens", "marginal")
    data = compressed(pipe, images_of(pipe, 2), lossless=True)
    for at in range(len(data)):
        for wrong in (data[:at], data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]):
            with pytest.raises(StreamError):
                decompressed(pipe, wrong)


FORGED = pipeline_of("pixels given tokens", "marginal")
FORGED_HEADER, (FORGED_CHUNK,) = read_stream(compressed(FORGED, images_of(FORGED, 2), lossless=True))
OTHER_HEADERS = [
    {"images": 3},
    {"images": 0, "names": ()},
    {"chunk_images": 1},
    {"chunk_images": 65535, "images": 65535},
    {"lossless": False},
]
OTHER_CHUNKS = {
    "exceptions": st.lists(st.sampled_from([0, 135, 136, 2**32 - 1]), max_size=5).map(lambda k: np.array(k, np.uint32)),
    "tokens": st.binary(max_size=40),
    "pixels": st.binary(max_size=600),
    "digest": st.integers(0, 2**32 - 1),
}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.just({}) | st.sampled_from(OTHER_HEADERS), st.fixed_dictionaries({}, optional=OTHER_CHUNKS))
def test_a_forged_stream_is_one_error(header, chunk):
    """All checksums are right."""
    changed = FORGED_CHUNK._replace(**chunk)
    write_stream(file := io.BytesIO(), forged := FORGED_HEADER._replace(**header), [changed] * forged.num_chunks)
    try:
        found = decompressed(FORGED, file.getvalue())
    except StreamError as error:
        assert "\n" not in str(error)
    else:
        assert len(found) == forged.images


def test_more_images_than_the_caller_allows_are_refused():
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe))
    assert len(decompressed(pipe, data, max_images=9)) == 9
    with pytest.raises(StreamError):
        decompressed(pipe, data, max_images=8)


def test_lossless_needs_a_likelihood():
    pipe = pipeline_of()
    with pytest.raises(LikelihoodError, match="lossless=False"):
        compressed(pipe, images_of(pipe), lossless=True)


def test_lossless_takes_eight_bits():
    pipe = pipeline_of("bytes")
    with pytest.raises(ValueError, match="8-bit"):
        compressed(pipe, torch.full((1, 1, 8, 8), 0.1234), lossless=True)


def test_images_of_another_size_are_not_resized():
    pipe = pipeline_of()
    with pytest.raises(ValueError, match="8 x 8 pixels, this is 9 x 8"):
        compressed(pipe, [Image.new("L", (9, 8))])
    with pytest.raises(ValueError, match="shape"):
        compressed(pipe, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="mode L, this is RGB"):
        compressed(pipeline_of("bytes"), [Image.new("RGB", (8, 8))], lossless=True)


def test_each_image_of_a_list_is_taken_as_it_is_alone():
    pipe = pipeline_of("bytes")
    for other in (torch.zeros(1, 8, 8, dtype=torch.uint8), np.zeros((8, 8), np.uint8)):
        with pytest.raises(ValueError, match="8 x 8 pixels, this is 9 x 8"):
            compressed(pipe, [Image.new("L", (9, 8)), other])
        with pytest.raises(ValueError, match="mode L, this is LA"):
            compressed(pipe, [other, Image.new("LA", (8, 8))], lossless=True)
        found = decompressed(pipe, compressed(pipe, [Image.new("L", (8, 8), 255), other]))
        assert found[:, 0, 0, 0].tolist() == [1, -1]


def test_an_image_is_as_large_as_it_is_upright():
    """By its size as it is stored, a turned image was cropped, though every pixel was to be kept."""
    pixels = np.arange(15, dtype=np.uint8).reshape(3, 5)
    for stored, fits in ((np.rot90(pixels), True), (pixels, False)):  # both are turned clockwise
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.open(io.BytesIO(encoded(stored, exif=exif)))
        if fits:
            assert np.array_equal(compression.exact_pixels(image, (1, 3, 5), True)[0], pixels)
        else:
            with pytest.raises(ValueError, match="5 x 3 pixels, this is 3 x 5"):
                compression.exact_pixels(image, (1, 3, 5), False)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_8_bits_do_not_hold_is_not_kept(channels):
    mode, clear = ("L", 7) if channels == 1 else ("RGB", (7, 7, 7))
    image = Image.open(io.BytesIO(encoded(Image.new(mode, (5, 3), clear), transparency=clear)))
    assert compression.exact_pixels(image, (channels, 3, 5), False).eq(255).all()  # clear is white
    with pytest.raises(ValueError, match="8 bits a channel, this has a colour that is transparent"):
        compression.exact_pixels(image, (channels, 3, 5), True)


def test_colours_of_16_bits_are_not_kept():
    """Pillow gives them as RGB of 8 bits, without a word."""
    image = Image.open(io.BytesIO(deep_png(np.arange(45).reshape(3, 15) * 1000)))
    assert image.mode == "RGB" and compression.exact_pixels(image, (3, 3, 5), False).shape == (3, 3, 5)
    image = Image.open(io.BytesIO(deep_png(np.arange(45).reshape(3, 15) * 1000)))
    with pytest.raises(ValueError, match="8 bits a channel, this has 16 bits a channel"):
        compression.exact_pixels(image, (3, 3, 5), True)


def deep_png(values):
    """A PNG file of RGB in 16 bits, which Pillow does not write: of rows `(H, 3 * W)`."""
    height, width = values.shape

    def part(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width // 3, height, 16, 2, 0, 0, 0)
    parts = part(b"IHDR", header), part(b"IDAT", zlib.compress(rows)), part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pil_images_come_back():
    pipe = pipeline_of("bytes", channels=3, prior="marginal")
    images = [Image.fromarray(image) for image in images_of(pipe).permute(0, 2, 3, 1).numpy()]
    found = pipe.decompress(compressed(pipe, images, lossless=True), progress=False)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in images]


def test_without_the_coder_it_says_what_to_install(monkeypatch):
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe))
    monkeypatch.setitem(sys.modules, "constriction", None)
    for use in (lambda: compressed(pipe, images_of(pipe)), lambda: decompressed(pipe, data)):
        with pytest.raises(StreamError, match="smalti.compress"):
            use()


def test_the_coder_makes_the_bytes_that_it_made_before():
    """Of fixed symbols under fixed tables: another version of constriction must read the streams of this one."""
    library = codec.constriction()
    coder, family = library.stream.queue.RangeEncoder(), library.stream.model.Categorical(perfect=False)
    for size in (2, 7, 256):
        ids = np.arange(64 * size).reshape(64, size) * 2654435761 % (1 << 32)
        weights = exponentials().numpy()[ids % len(exponentials())].astype(np.float64)
        coder.encode((ids[:, 0] % size).astype(np.int32), family, weights)
    data = coder.get_compressed().astype("<u4").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "e910d83e0700f62c"


def test_autocast_changes_nothing():
    pipe = pipeline_of()
    images = images_of(pipe)
    data = compressed(pipe, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


def test_streams_are_written_one_chunk_at_a_time(monkeypatch):
    """A reader of images that is asked for the next batch only when the last one is written."""
    pipe, sizes = pipeline_of(), []
    monkeypatch.setattr(compression, "CHUNK_IMAGES", 2)
    file, images = io.BytesIO(), pipe.to_images(images_of(pipe, 6))

    def parts():
        for part in images.split(2):
            sizes.append(len(file.getvalue()))
            yield part

    compression.write_images(pipe, file, parts(), 6, progress=False)
    assert sizes == sorted(set(sizes)) and len(sizes) == 3
    assert torch.equal(decompressed(pipe, file.getvalue()), expected(pipe, images, False))


def test_a_chunk_is_no_larger_than_writers_make_it(monkeypatch):
    """The states of the prior for all of a chunk are in memory at once: a header may announce 65,535."""
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe, 3))
    monkeypatch.setattr(compression, "CHUNK_IMAGES", 2)
    with pytest.raises(StreamError):
        decompressed(pipe, data)


# The parts


def test_all_8_bit_values_are_exact_and_what_lies_between_is_not():
    values = torch.arange(256).float() / 127.5 - 1
    compression.check_exact(values)
    compression.check_exact(values.double() + 1e-6)
    for away in (2e-5, -2e-5, 1 / 255):
        for at in (0, 100, 255):
            shifted = values.clone()
            shifted[at] += away
            with pytest.raises(ValueError):
                compression.check_exact(shifted)


def test_a_chunk_is_of_so_many_logits(monkeypatch):
    pipe = pipeline_of()  # of 4 tokens among 32
    each = len(pipe.prior.grid) * pipe.prior.grid.vocab_size
    sizes = []
    for numbers in (1, each - 1, each, 3 * each - 1, 3 * each, 256 * each, 1 << 26):
        monkeypatch.setattr(compression, "CHUNK_NUMBERS", numbers)
        sizes.append(compression.chunk_images(pipe))
    assert sizes == [1, 1, 1, 2, 3, 256, 256]


def test_symbols_come_back_and_what_is_left_over_is_told():
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(0, 3, (500, 9)))
    symbols = torch.from_numpy(generator.integers(0, 9, 500))
    encoder = codec.Encoder()
    for part in (slice(0, 200), slice(200, 500)):
        assert torch.equal(encoder.code(logits[part], symbols[part]), symbols[part])
    doubts = torch.zeros(500, dtype=torch.bool)
    decoder, nothing = codec.Decoder(encoder.bytes(), doubts), torch.zeros(300, dtype=torch.long)
    with pytest.raises(ModelMismatch):
        decoder.finish()
    found = [decoder.code(logits[:300], nothing), decoder.code(logits[300:], nothing)]
    decoder.finish()
    assert torch.equal(torch.cat(found), symbols)
    with pytest.raises(StreamError):
        codec.Decoder(bytes(5), doubts)
    with pytest.raises(ModelMismatch):
        codec.Decoder(b"\xff" * 400, doubts).code(logits, symbols)


def test_logits_that_no_float_is_too_large_for_have_grid_steps():
    """What is no number counts as 0."""
    last = len(exponentials()) - 1
    logits = torch.tensor(
        [
            [torch.nan, 0.0, -1.0],
            [1e300, torch.inf, torch.nan],
            [-torch.inf, -1e300, -torch.inf],
            [-1e300, 0.0, -torch.inf],
        ]
    ).double()
    steps, unsure = grid_steps(logits)
    assert not unsure.any()
    assert steps.tolist() == [[0, 0, 16], [0, 0, last], [0, 0, 0], [last, 0, last]]


@pytest.mark.parametrize(("device", "used"), [("mps", "cpu"), ("cpu", "cpu"), ("meta", "meta")])
def test_on_a_device_without_float64_the_processor_is_used(device, used):
    pipe = pipeline_of()
    given = SimpleNamespace(device=torch.device(device), prior=pipe.prior, tokenizer=pipe.tokenizer)
    models = compression.Models(given, residual=True)
    parameters = [*models.prior.parameters(), *models.tokenizer.parameters()]
    assert models.device.type == used and {p.device.type for p in parameters} == {used}
