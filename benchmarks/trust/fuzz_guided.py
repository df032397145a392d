"""Fuzzing that is led by coverage: inputs that reach new branches of a parser are kept, and changed further (atheris).

    pip install atheris
    python -m benchmarks.trust.fuzz_guided target=streams minutes=60 corpus=fuzz-corpus
    python -m benchmarks.trust.fuzz_guided target=presets minutes=60 corpus=fuzz-corpus
    python -m benchmarks.trust.fuzz_guided target=weights minutes=60 corpus=fuzz-corpus

Three parsers of bytes that come from strangers: `streams`, which `smalti decompress` reads; `presets`, the YAML of
`--config`; and `weights`, the files of a pipeline folder (the header of a safetensors file, and the JSON beside it). An
input is let past its checksums: they are made to fit. The corpus folder, one for each target below `corpus`, begins
with good inputs and grows; the same command goes on from it. An input that ends in another exception than the parser
promises, or takes more than a minute or 2.5 GB, is kept beside it as `crash-...`, `timeout-...` or `oom-...`; the
fuzzer goes on in a new process. Ends with 1 if there is one. A new corpus has to grow within seconds, or nothing leads.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.support.options import read_options, with_helpers_of_tests

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")

FOUND = ("crash-*", "timeout-*", "oom-*", "leak-*")
LONGEST = 1 << 14  # bytes of an input


def try_stream(data: bytes) -> None:
    """Checksums made to fit as far as the first chunk; then all of it is parsed, and every chunk and name."""
    from fuzzing.made_streams import reseal

    from pipelines.compression.chunks import unpack_bits
    from pipelines.compression.header import HEADER_BYTES, RAW, StreamError
    from pipelines.compression.streams import parse

    if len(data) > HEADER_BYTES:
        data = reseal(data, 0, HEADER_BYTES)
    for whole in (data, reseal(data, HEADER_BYTES, len(data)) if len(data) > HEADER_BYTES + 8 else data):
        try:
            stream = parse(whole)
            for chunk in stream:
                if chunk.profile == RAW:
                    header = stream.header
                    unpack_bits(chunk.tokens, chunk.count * header.num_tokens, header.token_bits)
        except StreamError as error:
            require(str(error).isprintable() and len(str(error)) < 1000, error)


def try_preset(data: bytes) -> None:
    """As a file of `train_tokenizer` or of `train_prior`; a configuration that loads is written, and reads the same."""
    from pipelines.config import UserError
    from pipelines.config.arguments import read_yaml
    from pipelines.config.command import is_bug, parse
    from pipelines.config.yaml_text import write_yaml
    from pipelines.train_prior import TrainPriorConfig
    from pipelines.train_tokenizer import TrainTokenizerConfig

    place = Path(os.environ["SMALTI_FUZZ_PLACE"]) / "preset.yaml"
    place.write_bytes(data)
    try:
        read_yaml(data.decode("utf-8", "replace"))
        kind: Any = TrainTokenizerConfig if len(data) % 2 else TrainPriorConfig  # both would take twice as long
        more = ["out=run"] if len(data) % 2 else ["out=run", "tokens=tokens"]
        config = parse(kind, ["--config", str(place), *more], verb="train", description="")
        again = kind.model_validate(read_yaml(write_yaml(config.model_dump(mode="json"))))
        require(again == config, config)
    except UserError as error:
        require(str(error).replace("\n", "").isprintable(), error)
    except OSError as error:  # a name that is too long, say, which every verb tells in a line
        require(not is_bug(error), error)


def try_weights(data: bytes) -> None:
    """JSON as a model's `config.json` and as a `calibration.json`; else a safetensors file, of ours or published."""
    from tokenizer.files.errors import PipelineLoadError

    for act in (read_config, read_calibration) if data.startswith(b"{") else (read_tensors,):
        try:
            act(data)
        except PipelineLoadError as error:
            require(str(error).isprintable() and len(str(error)) < 1000, error)


def read_config(data: bytes) -> None:
    """Of the tokenizer that it names."""
    from tokenizer import Tokenizer
    from tokenizer.files.json_text import parse_json

    values = parse_json(data, Path("config.json"))
    kind = values.pop("kind", None)
    if isinstance(kind, str) and kind in Tokenizer.available():
        member: Any = Tokenizer.find(kind)
        member.Config.from_saved(values)


def read_calibration(data: bytes) -> None:
    """Of a pipeline."""
    from pipelines.stages.calibration import Calibration
    from tokenizer.files.json_text import parse_json

    Calibration.from_dict(parse_json(data, Path("calibration.json")), Path("calibration.json"))


def read_tensors(data: bytes) -> None:
    """The header, every tensor, and what the shapes say of a published network."""
    import torch

    from tokenizer.files.weights import read_header, tensor_of
    from tokenizer.published import Shapes, recognise

    path, file = Path("model.safetensors"), io.BytesIO(data)
    entries = read_header(file.read, len(data), path)
    body = data[file.tell() :]
    weights = {}
    for name, entry in entries.items():
        raw = torch.zeros(entry.end - entry.begin, dtype=torch.uint8)
        raw.numpy()[:] = list(body[entry.begin : entry.end])
        weights[name] = tensor_of(raw, entry)
    layout = recognise(weights, path)
    layout.sizes(Shapes(layout.prepare(weights), layout, path))


def require(holds: bool, what: Any) -> None:
    """Raise `AssertionError` otherwise."""
    assert holds, repr(what)[:500]


TARGETS = {"streams": try_stream, "presets": try_preset, "weights": try_weights}
MODULES = {
    "streams": ["pipelines.compression"],
    "presets": ["pipelines.config", "tokenizer.settings", "yaml"],
    "weights": ["tokenizer.files", "tokenizer.published", "tokenizer.settings", "pipelines.stages.calibration"],
}


def changed(target: str, data: bytes, most: int, chance: Random) -> bytes:
    """An input that is changed by its structure, as `fuzzing.ways` does; or by its bytes, as libFuzzer does."""
    import atheris
    from fuzzing.mutations import damage_weights
    from fuzzing.ways import damage_any_json, damage_chunks, damage_header, damage_yaml

    ways: dict[str, list[Any]] = {"streams": [damage_header, damage_chunks], "presets": [damage_yaml]}
    ways["weights"] = [damage_any_json if data.startswith(b"{") else damage_weights]
    name = {"streams": "stream", "presets": "a.yaml", "weights": "a.safetensors"}[target]
    tree = {name: data}
    if chance.random() < 0.5:
        try:
            chance.choice(ways[target])(tree, chance)
        except Exception:  # what an earlier change has left is not what this one expects
            tree = {name: data}
    if tree[name] == data or len(tree[name]) > most:
        return bytes(atheris.Mutate(data, most))
    return tree[name]


def seeds(target: str, folder: Path) -> None:
    """Good inputs, and some that are damaged, where the folder is new."""
    from fuzzing.campaign import damaged
    from fuzzing.targets import TARGETS as DAMAGED

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return
    good = DAMAGED[target].good(folder.parent / f".good-{target}")
    if target == "weights":
        good = {"ours": own_weights(folder.parent / ".good-ours"), "settings": good["diffusers"]}
    trees = [*good.values(), *(damaged(DAMAGED[target], number, good).tree for number in range(50))]
    for number, data in enumerate(data for tree in trees for data in tree.values() if isinstance(data, bytes)):
        if len(data) <= LONGEST:
            (folder / f"seed-{number:04d}").write_bytes(data)


def own_weights(folder: Path) -> dict[str, bytes]:
    """The configuration of a model of each kind, a calibration, and published weights of a width of one."""
    from fuzzing.targets import good_calibrations
    from givens import published_weights as published
    from safetensors.torch import save
    from small import TOKENIZERS, make_tokenizer

    found = {f"{name}.json": json.dumps(make_tokenizer(name).config.to_dict()).encode() for name in TOKENIZERS}
    for name, tree in good_calibrations(folder).items():
        found |= {f"{name}-{path.replace('/', '-')}": data for path, data in tree.items() if path.endswith(".json")}
    shapes = [published.taming_shapes(1, (1,), codes=2), published.llamagen_shapes(1, (1,), codes=2)]
    shapes += [published.maskgit_shapes(1, (1,), codes=2), published.magvit2_shapes(1, (1,))]
    for number, some in enumerate(shapes):
        found[f"{number}.safetensors"] = save(published.random_weights(some))
    return found


def parsers_of(target: str) -> list[str]:
    """The modules that lead, each by name: the face of a folder imports nothing of it."""
    found = []
    for name in MODULES[target]:
        folder = getattr(importlib.import_module(name), "__path__", [])
        found += [name, *(module.name for module in pkgutil.walk_packages(folder, f"{name}."))]
    return found


def fuzz(target: str, seconds: int, corpus: Path) -> None:
    """For a process of its own, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=MODULES[target], enable_loader_override=False):
        for name in parsers_of(target):
            with contextlib.suppress(ImportError):  # of the half of yaml that is C
                importlib.import_module(name)
    import fuzzing.targets  # noqa: F401

    TARGETS[target](b"")
    arguments = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=2500", f"-max_len={LONGEST}"]
    arguments += [f"-artifact_prefix={corpus.parent}/{target}-found/", "-print_final_stats=1", str(corpus)]
    begun = Random(time.time_ns()).randrange(1 << 31)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return changed(target, data, most, Random(seed))

    atheris.Setup([sys.argv[0], f"-seed={begun}", *arguments], TARGETS[target], custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    options = read_options(__doc__, {"target": str, "minutes": 60.0, "corpus": "fuzz-corpus", "inner": 0})
    if options.target not in TARGETS:
        raise SystemExit(f"target: there are {', '.join(TARGETS)}")
    with_helpers_of_tests()
    corpus = Path(options.corpus).absolute() / options.target
    kept = corpus.parent / f"{options.target}-found"
    if options.inner:
        return fuzz(options.target, options.inner, corpus)
    seeds(options.target, corpus)
    kept.mkdir(exist_ok=True)
    before = len(list(corpus.iterdir()))
    os.environ["SMALTI_FUZZ_PLACE"] = str(kept)
    until = time.monotonic() + 60 * options.minutes
    while (left := int(until - time.monotonic())) > 5:
        again = [f"target={options.target}", f"corpus={options.corpus}", f"inner={left}"]
        subprocess.run([sys.executable, "-m", __spec__.name, *again], check=False)
    found = sorted(path.name for pattern in FOUND for path in kept.glob(pattern))
    count = len(list(corpus.iterdir()))
    print(f"{options.target}: {count} inputs in {corpus}, {count - before} new; found: {', '.join(found) or 'nothing'}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
