"""Every preset is a valid run of its verb, short, and builds its model.

Covers: pipelines/commands/presets.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from each import of_each

from pipelines import encode, evaluate, generate, train_prior, train_tokenizer
from pipelines.__main__ import main
from pipelines.commands import reconstruct
from pipelines.config import Config, UserError
from pipelines.config.arguments import find_preset
from pipelines.config.command import parse
from pipelines.config.schema import to_yaml
from pipelines.train_tokenizer import TrainTokenizerConfig, build_tokenizer
from prior import Prior

CONFIGS = Path(__file__).parents[2] / "configs"
VERBS = {
    "tokenizer": train_tokenizer,
    "prior": train_prior,
    "encode": encode,
    "evaluate": evaluate,
    "generate": generate,
    "reconstruct": reconstruct,
}
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
PRESETS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in LAUNCHERS)
TOKENIZER_PRESETS = [path for path in PRESETS if path.parent.name == "tokenizer"]
PRIOR_PRESETS = [path for path in PRESETS if path.parent.name == "prior"]
MOST_LINES = 25

every_preset = of_each(PRESETS)


def config_of(path: Path, *overrides: str) -> Config:
    """The configuration that the preset's verb makes of it."""
    verb = VERBS[path.parent.name]
    name = verb.__name__.rpartition(".")[2]
    cls = next(
        value
        for value in vars(verb).values()
        if isinstance(value, type)
        and value.__module__ == verb.__name__
        and issubclass(value, Config)
        and value.__name__.lower() == name.replace("_", "") + "config"
    )
    return parse(cls, ["--config", str(path), *overrides], verb=name, description="")


def data_of(path: Path) -> str:
    """The data that a preset is for, the end of its name: `gpt_any_order_imagenet256` is for imagenet256."""
    data = {preset.stem.partition("_")[2] for preset in TOKENIZER_PRESETS}
    return max((name for name in data if path.stem.endswith(f"_{name}")), key=len)


def preset_tokenizer(path: Path):
    """The tokenizer of a preset on the meta device, sized by its data."""
    config = config_of(path)
    assert isinstance(config, TrainTokenizerConfig)
    channels, height, width = config.data.image_shape
    with torch.device("meta"):
        return build_tokenizer(config.model, (height, width), channels)


def is_deep(model) -> bool:
    """Whether the ids of a position are drawn by a depth head."""
    return (model.get("head") or {}).get("kind") == "depth"


@every_preset
def test_preset_is_short_and_says_what_it_is(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 120
    assert re.match(r"# \S.{20,}", lines[0]), "the first line says what the preset is for"


@every_preset
def test_preset_is_valid_and_named_after_its_folder(path):
    config, data = config_of(path).model_dump(), data_of(path)
    names = [path.stem, f"{path.stem}_tokens", *([data] if path.stem.startswith("pixels_") else [])]
    assert Path(config["out"]).name in names
    if path.parent.name == "prior":
        maker = "multiscale_" if config["model"]["kind"] == "next_scale" else "rvq_" if is_deep(config["model"]) else ""
        assert Path(config["tokens"]).name == f"{maker}{data}_tokens"
        assert list((CONFIGS / "tokenizer").glob(f"{maker or '*_'}{data}.yaml")), f"no tokenizer preset for {data}"


@pytest.mark.parametrize("path", TOKENIZER_PRESETS, ids=lambda path: path.stem)
def test_tokenizer_preset_builds(path):
    tokenizer = preset_tokenizer(path)
    assert tokenizer.image_shape == config_of(path).data.image_shape
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) < 1e9
    assert len(tokenizer.grid) <= 4096


@pytest.mark.parametrize("path", PRIOR_PRESETS, ids=lambda path: path.stem)
def test_prior_preset_builds_on_every_tokenizer_of_its_data(path):
    """Next-scale on those of scales, a depth head on those of levels, one of intensities on pixels, the others on those
    of a grid; on a row of tokens those that need no map."""
    config = config_of(path)
    choices = {key: value for key, value in config.model.items() if key != "kind"}
    data = data_of(path)
    grids = [preset_tokenizer(name).grid for name in sorted((CONFIGS / "tokenizer").glob(f"*_{data}.yaml"))]
    grids = [grid for grid in grids if bool(grid.scales) == (config.model["kind"] == "next_scale")]
    grids = [grid for grid in grids if grid.ids_per_position > 1 or not is_deep(config.model)]
    if (choices.get("head") or {}).get("kind") == "logistic":
        grids = [grid for grid in grids if grid.channels]
    assert grids
    if on_a_map(config.model):
        grids = [grid for grid in grids if len(grid.shape) > 1]
    for grid in grids:
        with torch.device("meta"):
            prior = Prior.create(config.model["kind"], grid=grid, num_classes=10, **choices)
        assert prior.grid == grid and sum(parameter.numel() for parameter in prior.parameters()) < 2e9


def on_a_map(model: dict[str, Any]) -> bool:
    """Whether the prior of a preset needs rows and columns, for its kernels or for its order."""
    order, kernels = model.get("order", "raster"), ("pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail")
    return model["kind"] in kernels or bool(model.get("window")) or not str(order).startswith(("raster", "random"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_preset_resolves_to_is_a_file_that_gives_itself(path, tmp_path):
    config = config_of(path)
    whole = tmp_path / path.parent.name / "whole.yaml"
    whole.parent.mkdir()
    whole.write_text(to_yaml(config))
    assert config_of(whole) == config == config_of(path, "--config", str(whole))


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_config_is_one_of_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES and lines[0].startswith("# ")
    config = load_config_from_file(str(path))  # refuses unknown keys
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert given["mixed_precision"] in ("no", "bf16"), "fp16 is not supported"
    assert config.num_processes == given["num_processes"] >= given["num_machines"] >= 1
    assert str(config.distributed_type).rpartition(".")[2] == (
        "NO" if config.num_processes == 1 else "FSDP" if path.stem == "fsdp" else "MULTI_GPU"
    )


# By name


@pytest.mark.parametrize("name", ["{stem}", "{stem}.yaml", "{folder}/{stem}", "configs/{folder}/{stem}.yaml"])
@pytest.mark.parametrize("path", [TOKENIZER_PRESETS[0], PRIOR_PRESETS[0]], ids=lambda path: path.parent.name)
def test_a_preset_is_found_by_its_name_from_any_folder(path, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path.stem).mkdir()  # as a run leaves one
    assert config_of(path) == config_of(path, "--config", name.format(stem=path.stem, folder=path.parent.name))


@every_preset
def test_the_name_of_every_preset_is_its_own(path):
    assert find_preset(path.stem) == find_preset(f"{path.parent.name}/{path.stem}") == path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vqvae_digit", "; did you mean 'vqvae_digits'?"),
        ("nowhere/xyzzy.yaml", "(no such file, no such preset); `smalti presets` lists them"),
        ("accelerate/fsdp", "(no such file, no such preset); `smalti presets` lists them"),
        ("", "--config: expected a file name"),
        ("x" * 5000, "(no such file, no such preset); `smalti presets` lists them"),
    ],
)
def test_what_is_no_preset_names_those_that_are_near(name, hint):
    with pytest.raises(UserError, match=re.escape(hint)) as caught:
        config_of(TOKENIZER_PRESETS[0], "--config", name)
    assert "\n" not in str(caught.value)


def test_presets_are_listed_with_what_they_are_for(capsys):
    main(["presets"])
    page = " ".join(capsys.readouterr().out.split())
    for path in [*PRESETS, *LAUNCHERS]:
        comment = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        assert f"{path.parent.name}/{path.stem} {' '.join(comment.split())}" in page
    main(["presets", "name=accelerate/", "paths=true"])
    assert capsys.readouterr().out.splitlines() == [str(path) for path in LAUNCHERS]
    with pytest.raises(SystemExit):
        main(["presets", "name=xyzzy"])
    assert capsys.readouterr().err.startswith("error: name: ")


def test_a_preset_that_states_a_fact_is_refused():
    for fact in ("model.num_classes=10", "model.grid.vocab_size=16", "model.tokenizer=abc"):
        with pytest.raises(UserError, match="fact of the data"):
            config_of(PRIOR_PRESETS[0], fact)
    with pytest.raises(UserError, match="fact of the data"):
        config_of(TOKENIZER_PRESETS[0], "model.channels=3")
