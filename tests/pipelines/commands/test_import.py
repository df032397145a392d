"""`smalti import`: what is left out, what is refused and why, and what comes after."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from command import fails
from givens.image_files import write_pictures
from givens.published_weights import imported, random_images, random_weights, taming_shapes
from safetensors.torch import save_file

from pipelines.__main__ import main
from pipelines.commands.import_ import ImportConfig, run
from tokenizer import Tokenizer

# What is left out, what is refused


@pytest.fixture
def small(tmp_path):
    """Weights of a small taming model, and a function that imports them with changes and gives the error."""
    weights = random_weights(taming_shapes(8, (1, 2), attention=(1,)))

    def write(changed):
        path = tmp_path / "model.safetensors"
        save_file(changed, path)
        return path

    return weights, write


def test_weights_of_training_are_left_out_and_counted(small, tmp_path, capsys):
    weights, write = small
    more = {
        "loss.discriminator.main.0.weight": torch.zeros(3),
        "loss.logvar": torch.zeros(()),
        "quantize.embedding.cluster_size": torch.zeros(32),
        "quantize.embedding.embed_avg": torch.zeros(32, 4),
        "model_ema.num_updates": torch.tensor(3),
    }
    tokenizer = imported(write({**weights, **more}), tmp_path / "out", "groups=4", "image_size=16")
    assert "5 weights that only training needs left out" in capsys.readouterr().out
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(value.numel() for value in weights.values())


@pytest.mark.parametrize("source", ["~/model.safetensors", "~"])
def test_the_home_is_found(small, tmp_path, monkeypatch, source):
    """`source=~` is no `~/`, which every argument may begin with."""
    weights, write = small
    write(weights)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(ImportConfig(source=source, out=str(tmp_path / "out"), groups=4)) == tmp_path / "out"
    assert Tokenizer.from_pretrained(tmp_path / "out").grid.shape == (128, 128)


CONV = "decoder.up.1.block.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(CONV), f"missing weights ['{CONV}'], unexpected weights []"),
        (lambda w: w.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda w: w.pop("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (lambda w: w.update(colorize=torch.zeros(3)), "missing weights [], unexpected weights ['colorize']"),
        (lambda w: w.update({CONV: w[CONV][:, :3]}), f"{CONV} has shape [16, 3, 3, 3], expected [16, 16, 3, 3]"),
        (lambda w: w.update({CONV: w[CONV] / 0}), f"{CONV} holds a value that is not finite"),
        (lambda w: w.update({CONV: w[CONV].long()}), f"{CONV} has dtype torch.int64, expected a floating-point one"),
        (lambda w: w.update({"encoder.conv_out.weight": torch.zeros(3)}), "has shape [3], expected 4 axes"),
        (lambda w: w.update({"encoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}), "channels: must be one of 1, 3"),
        (
            lambda w: w.pop("encoder.down.0.block.0.conv1.weight"),
            "the weights do not have the names of diffusers VQModel",
        ),
        (lambda w: w.clear(), "the weights do not have the names of"),
        (lambda w: w.update({"quantize.proj.weight": torch.zeros(32, 8, 1, 1)}), "quantize.embed.weight is missing"),
    ],
)
def test_other_weights_are_named(small, tmp_path, capsys, change, message):
    weights, write = small
    change(weights)
    path = write({name: value.contiguous() for name, value in weights.items()})
    error = fails(capsys, "import", f"source={path}", f"out={tmp_path}/out", "groups=4", "image_size=16")
    assert message in error and str(path) in error and not (tmp_path / "out").exists()


def test_what_the_weights_can_not_do_is_named(small, tmp_path, capsys):
    weights, write = small
    command = [f"source={write(weights)}", f"out={tmp_path}/out"]
    assert "groups: 32 does not divide the width 8" in fails(capsys, "import", *command)
    error = fails(capsys, "import", *command, "groups=4", "image_size=[17, 16]")
    assert "widths: " in error and "17x16" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "nothing was overwritten" in fails(capsys, "import", command[0], f"out={tmp_path}/mine", "groups=4")


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 1 << 40) + b"{}", b"PK\x03\x04 a zip of pickles", struct.pack("<Q", 10) + b"0123456789", b""],
)
def test_damaged_files_are_one_line(tmp_path, capsys, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert str(path) in fails(capsys, "import", f"source={path}", f"out={tmp_path}/out")


def test_places_without_weights_are_refused(small, tmp_path, capsys):
    weights, write = small
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        write(weights).rename(tmp_path / "two" / f"{name}.safetensors")
    for name in ("nowhere", "empty", "two"):
        assert fails(capsys, "import", f"source={tmp_path}/{name}", f"out={tmp_path}/out").startswith("error: source: ")
    bare = {
        "encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3),
        "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "encoder.conv_out.weight": torch.zeros(4, 8, 3, 3),
        "quantize.embedding.weight": torch.zeros(8, 4),
    }
    line = fails(capsys, "import", f"source={write(bare)}", f"out={tmp_path}/out")
    assert f"{tmp_path}/config.json: no such file" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "vq.pt", "bare.bin", "autoencoder.jit"])
def test_pickles_and_torchscript_are_never_opened(tmp_path, capsys, monkeypatch, name):
    torch.save({"state_dict": {}}, tmp_path / name)
    for function in ("torch.load", "torch.jit.load", "pickle.load"):
        monkeypatch.setattr(function, lambda *_, **__: pytest.fail("it was opened"))
    for source in (tmp_path / name, tmp_path):
        line = fails(capsys, "import", f"source={source}", f"out={tmp_path}/out")
        assert line.startswith("error: source: ") and name in line


# What comes after


def test_encode_and_reconstruct_ask_for_images_and_know_their_shape(small, tmp_path, capsys):
    weights, write = small
    imported(write(weights), tmp_path / "out", "groups=4", "image_size=[16, 12]")
    commands = {"reconstruct": "kept.png", "encode": "tokens"}
    for verb, out in commands.items():
        error = fails(capsys, verb, f"tokenizer={tmp_path}/out", f"out={tmp_path}/{out}")
        assert "data.source: there is no file or folder (not known of imported weights: give data.source)" in error
    write_pictures(tmp_path / "images" / "all", 6, 20, 20, 3)
    for verb, out in commands.items():
        main(
            [
                verb,
                f"tokenizer={tmp_path}/out",
                f"out={tmp_path}/{out}",
                f"data.source={tmp_path}/images",
                "data.held_out_fraction=0.5",
            ]
        )
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["imported"]["layout"] == "taming-transformers VQGAN" and len(facts["imported"]["sha256"]) == 64


def test_further_training_goes_on_from_the_codebook(small, tmp_path):
    """Neither started anew from the first batch, nor taken for dead before its codes had a chance."""
    weights, write = small
    tokenizer = imported(write(weights), tmp_path / "out", "groups=4", "image_size=16").train()
    before = tokenizer.quantizer.codebook.detach().clone()
    assert torch.equal(before, weights["quantize.embedding.weight"])
    for _ in range(2 * tokenizer.quantizer.config.revive_every):
        tokenizer(random_images(1, tokenizer.image_shape))
    assert torch.equal(tokenizer.quantizer.codebook, before)


def test_sizes_that_no_grid_can_have_are_one_line(small, tmp_path, capsys):
    """The network is outlined before it is made."""
    weights, write = small
    source, out = write(weights), tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["import", f"source={source}", f"out={out}", "image_size=4096", "groups=8"])
    assert f"{source}: a grid holds at most" in capsys.readouterr().err
