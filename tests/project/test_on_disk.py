"""What people have on disk loads and gives what it gave: models, datasets, runs, calibrations, streams, presets.

The files were written once, by `tests/fixtures/write.py`, which says how. A test that fails here means that the code
has changed what files mean: mend the code. See there for formats that change on purpose.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launch import environment, exact, output_of, states
from on_disk import (
    CLASSES,
    FOLDER,
    answers_of_calibration,
    answers_of_pipeline,
    answers_of_tokenizer,
    dry_run,
    figures_after,
    paths_for_processes,
    pixels_of,
    place,
    smalti,
    two_sharded_processes,
)
from safetensors.torch import load_file
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.tokens import load_tokens
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.likelihoods import Likelihood
from tokenizer.quantizers import Quantizer
from tokenizer.settings import Settings
from tokenizer.settings.marks import Before, mark_of

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
"""Of what is computed in float32, whose last digits are another machine's own."""


pytestmark = pytest.mark.usefixtures("one_process")


def facts(part: str) -> Any:
    """What was noted of a part when it was written."""
    return json.loads((FOLDER / f"{part}.json").read_text())


def answers(part: str, name: str) -> dict[str, Tensor]:
    """What one of a part gave when it was written."""
    found = load_file(FOLDER / f"{part}.safetensors")
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


def assert_same_answers(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Ids are exact, as is what is sampled; pixels may be a grey level apart; the rest is near."""
    assert set(found) == set(expected) and expected
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        if value.dtype == torch.uint8:
            assert int((found[name].int() - value.int()).abs().max()) <= 1, name
        elif value.dtype.is_floating_point:
            torch.testing.assert_close(
                found[name], value, **TOLERANCE, msg=lambda message, name=name: f"{name}: {message}"
            )
        else:
            assert torch.equal(found[name], value), name


def assert_same_figures(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same lines of figures, to within what another machine's rounding comes to in a few steps."""
    assert len(found) == len(expected) and expected
    for line, before in zip(found, expected, strict=True):
        assert line == pytest.approx(before, rel=5e-5, abs=1e-6), f"step {before['step']}"


def assert_same_texts(folder: Path, before: Path, *names: str) -> None:
    """Files of these names, below both folders, are the same to the byte, but for settings that came later."""
    paths = [path.relative_to(before) for name in names for path in sorted(before.rglob(name))]
    assert paths
    for path in paths:
        now, then = ((each / path).read_bytes() for each in (folder, before))
        assert now == then or not changes(now.decode(), then.decode()), path


def changes(now: str, then: str) -> list[str]:
    """The lines that differ, without those of settings that came later and are as before: null, or what its mark says
    that a file without it means."""
    lines = difflib.ndiff(*([line.removesuffix(",") for line in text.split("\n")] for text in (then, now)))
    return [line for line in lines if line[0] != " " and not as_before(line)]


def as_before(line: str) -> bool:
    """Whether a line of `changes` adds a setting that is as it was before there was one."""
    found = re.fullmatch(r'\+ +"?(\w+)"?: (.+)', line)
    return bool(found) and (found[2] == "null" or (found[1], repr(yaml.safe_load(found[2]))) in later_settings())


@functools.cache
def later_settings() -> set[tuple[str, str]]:
    """The settings with a `Before` mark of all configurations of models and verbs: name and value."""
    for family in (Tokenizer, Prior, Quantizer, Likelihood):
        family.available()  # it imports all of its members
    classes, found = [Settings], set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        marks = {name: mark_of(field, Before) for name, field in cls.model_fields.items()}
        found |= {(name, repr(mark.value)) for name, mark in marks.items() if mark}
    return found


def kinds(family: type) -> set[str]:
    """The kinds of the project's own, without those that a test may have added."""
    own = ("tokenizer.", "prior.")
    return {name for name in family.available() if family.find(name).__module__.startswith(own)}  # type: ignore[attr-defined]


# Models


def test_every_kind_is_here():
    """A new one is added to `write.py`, which then writes it alone."""
    configs = [json.loads(path.read_text()) for path in FOLDER.rglob("config.json")]
    nodes = [node for config in configs for node in (config, *config.values()) if isinstance(node, dict)]
    found = {node.get("kind") for node in nodes}
    assert found >= kinds(Tokenizer) | kinds(Prior) | kinds(Quantizer) | kinds(Likelihood)


@pytest.mark.parametrize("name", facts("tokenizers"))
def test_tokenizer(name, tmp_path):
    folder = FOLDER / "tokenizers" / name
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.fingerprint() == facts("tokenizers")[name]
    assert_same_answers(answers_of_tokenizer(tokenizer), answers("tokenizers", name))
    tokenizer.save_pretrained(tmp_path / "again")
    assert_same_texts(tmp_path / "again", folder, "config.json")


@pytest.mark.parametrize("name", facts("pipelines"))
def test_pipeline(name, tmp_path):
    folder = FOLDER / "pipelines" / name
    pipe = ImagePipeline.from_pretrained(folder)
    prints = {"tokenizer": pipe.tokenizer.fingerprint(), "prior": pipe.prior.fingerprint()}
    assert prints == facts("pipelines")[name]
    assert pipe.labels == CLASSES
    assert_same_answers(answers_of_pipeline(pipe), answers("pipelines", name))
    variant = json.loads((folder / "model_index.json").read_text()).get("variant")
    pipe.save_pretrained(tmp_path / "again", variant=variant)
    assert_same_texts(tmp_path / "again", folder, "config.json", "model_index.json")
    assert {path.name for path in (tmp_path / "again").rglob("*")} == {path.name for path in folder.rglob("*")}


def test_pipeline_with_all_that_there_may_be(tmp_path):
    folder = FOLDER / "calibrated" / "pipeline"
    pipe = ImagePipeline.from_pretrained(folder)
    assert pipe.background is not None and pipe.background.fingerprint() == facts("calibrated")["background"]
    assert pipe.sample_grid is not None
    assert_same_answers(answers_of_calibration(pipe), answers("calibrated", "pipeline"))
    pipe.save_pretrained(tmp_path / "again")
    names = ("config.json", "model_index.json", "calibration.json", "provenance.json", "samples.png")
    assert_same_texts(tmp_path / "again", folder, *names)


def test_evaluation_is_done_again(tmp_path):
    """Into the folder of the last one, of the images that the pipeline knows; and the card has the figures."""
    place(tmp_path, "calibrated/pipeline", "calibrated/evaluation")
    before = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    smalti(tmp_path, "evaluate", "pipeline=pipeline", "num_samples=0", "num_orders=2", "device=cpu")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    known = {name: found[name] for name in before}  # there are more figures by now
    assert_same_figures([{**known, "step": 0}], [{**before, "step": 0}])
    provenance = json.loads((FOLDER / "calibrated" / "pipeline" / "provenance.json").read_text())
    assert {**provenance["evaluation"], "num_orders": 2} == before


# Tokens


def assert_same_tokens(folder: Path, cache: Path, **options: Any) -> None:
    data = load_tokens(folder, cache_dir=cache, **options)
    for split in ("train", "validation", "test"):
        rows, expected = data.splits[split], answers("tokens", split)
        assert torch.equal(rows.rows(slice(None)).int(), expected["tokens"])
        assert rows.labels is not None and torch.equal(rows.labels, expected["labels"])
    assert data.class_names == CLASSES and data.augmentations == 1
    assert data.tokenizer.fingerprint() == facts("tokenizers")["ema"]
    assert len(data.parts) == 1 and data.source["data"]["image_size"] == 8


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["plain", "sharded", "parquet"])
def test_tokens(name, mapped, tmp_path):
    assert_same_tokens(FOLDER / "tokens" / name, tmp_path, mapped=mapped)


@pytest.mark.parametrize(("name", "rows"), [("plain", None), ("sharded", 10)])
def test_tokens_are_saved_as_they_were(name, rows, tmp_path):
    folder = FOLDER / "tokens" / name
    load_tokens(folder).save(tmp_path / "again", rows_per_shard=rows)
    assert_same_texts(tmp_path / "again", folder, "meta.json", "config.json")
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files


def test_tokens_grow(tmp_path):
    """By a further variant of the same images, which are known by what the dataset says of itself."""
    place(tmp_path, "tokens/sharded", "tokenizers/ema")
    arguments = ["augmentations=2" if each == "augmentations=1" else each for each in facts("tokens")["encode"]]
    smalti(tmp_path, "encode", *arguments, "out=sharded", "append=true")
    rows = load_tokens(tmp_path / "sharded").splits["train"].rows(slice(None))
    assert len(rows) == 3 * 36 and torch.equal(rows[: 2 * 36].int(), answers("tokens", "train")["tokens"])


def test_encode_goes_on(tmp_path):
    place(tmp_path, "tokens/.tmp-half-encode", "tokenizers/ema")
    printed = smalti(tmp_path, "encode", *facts("tokens")["encode"], "out=half")
    assert f"half: continuing, {facts('tokens')['pieces']} of " in printed
    assert_same_tokens(tmp_path / "half", tmp_path)
    assert_same_texts(tmp_path / "half", FOLDER / "tokens" / "sharded", "meta.json")


# Runs


def start_in(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """The command, started in the folder with its output kept."""
    paths = environment(PYTHONPATH=paths_for_processes())
    return subprocess.Popen(command, cwd=folder, env=paths, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_went_on(folder: Path, name: str, printed: str) -> None:
    """From the state that was there, with the figures of the run that had gone on when it was written."""
    noted = facts("training")[name]
    run, step, before = folder / name, noted["step"], FOLDER / "training" / name
    assert f"{name}: continuing from step {step}; " in printed
    assert exact(run)[: len(exact(before))] == exact(before)
    assert_same_figures(figures_after(run, step), noted["figures"])
    assert states(run)[-1].name == "step-00000024"
    assert_same_texts(run, before, "config.yaml")


@pytest.mark.parametrize("name", facts("training"))
def test_run_goes_on(name, tmp_path):
    """Also in one process where there were two, each of which had a part of the weights."""
    place(tmp_path, f"training/{name}", "tokens/plain")
    noted = facts("training")[name]
    printed = smalti(tmp_path, noted["verb"], *noted["arguments"])
    assert " 1 process on cpu" in printed
    assert_went_on(tmp_path, name, printed)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_run_of_two_processes_goes_on(tmp_path):
    """Each of which has a part of the weights, as it was and as it comes to be."""
    place(tmp_path, "training/sharded", "tokens/plain")
    noted = facts("training")["sharded"]
    command = two_sharded_processes(noted["verb"], noted["arguments"])
    printed = output_of(start_in(tmp_path, command))
    assert " 2 processes on cpu" in printed and ", weights sharded" in printed
    assert_went_on(tmp_path, "sharded", printed)
    for state in (*states(FOLDER / "training" / "sharded"), *states(tmp_path / "sharded")):
        assert {path.name[:11] for path in (state / "model").iterdir()} == {"shard-00001", "shard-00002"}


@pytest.mark.parametrize("name", ["prior", "sharded"])
def test_snapshot_of_a_run_loads(name):
    pipe = ImagePipeline.from_pretrained(FOLDER / "training" / name / "pipeline")
    assert pipe.sampler.top_k == 6 and pipe.labels == CLASSES
    assert pipe.provenance["data"]["source"] == "images"


# Streams


@pytest.mark.parametrize("name", facts("streams"))
def test_stream(name, tmp_path):
    """The pixels if it is lossless; else those of the decoder, which may be a grey level apart."""
    pytest.importorskip("constriction")
    noted, path = facts("streams")[name], FOLDER / "streams" / f"{name}.smalti"
    pipeline, most = FOLDER / "pipelines" / noted["pipeline"], 0 if noted["lossless"] else 1
    if noted["named"]:
        smalti(tmp_path, "decompress", f"pipeline={pipeline}", f"stream={path}", "out=out", "device=cpu")
        found = pixels_of(tmp_path / "out")
    else:
        pipe = ImagePipeline.from_pretrained(pipeline)
        found = {"images": pipe.decompress(path.read_bytes(), output_type="np", progress=False)}
    expected = {key: value.numpy() for key, value in answers("streams", name).items()}
    assert list(found) == list(expected)
    for key, pixels in expected.items():
        assert found[key].shape == pixels.shape
        assert int(np.abs(found[key].astype(int) - pixels.astype(int)).max()) <= most


def test_a_stream_of_version_1_says_what_reads_it(tmp_path, capsys):
    """Its checksums are others. The command tells so in one line, and writes nothing."""
    path, pipeline = FOLDER / "older" / "stream-version-1.smalti", FOLDER / "pipelines" / "gpt"
    with pytest.raises(SystemExit) as exit_:
        smalti(tmp_path, "decompress", f"pipeline={pipeline}", f"stream={path}", "out=out", "device=cpu")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and "version 1, which only smalti 0.1 reads" in line
    assert not list(tmp_path.iterdir())


# Presets


def recorded_presets() -> dict[str, str]:
    """The page of each."""
    pages = (page.partition("\n") for page in (FOLDER / "presets.txt").read_text().split("## ")[1:])
    return {name: text for name, _, text in pages}


@pytest.mark.parametrize("name", recorded_presets())
def test_preset_comes_to_the_same_configuration(name):
    """To the byte, with everything that it does not say; a setting that came later is as it was before. Presets for
    GPUs are compiled and looked at less often than they were, on which no weights depend. Where presets are tuned on
    purpose, `write.py presets` writes their pages again."""
    now, then = dry_run(name), recorded_presets()[name]
    if "\n  compile: true\n" in now:
        now, then = (re.sub(r"\n  (compile|(log|preview|evaluate|save)_every): \w+", "", text) for text in (now, then))
    assert not changes(now, then)
