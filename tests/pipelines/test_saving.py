"""A pipeline's folder: variants of its weights, their types, and parts that a caller gives in place of its own."""

from __future__ import annotations

import copy
import gc
import json
import re
import shutil
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from ordinary import as_others
from refusals import refused
from safetensors.torch import load_file
from small import TOKENIZERS, make_prior
from small_pipelines import LABELS, PROVENANCE, make_pipeline, pixels_for

from pipelines import ConfigError, FormatError, ImagePipeline, IntegrityError, PathError
from pipelines import saving as storing
from pipelines.tokens import load_tokens
from prior import Prior
from prior.sampling import progress_bar
from tokenizer import Tokenizer
from tokenizer.files import LimitError, UnreadableError

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_others_load_while_a_run_saves(tmp_path):
    """The tokenizer and the prior of one save; of many that load none fails."""
    pipe, ended, seen = make_pipeline(), threading.Event(), set()

    def save(number):
        with torch.no_grad():
            for parameter in pipe.prior.parameters():
                parameter.fill_(number)
        pipe.provenance = {"number": number}
        pipe.save_pretrained(tmp_path / "pipe")

    def save_again_and_again():
        number = 1
        while not ended.wait(0.1):
            number += 1
            save(number)

    save(1)
    saver = threading.Thread(target=save_again_and_again)
    saver.start()
    try:
        while len(seen) < 10:
            found = ImagePipeline.from_pretrained(tmp_path / "pipe")
            weights = torch.cat([parameter.unique() for parameter in found.prior.parameters()]).unique().tolist()
            assert weights == [found.provenance["number"]]
            seen.add(weights[0])
    finally:
        ended.set()
        saver.join()


# Variants


@pytest.mark.sparse
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("variant", TYPES)
def test_a_variant_is_rounded_weights_in_files_of_its_name(tokenizer, variant, tmp_path):
    pipe = make_pipeline(tokenizer)
    before = pipe.tokenizer.fingerprint(), pipe.prior.fingerprint(), pipe.prior.config
    pipe.save_pretrained(tmp_path / "small", variant=variant)
    assert (pipe.tokenizer.fingerprint(), pipe.prior.fingerprint(), pipe.prior.config) == before
    assert pipe.dtype == torch.float32
    names = names_in(tmp_path / "small")
    assert {name for name in names if name.endswith(".safetensors")} == {
        f"{part}/model.{variant}.safetensors" for part in ("tokenizer", "prior")
    }
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    stored = load_file(tmp_path / "small" / "prior" / f"model.{variant}.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {TYPES[variant]}
    wanted = {name: value.to(TYPES[variant]) for name, value in pipe.prior.state_dict().items()}
    assert all(torch.equal(stored[name], wanted[name].to(stored[name].dtype)) for name in wanted)
    for asked in (None, variant):
        loaded = ImagePipeline.from_pretrained(tmp_path / "small", variant=asked)
        assert loaded.dtype == loaded.prior.dtype == torch.float32 and loaded.labels == LABELS
        assert torch.equal(loaded.prior.state_dict()["head.weight"], wanted["head.weight"].float())
    auto = ImagePipeline.from_pretrained(tmp_path / "small", dtype="auto")
    has_weights = any("quantizer" not in name for name, _ in auto.tokenizer.named_parameters())
    assert auto.prior.dtype == TYPES[variant] and auto.dtype == (TYPES[variant] if has_weights else torch.float32)
    assert auto.prior.fingerprint() == loaded.prior.fingerprint()
    assert auto(2, seed=0).tokens.shape == loaded(2, seed=0).tokens.shape


def test_a_variant_is_smaller_and_is_replaced_as_a_whole(tmp_path):
    pipe = make_pipeline()
    pipe.set_background(copy.deepcopy(pipe.prior))
    size = {}
    for variant in (None, "fp16", "bf16", None):
        pipe.save_pretrained(tmp_path / "pipe", variant=variant)
        files = [path for path in (tmp_path / "pipe").rglob("*.safetensors")]
        assert len(files) == 3 and len({path.name for path in files}) == 1
        size[variant] = sum(path.stat().st_size for path in files)
    assert max(size["fp16"], size["bf16"]) < 0.8 * size[None]


def test_what_is_no_variant_is_as_it_was(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["format_version"] == 1 and "variant" not in index
    make_pipeline().save_pretrained(tmp_path / "small", variant="fp16")
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    assert index["format_version"] == 1 and index["variant"] == "fp16"


def test_variants_that_are_not_there_are_named(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    make_pipeline().save_pretrained(tmp_path / "small", variant="fp16")
    for folder, variant, there in (("pipe", "fp16", "that are no variant"), ("small", "bf16", "of variant 'fp16'")):
        with pytest.raises(PathError, match=f"variant: no '{variant}', only weights {there}"):
            ImagePipeline.from_pretrained(tmp_path / folder, variant=variant)
        with pytest.raises(PathError, match=rf"model.{variant}.safetensors: no such file; there is model"):
            Prior.from_pretrained(tmp_path / folder / "prior", variant=variant)
    for use in (make_pipeline().save_pretrained, ImagePipeline.from_pretrained):
        with pytest.raises(ValueError, match="variant must be fp16 or bf16, or None .got 'int8'"):
            use(tmp_path / "pipe", variant="int8")
    large = make_pipeline()
    with torch.no_grad():
        next(large.prior.parameters()).flatten()[0] = 1e6
    with pytest.raises(ValueError, match="variant 'fp16': .* holds values that this type cannot"):
        large.save_pretrained(tmp_path / "large", variant="fp16")
    assert not (tmp_path / "large").exists()


def reseal(path, index):
    """Write an index, and list it in the manifest."""
    from tokenizer.files import write_json, write_manifest

    write_json(path, index)
    write_manifest(path.parent)


def test_a_file_of_another_variant_is_not_slipped_in(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    prior = tmp_path / "pipe" / "prior"
    shutil.copy(prior / "model.safetensors", prior / "model.fp16.safetensors")
    with pytest.raises(IntegrityError, match="does not list prior/model.fp16.safetensors"):
        ImagePipeline.from_pretrained(tmp_path / "pipe")


# Types


def test_types_by_part(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    load = ImagePipeline.from_pretrained
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for dtype, wanted in (
        (None, (full, full)),
        (half, (half, half)),
        ("auto", (full, full)),
        ({"prior": brain}, (full, brain)),
        ({"tokenizer": full, "default": brain}, (full, brain)),
        ({"default": half, "prior": "auto"}, (half, full)),
    ):
        pipe = load(tmp_path / "pipe", dtype=dtype)
        assert (pipe.tokenizer.dtype, pipe.prior.dtype) == wanted, dtype
        assert pipe.device == pipe.tokenizer.device == torch.device("cpu")
        assert len(pipe(2, seed=0).images) == 2 and pipe.encode(pixels_for(pipe, 1)).shape == (1, 2, 3)
    assert Prior.from_pretrained(tmp_path / "pipe" / "prior", dtype=half).dtype == half
    assert Tokenizer.from_pretrained(tmp_path / "pipe" / "tokenizer", dtype="auto").dtype == full
    with pytest.raises(ValueError, match="no part is called 'vae'; there are tokenizer, prior, background and default"):
        load(tmp_path / "pipe", dtype={"vae": half})
    for wrong in ("float16", 16):
        with pytest.raises(TypeError, match="dtype should be a torch.dtype, 'auto' or None"):
            load(tmp_path / "pipe", dtype=wrong)


def test_models_say_where_they_are_and_of_what_type():
    pipe = make_pipeline()
    pipe.set_background(copy.deepcopy(pipe.prior))
    assert pipe.to(torch.float16) is pipe
    for model in pipe.components.values():
        assert model.dtype == torch.float16 and model.device == torch.device("cpu")
    pipe.to(torch.device("cpu"), torch.float32)
    assert {model.dtype for model in pipe.components.values()} == {torch.float32}


# Parts


def test_components_make_another_pipeline_of_the_same_models(tmp_path):
    pipe = make_pipeline()
    assert list(pipe.components) == ["tokenizer", "prior"]
    pipe.set_background(copy.deepcopy(pipe.prior))
    again = ImagePipeline(**pipe.components, labels=pipe.labels)
    assert list(again.components) == ["tokenizer", "prior", "background"]
    assert all(model is pipe.components[name] for name, model in again.components.items())
    assert again(2, "dog", seed=0).tokens.equal(pipe(2, "dog", seed=0).tokens)


def test_parts_given_are_used_and_those_of_the_folder_not_opened(tmp_path):
    pipe = make_pipeline(sampler={"temperature": 0.9})
    pipe.provenance, pipe.sample_grid = PROVENANCE, pipe.sample_picture(2)
    pipe.save_pretrained(tmp_path / "pipe")
    other = make_prior("masked", grid=pipe.prior.grid, tokenizer=pipe.tokenizer.fingerprint())
    (tmp_path / "pipe" / "prior" / "model.safetensors").write_bytes(b"damaged")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe", prior=other, dtype=torch.float32)
    assert loaded.prior is other and loaded.labels == LABELS and loaded.sampler.temperature == 0.9
    assert not loaded.provenance and loaded.sample_grid is None and loaded.calibration is None
    assert loaded.tokenizer.fingerprint() == pipe.tokenizer.fingerprint()
    (tmp_path / "pipe" / "tokenizer" / "model.safetensors").write_bytes(b"damaged")
    both = ImagePipeline.from_pretrained(
        tmp_path / "pipe", prior=pipe.prior, tokenizer=pipe.tokenizer, background=other
    )
    assert both.prior is pipe.prior and both.tokenizer is pipe.tokenizer and both.background is other
    with pytest.raises(IntegrityError):
        ImagePipeline.from_pretrained(tmp_path / "pipe", prior=other)


def test_parts_that_do_not_fit_are_refused(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="grid"):
        ImagePipeline.from_pretrained(tmp_path / "pipe", prior=make_prior("gpt"))
    with pytest.raises(IntegrityError, match="another tokenizer"):
        ImagePipeline.from_pretrained(tmp_path / "pipe", tokenizer=make_pipeline().tokenizer)
    with pytest.raises(TypeError, match="prior should be a Prior .got VQVAE"):
        ImagePipeline.from_pretrained(tmp_path / "pipe", prior=pipe.tokenizer)


def test_a_part_that_was_replaced_has_to_fit_when_the_pipeline_is_saved(tmp_path):
    """Or the prior would be said to know the tokens of a tokenizer that it has never seen."""
    pipe, other = make_pipeline(), make_pipeline()
    own = pipe.tokenizer
    pipe.tokenizer = other.tokenizer
    with pytest.raises(IntegrityError, match="another tokenizer"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    pipe.prior = other.prior
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.tokenizer = own
    with pytest.raises(IntegrityError, match="another tokenizer"):
        pipe.save_pretrained(tmp_path / "pipe", variant="bf16")
    other.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")  # the same parts, of another type
    assert ImagePipeline.from_pretrained(tmp_path / "rounded").prior.num_parameters() == other.prior.num_parameters()


def test_a_part_that_was_replaced_is_freed():
    pipe = make_pipeline()
    old = weakref.ref(pipe.prior)
    pipe.prior = copy.deepcopy(pipe.prior)
    gc.collect()
    assert old() is None


def test_what_is_known_of_a_part_goes_with_it(tmp_path):
    """Or a card would show the figures of another prior, and thresholds would be those of its scores."""
    for part in ("prior", "tokenizer"):
        pipe = make_pipeline(sampler={"top_k": 2})
        pipe.calibrate(pixels_for(pipe, 40))
        pipe.provenance, pipe.sample_grid = PROVENANCE, pipe.sample_picture(2)
        known = pipe.calibration
        setattr(pipe, part, getattr(pipe, part))  # the same one
        pipe.save_pretrained(tmp_path / "same", variant="fp16")  # whose models are rounded copies
        for same in (pipe, ImagePipeline.from_pretrained(tmp_path / "same")):
            assert same.calibration.to_json() == known.to_json() and same.provenance and same.sample_grid is not None
        setattr(pipe, part, copy.deepcopy(getattr(pipe, part)).train())
        assert not getattr(pipe, part).training
        assert pipe.calibration is None and not pipe.provenance and pipe.sample_grid is None
        assert pipe.sampler.top_k == 2


def test_a_prior_of_another_kind_is_sampled_with_settings_that_it_has(tmp_path):
    pipe = make_pipeline(prior="masked", sampler={"steps": 3, "top_k": 2})
    pipe.prior = make_prior("gpt", num_classes=3, grid=pipe.prior.grid, tokenizer=pipe.tokenizer.fingerprint()).eval()
    assert pipe.sampler.top_k == 2 and len(pipe(2, seed=0).images) == 2
    pipe.save_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").sampler == pipe.sampler


def test_settings_of_another_kind_of_prior_are_left_out(tmp_path):
    pipe = make_pipeline(prior="masked", sampler={"steps": 3, "top_k": 2})
    pipe.save_pretrained(tmp_path / "pipe")
    other = make_prior("gpt", grid=pipe.prior.grid, tokenizer=pipe.tokenizer.fingerprint())
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe", prior=other)
    assert loaded.sampler.top_k == 2 and not hasattr(loaded.sampler, "steps")


def test_a_prior_of_an_unknown_kind_may_be_given(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / "model_index.json"
    reseal(path, {**json.loads(path.read_text()), "prior": "mine", "sampler": {"warmth": 3}})
    with pytest.raises(ConfigError, match="no Prior is called 'mine'; .*; one of your own .* --import FILE"):
        ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe", prior=pipe.prior).prior is pipe.prior
    for sampler in (None, [], {"temperature": -1}):
        reseal(path, {**json.loads(path.read_text()), "sampler": sampler})
        with pytest.raises((ConfigError, FormatError), match="sampler"):
            ImagePipeline.from_pretrained(tmp_path / "pipe", prior=pipe.prior)


@pytest.mark.parametrize(
    ("kind", "sampler", "said"),
    [
        ("gpt", {"temperature": "hot"}, "temperature must be a finite number >= 0 (got hot)"),
        ("gpt", {"temperature": True}, "temperature must be a finite number >= 0 (got True)"),
        ("gpt", {"top_p": [1]}, "top_p must be in (0, 1], or None for all (got [1])"),
        ("gpt", {"guidance_end": {}}, "guidance_end must be a finite number >= 0, or None (got {})"),
        ("gpt", [["top_k", 3]], "found [['top_k', 3]], expected an object"),
        ("masked", {"schedule": []}, "schedule must be one of linear, cosine, arccos, square (got [])"),
        ("masked", {"confidence_temperature": "1"}, "confidence_temperature must be a finite number >= 0 (got 1)"),
        ("masked", {"steps": "4"}, "steps must be a whole number from 1 to 6 (got 4)"),
        ("made", {"num_masks": "4"}, "num_masks must be a whole number (got '4')"),
        ("made", {"num_masks": -4}, "num_masks must be at least 1 (got -4)"),
        ("made", {"num_masks": 4}, "num_masks: this made prior has one connectivity"),
    ],
)
def test_settings_of_sampling_that_a_file_holds_are_named(tmp_path, kind, sampler, said):
    """The setting, what was found and what is allowed; when the pipeline is made, and not by its first call."""
    pipe = make_pipeline(prior=kind)
    pipe.save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / "model_index.json"
    reseal(path, {**json.loads(path.read_text()), "sampler": sampler})
    refused(tmp_path / "pipe", ConfigError, "sampler: ", said)
    with pytest.raises(ConfigError, match=re.escape(f"sampler: {said}")):
        ImagePipeline(**pipe.components, sampler=sampler)


# Bars


def test_calls_that_take_long_have_a_bar(capsys):
    """Once they have taken two seconds, in a terminal; none within another."""
    pipe, images = make_pipeline(), torch.zeros(3, 1, 8, 12)

    def told(*what: Callable[[], object]) -> list[str]:
        for each in what:
            each()
        said = capsys.readouterr().err
        return [word for word in ("encoding", "decoding", "scoring") if word in said]

    encode, decode = partial(pipe.encode, images), partial(pipe.decode, torch.zeros(3, 2, 3).long())
    score = partial(pipe.log_prob, images, batch_size=1)
    assert told(encode, decode, score) == []  # no terminal
    pipe.set_progress_bar_config(disable=False)
    assert told(encode, decode, score) == []
    pipe.set_progress_bar_config(disable=False, delay=0.0)
    assert told(decode) == ["decoding"] and told(score) == ["encoding", "scoring"]
    assert told(partial(decode, progress=False), lambda: pipe(3, progress=False)) == []
    assert told(lambda: [encode() for _ in progress_bar([1, 2], {"disable": False})]) == []
    pipe.set_progress_bar_config(disable=True)
    assert told(encode, decode, score) == []


def test_bars_are_as_they_are_set(capsys):
    pipe = make_pipeline()
    pipe(2, seed=0)
    assert capsys.readouterr().err == ""  # no terminal
    pipe.set_progress_bar_config(disable=False, desc="digits", leave=True)
    pipe(2, seed=0)
    assert "digits: 100%" in capsys.readouterr().err
    pipe(4, seed=0, batch_size=2)
    assert "2/2" in capsys.readouterr().err
    pipe(2, seed=0, progress=False)
    pipe.set_progress_bar_config(disable=True)
    pipe(2, seed=0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", [".", "tokenizer", "prior"])
def test_a_folder_that_may_not_be_looked_into_is_a_loading_error(tmp_path, closed):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    folder = tmp_path / "pipeline" / closed
    folder.chmod(0)
    with as_others(), pytest.raises(UnreadableError, match="Permission denied"):
        ImagePipeline.from_pretrained(tmp_path / "pipeline")
    if closed == ".":
        with as_others(), pytest.raises(UnreadableError, match="Permission denied"):
            load_tokens(tmp_path / "pipeline")
    folder.chmod(0o755)
    ImagePipeline.from_pretrained(tmp_path / "pipeline")


# What is known of the parts


def test_all_that_is_known_of_a_pipeline_comes_back_and_none_of_it_with_another_part(tmp_path):
    pipe = make_pipeline(prior="marginal", sampler={"temperature": 0.5})
    pipe.provenance, pipe.sample_grid = {**PROVENANCE, "data": {"source": "größe"}}, pipe.sample_picture(2)
    pipe.set_background(copy.deepcopy(pipe.prior))
    pipe.calibrate(pixels_for(pipe, 40))
    pipe.save_pretrained(tmp_path / "pipe")
    assert names_in(tmp_path / "pipe") == {
        *(f"{part}/{file}" for part in pipe.components for file in ("config.json", "model.safetensors")),
        *("model_index.json", "manifest.json", "calibration.json", "provenance.json", "samples.png", "README.md"),
    }
    assert "größe" in (tmp_path / "pipe" / "README.md").read_bytes().decode()
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    names = {"tokenizer": "vqvae", "prior": "marginal", "background": "marginal", "labels": LABELS}
    assert index == {"_class_name": "ImagePipeline", "format_version": 1, "sampler": pipe.sampler.to_dict(), **names}
    found = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert found.provenance == pipe.provenance and (found.sample_grid == pipe.sample_grid).all()
    assert found.calibration.to_json() == pipe.calibration.to_json() and found.sampler == pipe.sampler
    assert found.background.fingerprint() == pipe.background.fingerprint()
    other = ImagePipeline.from_pretrained(tmp_path / "pipe", prior=pipe.prior)
    assert (other.provenance, other.sample_grid, other.calibration, other.background) == ({}, None, None, None)
    assert other.sampler.temperature == 0.5


def test_what_is_no_pipeline_is_told_in_full(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    for folder, hint in ((tmp_path, ""), (tmp_path / "run", f"; did you mean {tmp_path / 'run' / 'pipeline'}?")):
        with pytest.raises(PathError) as caught:
            ImagePipeline.from_pretrained(folder)
        assert str(caught.value) == f"{folder}: not a pipeline folder (no model_index.json){hint}"
    with pytest.raises(ValueError) as caught:
        ImagePipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype={"vae": None})
    assert str(caught.value) == "dtype: no part is called 'vae'; there are tokenizer, prior, background and default"


def test_a_picture_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    pipe = make_pipeline()
    pipe.sample_grid = pipe.sample_picture(2)
    height, width = pipe.sample_grid.shape[:2]
    monkeypatch.setattr(storing, "MAX_GRID_PIXELS", height * width)
    pipe.save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr(storing, "MAX_GRID_PIXELS", height * width - 1)
    with pytest.raises(LimitError) as caught:
        pipe.save_pretrained(tmp_path / "large")
    assert str(caught.value) == f"sample_grid: {pipe.sample_grid.shape} is more than {height * width - 1} pixels"
    assert not (tmp_path / "large").exists()
