"""Streams of real models: what comes back, in how many bytes, on which machine, and what is refused.

Covers: pipelines/commands/compress.py, pipelines/commands/decompress.py, pipelines/compression/codec.py,
pipelines/compression/coder.py.
"""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from PIL import Image
from small import PRIORS, make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines.commands.compress import main as compress_verb
from pipelines.commands.decompress import main as decompress_verb
from pipelines.compression import codec
from pipelines.compression import coder as coder_of_chunks
from pipelines.compression import coding as compression
from pipelines.compression.codec import CodecError, Models, exponentials, grid_steps, weights_of
from pipelines.compression.coder import Coder
from pipelines.compression.header import RAW, ModelMismatch, StreamError, StreamLimit
from pipelines.compression.header import Limits as StreamLimits
from pipelines.compression.streams import parse, write_stream
from tokenizer.base import LikelihoodError

pytest.importorskip("constriction")
ROOT = Path(__file__).parents[3]
LOGISTIC = {"likelihood": {"kind": "discretized_logistic", "components": 2}}
# A tokenizer for each way an image may come back: as its tokens' image, or as it was, with and without a second part.
KINDS = {
    "tokens": ("vqvae", {}, False),
    "pixels given tokens": ("vqvae", LOGISTIC, True),
    "pixels given levels": ("pixels", {"levels": 5}, True),
    "bytes": ("pixels", {"levels": 256}, True),
}


def pipeline_of(kind="tokens", prior="gpt", size=(8, 8), channels=1, **config):
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    tokenizer = make_tokenizer(name, size, channels, **settings)
    grid = tokenizer.grid
    return ImagePipeline(
        tokenizer, make_prior(prior, grid.shape, grid.vocab_size, tokenizer=tokenizer.fingerprint(), **config)
    )


def images_of(pipe, count=9, seed=0):
    shape = (count, *pipe.tokenizer.image_shape)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


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
    assert all(chunk.profile != RAW for chunk in parse(data))
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


@pytest.mark.parametrize("prior", ["gpt", "made", "causal_conv", "masked"])
def test_every_order_codes(prior):
    pipe = pipeline_of(prior=prior, size=(12, 8), order="spiral_in")
    images = images_of(pipe)
    data = compressed(pipe, images)
    assert all(chunk.profile != RAW for chunk in parse(data))
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_tokenizer_comes_back(kind, channels):
    pipe, lossless = pipeline_of(kind, "causal_conv", channels=channels), KINDS[kind][2]
    images = images_of(pipe)
    data = compressed(pipe, images, lossless=lossless)
    assert all(chunk.profile != RAW for chunk in parse(data))
    assert parse(data).header.lossless == kind.startswith("pixels given")  # of the others, tokens are all there is
    found = decompressed(pipe, data)
    assert torch.equal(found, expected(pipe, images, lossless))
    if lossless:
        assert torch.equal(((found + 1) * 127.5).round().to(torch.uint8), images)


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_batch_size_and_threads_do_not_matter(kind, batch_size, threads, monkeypatch):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    monkeypatch.setattr(compression, "CHUNK_IMAGES", 10)  # the last chunk is not full
    images, before = images_of(pipe, 25), torch.get_num_threads()
    data = compressed(pipe, images, lossless=lossless)
    assert parse(data).header.num_chunks == 3
    try:
        torch.set_num_threads(threads)
        assert torch.equal(decompressed(pipe, data, batch_size=batch_size), expected(pipe, images, lossless))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("prior", ["gpt", "made", "gated_pixelcnn"])
def test_a_stream_decodes_without_the_cache(prior, monkeypatch):
    pipe = pipeline_of(prior=prior)
    images = images_of(pipe)
    data = compressed(pipe, images)
    member = type(pipe.prior)
    monkeypatch.setattr(member, "start", member.start_slow)
    monkeypatch.setattr(member, "next_logits", member.next_logits_slow)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


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
    images = images_of(pipe, 64)
    nats = pipe.bits_per_dim(images) * 256 * np.log(2) if lossless else -pipe.log_prob(images)
    bits = float(nats.double().sum() / np.log(2))
    size = 8 * sum(
        len(chunk.tokens) + len(chunk.pixels or b"") for chunk in parse(compressed(pipe, images, lossless=lossless))
    )
    assert 0.999 * bits < size < 1.005 * bits + 2 * 64


def test_the_container_adds_little():
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe, 64))
    assert len(data) - sum(len(chunk.tokens) for chunk in parse(data)) < 100


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

    monkeypatch.setattr(coder_of_chunks, "grid_steps", noisy)
    monkeypatch.setattr(codec, "grid_steps", noisy)


def test_what_machines_may_disagree_on_is_written_down(monkeypatch):
    pipe = boundary_pipeline()
    images = images_of(pipe)
    data = compressed(pipe, images)
    (chunk,) = parse(data)
    assert len(chunk.exceptions) == 9 * 4
    shaken(monkeypatch, 1e-10)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))
    monkeypatch.setattr(codec, "GUARD", 0.0)  # the bug: no guard
    with pytest.raises(ModelMismatch):
        decompressed(pipe, compressed(pipe, images, checked=False))


def test_doubts_are_counted_through_tokens_and_pixels(monkeypatch):
    """With a guard so wide that there are many of both, machines may differ by as much less."""
    monkeypatch.setattr(codec, "GUARD", 1e-3)
    pipe = pipeline_of("pixels given tokens")
    images = images_of(pipe)
    data = compressed(pipe, images, lossless=True)
    (chunk,) = parse(data)
    tokens = 9 * 4
    assert chunk.profile != RAW and chunk.exceptions[0] < tokens <= chunk.exceptions[-1]
    shaken(monkeypatch, 1e-4)
    assert torch.equal(decompressed(pipe, data), expected(pipe, images, True))


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
def test_what_was_decoded_is_checked_itself(kind):
    """Where nothing else is amiss but what comes out."""
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    stream = parse(compressed(pipe, images_of(pipe), lossless=lossless))
    forged = [replace(chunk, digest=chunk.digest ^ 1) for chunk in stream]
    write_stream(file := io.BytesIO(), stream.header, forged)
    with pytest.raises(ModelMismatch, match="chunk 0"):
        decompressed(pipe, file.getvalue())


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens", "bytes"])
def test_small_differences_decode_and_large_ones_are_found(kind, monkeypatch):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    images = images_of(pipe, 40)
    data = compressed(pipe, images, lossless=lossless)
    with monkeypatch.context() as patch:
        shaken(patch, 1e-10)
        assert torch.equal(decompressed(pipe, data), expected(pipe, images, lossless))
    with monkeypatch.context() as patch:
        shaken(patch, 1e-2)
        with pytest.raises(ModelMismatch, match="known-answer"):
            decompressed(pipe, data)
    with monkeypatch.context() as patch:  # and where the known answer happens to be right
        answer = Models(pipe, residual=parse(data).header.lossless).answer()
        patch.setattr(Models, "answer", lambda models: answer)
        shaken(patch, 1e-2)
        with pytest.raises(ModelMismatch):
            decompressed(pipe, data)


def test_float32_would_not_do(monkeypatch):
    """The negative control: the same codec on float32 makes chunks that do not decode along the other path."""
    monkeypatch.setattr(codec, "doubled", lambda model, device: model.float().eval())
    monkeypatch.setattr(compression, "CHUNK_IMAGES", 8)
    pipe = pipeline_of("bytes", "gpt", size=(16, 16))
    stream = parse(compressed(pipe, images_of(pipe, 64)))
    assert any(chunk.profile == RAW for chunk in stream)


def test_a_chunk_that_does_not_decode_is_stored_as_it_is(monkeypatch):
    for kind in ("tokens", "pixels given tokens"):
        pipe, lossless = pipeline_of(kind), KINDS[kind][2]
        images = images_of(pipe)
        with monkeypatch.context() as patch:
            patch.setattr(Coder, "decodes", lambda *arguments: False)
            data = compressed(pipe, images, lossless=lossless)
        assert [chunk.profile for chunk in parse(data)] == [RAW]
        assert torch.equal(decompressed(pipe, data), expected(pipe, images, lossless))


# What is refused


@pytest.mark.parametrize("kind", ["tokens", "pixels given tokens"])
def test_another_model_is_told_apart(kind):
    pipe, lossless = pipeline_of(kind), KINDS[kind][2]
    data = compressed(pipe, images_of(pipe), lossless=lossless)
    parameters = [*pipe.prior.parameters(), *pipe.tokenizer.decoder.parameters()]
    for index in range(50):
        parameter = parameters[index % len(parameters)]
        with torch.no_grad():
            before = parameter.clone()
            parameter[(0,) * parameter.ndim] += 1e-4
            with pytest.raises(ModelMismatch, match="model_id"):
                decompressed(pipe, data)
            parameter.copy_(before)
    decompressed(pipe, data)
    other = pipeline_of(kind, size=(12, 12))
    with pytest.raises(ModelMismatch, match="image"):
        decompressed(other, data)


def test_a_model_that_is_not_the_streams_is_not_run(monkeypatch):
    pipe, other = pipeline_of(), pipeline_of(prior="made")
    data = compressed(pipe, images_of(pipe))
    monkeypatch.setattr(type(other.prior), "forward", lambda *arguments: pytest.fail("it was run"))
    with pytest.raises(ModelMismatch):
        decompressed(other, data)


def test_damage_is_found():
    pipe = pipeline_of("pixels given tokens")
    data = bytearray(compressed(pipe, images_of(pipe), lossless=True))
    generator = np.random.default_rng(0)
    for _ in range(300):
        at, bit = generator.integers(len(data)), generator.integers(8)
        data[at] ^= 1 << bit
        with pytest.raises(StreamError):
            decompressed(pipe, bytes(data))
        data[at] ^= 1 << bit
    for size in range(0, len(data), 7):
        with pytest.raises(StreamError):
            decompressed(pipe, bytes(data[:size]))


def test_limits_are_the_callers():
    pipe = pipeline_of()
    data = compressed(pipe, images_of(pipe))
    with pytest.raises(StreamLimit, match="9 images"):
        decompressed(pipe, data, limits=StreamLimits(max_images=8))


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


def test_pil_images_come_back():
    pipe = pipeline_of("bytes", channels=3, prior="marginal")
    images = [Image.fromarray(image) for image in images_of(pipe).permute(0, 2, 3, 1).numpy()]
    found = pipe.decompress(compressed(pipe, images, lossless=True), progress=False)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in images]


def test_without_the_coder_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    pipe = pipeline_of()
    with pytest.raises(CodecError, match="pip install 'smalti"):
        compressed(pipe, images_of(pipe))


def test_a_coder_that_codes_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "CODER_ANSWER", "0" * 16)
    with pytest.raises(CodecError, match="other bytes"):
        codec.constriction()


def test_autocast_changes_nothing():
    pipe = pipeline_of()
    images = images_of(pipe)
    data = compressed(pipe, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decompressed(pipe, data), expected(pipe, images, False))


# The verbs


def saved(tmp_path, kind="bytes", **options):
    pipe = pipeline_of(kind, **options)
    pipe.save_pretrained(tmp_path / "pipeline")
    for index, image in enumerate(images_of(pipe).permute(0, 2, 3, 1).numpy()):
        path = tmp_path / "images" / ("some" if index % 2 else "") / f"{index}.{'bmp' if index == 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    return pipe


def arguments(tmp_path, *more):
    return [f"pipeline={tmp_path / 'pipeline'}", "device=cpu", *more]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_comes_back_with_its_names(tmp_path, capsys, channels):
    saved(tmp_path, channels=channels, prior="marginal")
    stream, out = tmp_path / "all.smalti", tmp_path / "out"
    compress_verb(arguments(tmp_path, f"images={tmp_path / 'images'}", f"out={stream}", "lossless=true"))
    assert "9 images" in capsys.readouterr().out
    decompress_verb(arguments(tmp_path, f"stream={stream}", f"out={out}"))
    originals = sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file())
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = [path.relative_to(tmp_path / "images").as_posix() for path in originals]
    assert found == {name if name.endswith(".png") else f"{name}.png" for name in names}
    for path, name in zip(originals, names, strict=True):
        again = out / (name if name.endswith(".png") else f"{name}.png")
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(again))).all()


def test_verbs_say_what_is_wrong(tmp_path, capsys):
    saved(tmp_path, "tokens")
    stream = tmp_path / "all.smalti"
    assert "neither a folder" in fails(capsys, "compress", *arguments(tmp_path, "images=nowhere"))
    folder = f"images={tmp_path / 'images'}"
    line = fails(capsys, "compress", *arguments(tmp_path, folder, f"out={stream}", "lossless=true"))
    assert "likelihood" in line and not stream.exists()
    Image.new("L", (9, 9)).save(tmp_path / "images" / "other.png")
    line = fails(capsys, "compress", *arguments(tmp_path, folder, f"out={stream}"))
    assert "other.png" in line and "8 x 8" in line
    (tmp_path / "images" / "other.png").write_bytes(b"no image")
    assert "other.png" in fails(capsys, "compress", *arguments(tmp_path, folder, f"out={stream}"))
    assert [path.name for path in tmp_path.iterdir() if "smalti" in path.name] == []
    (tmp_path / "images" / "other.png").unlink()
    compress_verb(arguments(tmp_path, folder, f"out={stream}"))
    capsys.readouterr()
    data = stream.read_bytes()
    for wrong, word in (
        (b"", "empty"),
        (b"PK\3\4" + data, "not a stream"),
        (data[:-9], "end"),
        (data + b"1", "follow"),
    ):
        stream.write_bytes(wrong)
        line = fails(capsys, "decompress", *arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'out'}"))
        assert word in line and not (tmp_path / "out").exists()
    stream.write_bytes(data)
    again = arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'images'}")
    assert "is there and not empty" in fails(capsys, "decompress", *again)
    few = arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'out'}", "max_images=3")
    assert "at most 3" in fails(capsys, "decompress", *few)
    pipeline_of("tokens", "made").save_pretrained(tmp_path / "pipeline")
    line = fails(capsys, "decompress", *arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'out'}"))
    assert "another model" in line


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
