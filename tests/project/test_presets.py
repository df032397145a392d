"""Every preset is a valid configuration of its verb, builds its model, and is found by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.__main__ import main
from pipelines.commands.reconstruct import ReconstructConfig
from pipelines.config import UserError
from pipelines.config.arguments import find_preset
from pipelines.config.command import parse
from pipelines.encode import EncodeConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.generate import GenerateConfig
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_tokenizer import TrainTokenizerConfig, build_tokenizer
from prior import Prior

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG_OF = {
    "tokenizer": TrainTokenizerConfig,
    "prior": TrainPriorConfig,
    "encode": EncodeConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "reconstruct": ReconstructConfig,
}
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
PRESETS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in LAUNCHERS)
TOKENIZER_PRESETS = [path for path in PRESETS if path.parent.name == "tokenizer"]
PRIOR_PRESETS = [path for path in PRESETS if path.parent.name == "prior"]


def config_of(path: Path, *overrides: str) -> Any:
    """Parse a preset as its verb does."""
    return parse(CONFIG_OF[path.parent.name], ["--config", str(path), *overrides], verb="", description="")


def data_of(path: Path) -> str:
    """The data set at the end of a preset's name: imagenet256 for `gpt_any_order_imagenet256`."""
    data = {preset.stem.partition("_")[2] for preset in TOKENIZER_PRESETS}
    return max((name for name in data if path.stem.endswith(f"_{name}")), key=len)


def preset_tokenizer(path: Path):
    """The tokenizer of a preset on the meta device."""
    config = config_of(path)
    channels, height, width = config.data.spec.shape
    with torch.device("meta"):
        return build_tokenizer(config.model, (height, width), channels)


def test_outputs_are_named_after_the_preset_and_inputs_are_outputs_of_others():
    for path in PRESETS:
        config, data = config_of(path).model_dump(), data_of(path)
        names = [path.stem, f"{path.stem}_tokens", *([data] if path.stem.startswith("pixels_") else [])]
        assert Path(config["out"]).name in names, path
        if path in PRIOR_PRESETS:
            kind, deep = config["model"]["kind"], (config["model"].get("head") or {}).get("kind") == "depth"
            maker = "multiscale_" if kind == "next_scale" else "rvq_" if deep else ""
            allowed = [f"{maker}{data}_tokens", f"{data}_squares_tokens"]  # of pixels, or of small squares of them
            assert Path(config["tokens"]).name in allowed, path
            assert list((CONFIGS / "tokenizer").glob(f"{maker or '*_'}{data}.yaml")), path


def test_every_preset_trains_its_own_steps():
    """A limit in minutes would give a weaker model on a slower machine."""
    for path in PRESETS:
        train = config_of(path).train
        assert train.steps is not None and train.minutes is None, path
        if config_of(path).model["kind"] not in ("palette", "pixels", "posthoc"):  # these train nothing
            assert "steps" in train.model_fields_set, path


@pytest.mark.parametrize("path", TOKENIZER_PRESETS, ids=lambda path: path.stem)
def test_tokenizer_preset_builds(path):
    tokenizer = preset_tokenizer(path)
    assert tokenizer.image_shape == config_of(path).data.spec.shape
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) < 1e9
    assert len(tokenizer.grid) <= 4096


def test_only_presets_of_photographs_mirror_images():
    """Letters, signs and flags have a left and a right, and a preset is used for the images of others."""
    mirroring = {data_of(path) for path in TOKENIZER_PRESETS if config_of(path).data.augment.flip}
    assert mirroring == {"cifar10", "imagegpt", "imagenet256"}


@pytest.mark.parametrize("path", PRIOR_PRESETS, ids=lambda path: path.stem)
def test_prior_preset_builds_on_a_tokenizer_of_its_data(path):
    model = config_of(path).model
    choices = {key: value for key, value in model.items() if key != "kind"}
    built = []
    for preset in TOKENIZER_PRESETS:
        if preset.stem.endswith(f"_{data_of(path)}"):
            with torch.device("meta"), contextlib.suppress(ValueError):  # of a grid without scales, rows or levels
                built.append(Prior.create(model["kind"], grid=preset_tokenizer(preset).grid, num_classes=10, **choices))
    assert built and all(sum(each.numel() for each in prior.parameters()) < 2e9 for prior in built)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_the_launcher_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # raises for unknown keys
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert given["mixed_precision"] in ("no", "bf16"), "fp16 is not supported"
    assert config.num_processes == given["num_processes"] >= given["num_machines"] >= 1
    expected = "NO" if config.num_processes == 1 else "FSDP" if path.stem == "fsdp" else "MULTI_GPU"
    assert str(config.distributed_type).rpartition(".")[2] == expected


# By name


@pytest.mark.parametrize("name", ["{stem}", "{stem}.yaml", "{folder}/{stem}", "configs/{folder}/{stem}.yaml"])
def test_a_preset_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    path = PRIOR_PRESETS[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / path.stem).mkdir()  # a run folder of the same name
    assert config_of(path) == config_of(path, "--config", name.format(stem=path.stem, folder=path.parent.name))
    assert all(find_preset(preset.stem) == preset for preset in PRESETS), "names are unique"


@pytest.mark.parametrize(
    ("name", "hint"), [("vqvae_digit", "'vqvae_digits'"), (PRIOR_PRESETS[0].stem, "a preset of train_prior, not of")]
)
def test_an_unknown_or_unfit_preset_is_one_line_with_a_hint(name, hint):
    with pytest.raises(UserError, match=hint) as caught:
        config_of(TOKENIZER_PRESETS[0], "--config", name)
    assert "\n" not in str(caught.value)


def test_presets_are_listed_with_their_comments(capsys):
    main(["presets"])
    page = " ".join(capsys.readouterr().out.split())
    for path in [*PRESETS, *LAUNCHERS]:
        comment = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        assert f"{path.parent.name}/{path.stem} {' '.join(comment.split())}" in page
    main(["presets", "name=accelerate/", "paths=true"])
    assert capsys.readouterr().out.splitlines() == [str(path) for path in LAUNCHERS]
