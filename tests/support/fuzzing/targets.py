"""Every parser of what may come from anyone, as a `fuzzing.Target`: good inputs, damage, what a user does with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from fuzzing import hostile_bases as bases
from fuzzing.campaign import Target
from fuzzing.hostility import read_tree
from fuzzing.mutations import WAYS, Tree, damage_bytes, damage_files, damage_weights, pack, plant_pickles, unpack
from fuzzing.ways import (
    cross_json,
    damage_answers,
    damage_any_json,
    damage_chunks,
    damage_header,
    damage_sizes,
    damage_yaml,
    read_plan,
    seal_manifest,
    seal_png,
    seal_stream,
)

from pipelines.config import UserError
from tokenizer.files.errors import PipelineLoadError

ROOT = Path(__file__).parents[3]
PORT = int(os.environ.get("SMALTI_FUZZ_PORT", "0"))
"""Of the Hub that workers serve; `HF_ENDPOINT` has to name it before anything is imported."""

TOLD = (PipelineLoadError, UserError)


# Folders with a manifest


def good_pipelines(folder: Path) -> dict[str, Tree]:
    """Format 1 of every part, and format 2: weights of 16 bits."""
    from pipelines import ImagePipeline

    trees = bases.pipelines(folder)
    pipe = ImagePipeline.from_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "half", variant="fp16")
    return trees | {"half": read_tree(folder / "half")}


def use_pipeline(folder: Path) -> None:
    """Load, look, sample."""
    from pipelines import ImagePipeline

    pipe = ImagePipeline.from_pretrained(folder)
    assert repr(pipe).isprintable(), repr(pipe)
    pipe.prior.grid.check(pipe(1, seed=0, progress=False, output_type="pt").tokens)


def good_calibrations(folder: Path) -> dict[str, Tree]:
    """With every score, and with a background."""
    bases.save_pipeline(folder / "full", "vit", "marginal", background="marginal")
    bases.save_pipeline(folder / "likely", "vqvae", "gpt", background="marginal", widths=(8,))
    return {path.name: read_tree(path) for path in folder.iterdir()}


def damage_calibration(tree: Tree, chance: Random) -> str:
    """A value of the calibration."""
    some = {name: node for name, node in tree.items() if name == "calibration.json"}
    done = damage_any_json(some, chance)
    tree.update(some)
    return done


def use_calibration(folder: Path) -> None:
    """Load, and score, map and heal two images by all methods that there are."""
    from pipelines import ImagePipeline
    from pipelines.anomaly.healing import anomaly_map, heal
    from pipelines.anomaly.image_statistics import statistics
    from pipelines.anomaly.scores import METHODS, p_value_of, score_of
    from pipelines.stages.calibration import CalibrationError

    pipe = ImagePipeline.from_pretrained(folder)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = statistics(pipe, images)
    for method in METHODS:
        try:
            scores = score_of(method, found, pipe.calibration, labelled=False)
            p = p_value_of(method, scores, pipe.calibration, labelled=False)
            assert not scores.isnan().any() and bool(((p > 0) & (p <= 1)).all()), (method, scores, p)
        except CalibrationError as error:
            assert str(error).isprintable()
    for act in (partial(anomaly_map, pipe), partial(heal, pipe)):
        try:
            act(images)
        except CalibrationError as error:
            assert str(error).isprintable()


def good_tokens(folder: Path) -> dict[str, Tree]:
    """In one file, in several, without labels, and as for the Hub."""
    from givens.token_datasets import make_dataset

    small: Any = {"widths": (8,)}
    make_dataset(**small).save(folder / "one")
    make_dataset(**small).save(folder / "several", rows_per_shard=2)
    make_dataset(labelled=False, **small).save(folder / "plain")
    make_dataset(**small).to_parquet(folder / "parquet")
    return {path.name: read_tree(path) for path in folder.iterdir()}


def use_tokens(folder: Path) -> None:
    """All rows, read into memory and mapped."""
    from pipelines.tokens import dataset, load_tokens

    kept = dataset.IN_MEMORY
    cache = Path(os.getcwd()) / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    try:
        for dataset.IN_MEMORY in (kept, 0):
            data = load_tokens(folder, cache_dir=cache)
            for split in data.splits.values():
                data.grid.check(split.tokens[:].int())
                assert split.labels is None or 0 <= int(split.labels.min()) <= int(split.labels.max()) < 3
    finally:
        dataset.IN_MEMORY = kept


# Resume states


def use_state(folder: Path, counters: bool = True) -> None:
    """Load it, look at its counters, and go on for a step."""
    from pipelines.training.checkpoints.counters import check_counters
    from pipelines.training.checkpoints.states import load_state

    net, average, optimizers = bases.make_net()
    _, found = load_state(folder, model=net, ema=average, optimizers=optimizers)
    check_counters(found, folder / "state.json")
    net(torch.randn(5, 3)).square().sum().backward()
    optimizers["model"].step()
    average.update_parameters(net)


def good_shards_of_states(folder: Path) -> dict[str, Tree]:
    """As one, two and three processes write it."""
    from givens.pieces import in_shards

    found = {}
    for count in (1, 2, 3):
        bases.states(folder / str(count))
        path = next((folder / str(count) / "state").iterdir())
        found[f"{count} processes"] = read_tree(in_shards(path, count))
    return found


def damage_sharding(tree: Tree, chance: Random) -> str:
    """What a file of pieces says of where they belong, or a file for another."""
    from fuzzing.mutations import change_value, pack, unpack

    name = chance.choice([name for name in tree if "shard-" in name])
    header, body = unpack(tree[name])
    if chance.random() < 0.2:
        other = chance.choice([name for name in tree if "shard-" in name])
        tree[name] = tree[other]
        return f"{other} for {name}"
    facts = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    done = change_value(facts, chance)
    told = chance.choice([json.dumps(facts), json.dumps(facts), "[]", "{", "[" * 5000, json.dumps({"a": facts})])
    header["__metadata__"]["DCP_SHARDING_INFO"] = told
    tree[name] = pack(json.dumps(header).encode(), body, chance)
    return f"{done} of the pieces in {name}"


# Streams


@cache
def coders() -> dict[bytes, Any]:
    """Pipelines by the id that streams have."""
    from small_pipelines import make_pipeline

    from pipelines.compression.codec import Models

    torch.manual_seed(0)
    likely = {"quantizer": {"kind": "fsq", "levels": (4, 3)}, "likelihood": {"kind": "discretized_logistic"}}
    made = [
        make_pipeline(size=(8, 8), sizes={"widths": (8,)}),
        make_pipeline("vqvae", "marginal", size=(8, 8), sizes={"widths": (8,), **likely}),
    ]
    return {Models(pipe, residual=pipe.tokenizer.has_likelihood).model_id: pipe for pipe in made}


def good_streams(folder: Path) -> dict[str, Tree]:
    """Lossy with names, lossless, and one of several chunks."""
    from pipelines.compression import coding

    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    lossy, lossless = coders().values()
    names = ["a.png", "b/ä.png", "..png", "b/c.d", "e"]
    whole = {
        "lossy": coding.compress(lossy, images, names=names, progress=False),
        "lossless": coding.compress(lossless, images, lossless=True, progress=False),
    }
    kept, coding.CHUNK_IMAGES = coding.CHUNK_IMAGES, 2
    whole["chunks"] = coding.compress(lossy, images, progress=False)
    coding.CHUNK_IMAGES = kept
    return {name: {"stream": data} for name, data in whole.items()}


def use_stream(folder: Path) -> None:
    """What `smalti decompress` does, into a folder."""
    from pipelines.commands.decompress import write_folder
    from pipelines.compression.header import TruncatedStream

    data, out = (folder / "stream").read_bytes(), folder.parent / "out"
    if not data:
        raise TruncatedStream("the file is empty")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    pipe: Any = coders().get(data[8:24], next(iter(coders().values())))
    config: Any = SimpleNamespace(max_images=1 << 24, batch_size=None)
    write_folder(pipe, data, out, config)


# Configurations


def good_presets(folder: Path) -> dict[str, Tree]:
    """A third of those that the package has, tokenizers and priors, by their names."""
    from pipelines.config.arguments import presets

    found = sorted((name, path) for name, path in presets().items() if name.startswith(("tokenizer/", "prior/")))
    return {name.replace("/", "-"): {f"{name.partition('/')[0]}.yaml": p.read_bytes()} for name, p in found[::3]}


def use_preset(folder: Path) -> None:
    """What a run does with it before it begins; what it would write of its configuration reads the same."""
    from pipelines.config.arguments import read_yaml
    from pipelines.config.command import parse
    from pipelines.config.schema import to_yaml
    from pipelines.train_prior import TrainPriorConfig
    from pipelines.train_tokenizer import TrainTokenizerConfig

    (path,) = folder.glob("*.yaml")
    kind: Any = TrainTokenizerConfig if path.stem == "tokenizer" else TrainPriorConfig
    more = ["out=run"] if path.stem == "tokenizer" else ["out=run", "tokens=tokens"]
    config = parse(kind, ["--config", str(path), *more], verb=f"train_{path.stem}", description="")
    again = kind.model_validate(read_yaml(to_yaml(config)))
    assert again == config, (again, config)


# Images


def good_images(folder: Path) -> dict[str, Tree]:
    """Of every format and mode that is read."""
    import io

    from givens.image_files import encoded, noise
    from PIL import Image

    grey, colour = Image.fromarray(noise(9, 12)), Image.fromarray(noise(9, 12, 3))
    transparent = Image.fromarray(noise(9, 12, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    film = io.BytesIO()
    grey.save(film, "GIF", save_all=True, append_images=[grey.rotate(90, expand=True)])
    made = {
        "grey.png": encoded(grey),
        "colour.png": encoded(colour),
        "transparent.png": encoded(transparent),
        "palette.png": encoded(colour.quantize(16), transparency=0),
        "deep.png": encoded(Image.fromarray(noise(9, 12).astype("uint16") * 257)),
        "colour.jpg": encoded(colour, "JPEG", exif=exif),
        "progressive.jpg": encoded(colour, "JPEG", progressive=True),
        "inks.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "colour.webp": encoded(colour, "WEBP"),
        "exact.webp": encoded(transparent, "WEBP", lossless=True),
        "colour.bmp": encoded(colour, "BMP"),
        "film.gif": film.getvalue(),
        "plain.tif": encoded(transparent, "TIFF"),
        "packed.tif": encoded(colour, "TIFF", compression="tiff_lzw"),
        "photo.tif": encoded(colour, "TIFF", compression="jpeg"),
    }
    return {name: {name: data} for name, data in made.items()}


def use_image(folder: Path) -> None:
    """Pixels, or a reason that can be printed."""
    from pipelines.images.bad import Problem, listed
    from pipelines.images.decoding import try_decode

    for path in folder.iterdir():
        for shape in ((3, 16, 16), (1, 9, 12)):
            found = try_decode(path, shape)
            if isinstance(found, str):
                assert listed([Problem(str(path), 0, found)]).replace("\n", "").isprintable(), found
            else:
                assert found.shape == shape and found.dtype == "uint8"


# Shards


def good_shards(folder: Path) -> dict[str, Tree]:
    """Each with the index that is kept of it, or without."""
    from givens.image_files import rows_of, write_parquet, write_tar

    rows = rows_of(12)
    made = {
        "tar": write_tar(folder / "a.tar", rows),
        "parquet": write_parquet(folder / "a.parquet", rows, names=["cat", "dog", "eel"]),
    }
    found: dict[str, Tree] = {name: {path.name: path.read_bytes()} for name, path in made.items()}
    for name, path in made.items():
        index = index_place(path)
        read_shard(path)
        found[f"{name} with index"] = {**found[name], "index.safetensors": index.read_bytes()}
    return found


def index_place(path: Path) -> Path:
    """Where the index of a shard is kept; the cache is in the current folder from now on."""
    import hashlib

    from huggingface_hub import constants

    from pipelines.images.shards import reader
    from pipelines.images.shards.places import shard_at

    constants.HF_HOME = os.path.join(os.getcwd(), "home")
    shard = shard_at(str(path))
    facts = [reader.VERSION, shard.name, shard.size, shard.stamp, "image", "label"]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return reader.cache_folder() / f"{name}.safetensors"


def read_shard(path: Path | str, **options: Any) -> list[int]:
    """Every row as training reads it; the images that came."""
    from pipelines.images import DataConfig, load_images

    options = {"image_size": 12, "streaming": True, "on_error": "skip", "max_bad_fraction": 1, **options}
    images = load_images(DataConfig(source=str(path), **options))
    found = []
    for part in (images.train, images.held_out):
        pixels = part.pixels(range(min(64, len(part))))
        assert part.labels is None or len(part.labels) == len(part)
        found += [hash(image.numpy().tobytes()) for image in pixels]
        part.report  # noqa: B018
    return found


def damage_index(tree: Tree, chance: Random) -> str:
    """Numbers or the header of the kept index, where there is one."""
    if "index.safetensors" not in tree:
        return damage_sizes(tree, chance)
    some = {"index.safetensors": tree["index.safetensors"]}
    header, body = unpack(some["index.safetensors"])
    entry = header[chance.choice([name for name in header if name != "facts"])]
    begin, end = entry["data_offsets"]
    if chance.random() < 0.5 and end - begin >= 8 and entry["dtype"] == "I64":
        at = begin + 8 * chance.randrange((end - begin) // 8)
        number = int(chance.choice([-1, 0, 1, 5, 13, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)]))
        some["index.safetensors"] = pack(
            json.dumps(header).encode(), body[:at] + struct.pack("<q", number) + body[at + 8 :], chance
        )
        done = f"{number} in the index"
    else:
        done = damage_weights(some, chance)
    tree.update(some)
    return done


def use_shard(folder: Path) -> None:
    """Read it, by the index that lies beside it, if there is one."""
    path = next((path for path in folder.iterdir() if path.suffix in (".tar", ".parquet")), folder / "a.tar")
    if path.is_file() and (folder / "index.safetensors").is_file():
        kept = index_place(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "index.safetensors", kept)
    elif path.is_file():
        index_place(path).unlink(missing_ok=True)
    read_shard(path)


# Published weights


def good_weights(folder: Path) -> dict[str, Tree]:
    """Random ones by the names of each project."""
    from givens import published_weights as published
    from safetensors.torch import save

    torch.manual_seed(0)
    shapes = {
        "taming": published.taming_shapes(8, (1, 2)),
        "llamagen": published.llamagen_shapes(8, (1, 2)),
        "cosmos": published.cosmos_shapes(8, (1, 2), 1),
        "maskgit": published.maskgit_shapes(8, (1, 2)),
        "magvit2": published.magvit2_shapes(8, (1, 2)),
    }
    found: dict[str, Tree] = {
        name: {"model.safetensors": save(published.random_weights(some))} for name, some in shapes.items()
    }
    return found | {"diffusers": diffusers_weights(folder)}


def diffusers_weights(folder: Path) -> Tree:
    """With its settings."""
    from diffusers import VQModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 16}
    VQModel(**blocks, **sizes, layers_per_block=1, vq_embed_dim=4, sample_size=16).save_pretrained(folder / "diffusers")
    return read_tree(folder / "diffusers")


def use_weights(folder: Path) -> None:
    """Import them, and load what was written."""
    from pipelines.commands.import_ import ImportConfig, run
    from tokenizer import Tokenizer

    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".ckpt", ".pt"))
    named = len(files) == 1 and not files[0].is_symlink()  # what a user names may be a link to anywhere
    run(ImportConfig(source=str(files[0] if named else folder), out=str(out), image_size=16, groups=4))
    assert Tokenizer.from_pretrained(out).image_shape


# What else a verb reads


def good_runs(folder: Path) -> dict[str, Tree]:
    """Files of a run, of an unfinished encode, and of results, as they are written."""
    from pipelines.train_tokenizer import TrainTokenizerConfig
    from tokenizer.files.writing import results_folder, write_json

    run = folder / "run"
    (run / "previews").mkdir(parents=True)
    config = TrainTokenizerConfig(out="run")
    (run / "config.yaml").write_text(yaml_of(config))
    steps = [{"step": step, "loss": 0.5, "lr": 1e-3} for step in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    bad = {"split": "train", "path": "a.png", "row": 3, "reason": "empty", "replaced_by": None}
    (run / "bad_images.jsonl").write_text(json.dumps(bad) + "\n")
    write_json(run / "trackers.json", {"id": "0123456789abcdef", "sent": {"wandb": 3}, "active": ["wandb"]})
    (run / "tokenizer").mkdir()
    data = config.model_dump(mode="json")["data"]
    facts = {"steps": 3, "minutes": 0.5, "evaluation": {"psnr": 3.0}}
    write_json(run / "tokenizer" / "provenance.json", {"data": data, "tokenizer": facts})
    (run / ".tmp-tokens-encode").mkdir()
    write_json(run / ".tmp-tokens-encode" / "job.json", {"tokenizer": "a", "data": data, "batch_size": 3})
    write_json(run / ".tmp-tokens-encode" / "train-00000.json", {"sha256": "0" * 64, "size": 3})
    (run / ".tmp-tokens-encode" / "train-00000.safetensors").write_bytes(b"abc")
    (run / ".lock").write_text(json.dumps({"pid": 1, "host": "here", "since": "2026-01-01 00:00:00"}))
    with results_folder(run / "evaluation") as results:
        write_json(results / "evaluation.json", {"psnr": 3.0})
    return {"run": read_tree(run)}


def yaml_of(config: Any) -> str:
    """As a run writes it."""
    from pipelines.config.schema import to_yaml

    return to_yaml(config)


def use_run(folder: Path) -> None:
    """What a verb that goes on, or comes after, reads of it. Each file is read whatever is wrong with another; then the
    first error is raised."""
    from pipelines.encode import EncodeJob
    from pipelines.images.bad import Report, listed, read_report
    from pipelines.stages.provenance import data_beside
    from pipelines.tracking import tracker
    from pipelines.tracking.record import Reader, Record
    from pipelines.train_tokenizer import TrainTokenizerConfig
    from pipelines.training.run_folder import begun_data, check_folder
    from tokenizer.files.claims import inside, known_gone
    from tokenizer.files.writing import check_results, results_folder

    def record() -> None:
        made = Record(folder, resume_step=2)
        made.log(3, {"loss": 1.0})
        list(Reader(made).read(to_the_end=True))
        made.close()

    def results() -> None:
        check_results(folder / "evaluation", ["evaluation.json"])
        with results_folder(folder / "evaluation") as place:
            (place / "evaluation.json").write_text("{}")

    def job() -> None:
        begun = EncodeJob.unfinished(folder / "tokens")
        if begun is not None:
            EncodeJob.as_now(begun)

    acts: list[Callable[[], Any]] = [
        partial(check_folder, folder, TrainTokenizerConfig(out=str(folder))),
        partial(begun_data, folder),
        partial(read_report, folder),
        partial(data_beside, folder / "tokenizer" / "provenance.json"),
        partial(tracker._identify, folder, ["wandb"], 2, 3),
        partial(known_gone, inside(folder)),
        partial(listed, Report(0, []).problems),
        record,
        results,
        job,
    ]
    failed = []
    for act in acts:
        try:
            act()
        except TOLD as error:
            failed.append(error)
    if failed:
        raise failed[0]


# Servers


def good_http(folder: Path) -> dict[str, Tree]:
    """A shard of each kind, and no faults."""
    found = good_shards(folder)
    return {name: {**found[name], "plan.json": b"[]"} for name in ("tar", "parquet")}


def use_http(folder: Path) -> None:
    """Read the shard from a server that does what the plan says: the right images, or an error; from one that sends
    others as if they were these, whatever came."""
    from fuzzing.misbehaving import part_of, served

    from pipelines.images.shards import http_files, shard, tar

    os.environ["NO_PROXY"] = "127.0.0.1"
    plan, path = read_plan(folder), next(path for path in folder.iterdir() if path.suffix in (".tar", ".parquet"))
    data = path.read_bytes()
    kept = http_files.SILENCE, shard.RETRIES, shard.FIRST_PAUSE, tar.BLOCK_BYTES, tar.SCAN_AHEAD
    http_files.SILENCE, shard.RETRIES, shard.FIRST_PAUSE = 0.4, 1, 0.01
    tar.BLOCK_BYTES = tar.SCAN_AHEAD = 4000
    try:
        with served(lambda _, headers: part_of(data, headers), plan) as (url, asked):
            index_place(path)
            found = read_shard(f"{url}/{path.name}")
            lies = {"other", "redirect", "encoding"} & {fault["fault"] for fault in plan if fault["at"] < len(asked)}
            assert lies or set(found) == set(read_shard(path)), f"other images after {len(asked)} requests"
    finally:
        http_files.SILENCE, shard.RETRIES, shard.FIRST_PAUSE, tar.BLOCK_BYTES, tar.SCAN_AHEAD = kept


def good_hub(folder: Path) -> dict[str, Tree]:
    """A pipeline, and no faults."""
    bases.save_pipeline(folder / "plain", "vqvae", "gpt", widths=(8,))
    return {"plain": {**read_tree(folder / "plain"), "plan.json": b"[]"}}


def use_hub(folder: Path) -> None:
    """Load the pipeline from a Hub that does what the plan says."""
    from fuzzing.misbehaving import served
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from pipelines import ImagePipeline

    class Hasty:  # the module `time`, as the client sees it: it waits for half a minute between its tries
        def __getattr__(self, name: str) -> Any:
            return (lambda seconds: None) if name == "sleep" else getattr(time, name)

    os.environ["NO_PROXY"] = "127.0.0.1"
    constants.HF_HUB_OFFLINE, _http.time = False, Hasty()  # type: ignore[attr-defined]
    signal.setitimer(signal.ITIMER_REAL, 240)  # the client asks a silent server six times for each of nine files
    place = folder.parent / "cache"
    shutil.rmtree(place, ignore_errors=True)
    files = {name: data for name, data in read_tree(folder).items() if name != "plan.json"}
    with served(partial(hub_answer, files), read_plan(folder), PORT), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ImagePipeline.from_pretrained("me/plain", cache_dir=place)


def hub_answer(files: dict[str, bytes], path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
    """What the Hub says of a repository, or a file of it."""
    from fuzzing.misbehaving import part_of

    commit = "0123456789abcdef0123456789abcdef01234567"
    if "/resolve/" in path:
        name = path.partition("?")[0].split("/resolve/")[1].partition("/")[2]
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        status, told, body = part_of(files[name], headers)
        return status, {**told, "X-Repo-Commit": commit}, body
    if "/tree/" in path:
        entries = [{"type": "file", "path": name, "oid": "0", "size": len(data)} for name, data in files.items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
    siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
    about = {"id": "me/plain", "modelId": "me/plain", "sha": commit, "private": False, "tags": [], "siblings": siblings}
    return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()


def stream_errors() -> tuple[type[BaseException], ...]:
    """Those of streams, and a full disk or a name that is too long, which the verb tells in a line."""
    from pipelines.compression.header import StreamError

    return StreamError, OSError


FOLDERS = tuple(WAYS)
FILES = (damage_bytes, damage_sizes)
WEIGHTS = (damage_bytes, damage_weights, damage_weights, damage_any_json, damage_files, plant_pickles)
TARGETS = {
    target.name: target
    for target in (
        Target("pipelines", good_pipelines, use_pipeline, FOLDERS, seal=seal_manifest, notices=True),
        Target(
            "calibrations", good_calibrations, use_calibration, (damage_calibration,), seal=seal_manifest, notices=True
        ),
        Target("tokens", good_tokens, use_tokens, (*FOLDERS, cross_json), seal=seal_manifest, notices=True),
        Target("states", bases.states, use_state, (*FOLDERS, cross_json), seal=seal_manifest, notices=True),
        Target(
            "sharded",
            good_shards_of_states,
            use_state,
            (*FOLDERS, damage_sharding, damage_sharding, damage_sharding),
            seal=seal_manifest,
            notices=True,
        ),
        Target(
            "streams",
            good_streams,
            use_stream,
            (damage_bytes, damage_header, damage_chunks, damage_chunks),
            stream_errors(),
            seal_stream,
        ),
        Target("presets", good_presets, use_preset, (damage_yaml, damage_yaml, damage_bytes), TOLD, lines=True),
        Target("shards", good_shards, use_shard, (*FILES, damage_bytes, damage_index), TOLD, lines=True),
        Target("images", good_images, use_image, FILES, (), seal_png),
        Target("weights", good_weights, use_weights, WEIGHTS, TOLD, lines=True),
        Target("runs", good_runs, use_run, (damage_any_json, cross_json, damage_bytes, damage_yaml), TOLD, lines=True),
        Target("http", good_http, use_http, (damage_answers,), TOLD, lines=True, connects=True),
        Target("hub", good_hub, use_hub, (damage_answers,), TOLD, lines=True, connects=True),
    )
}
