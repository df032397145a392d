"""Every benchmark documents its command and, at the smallest settings, prints its table."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [path.parent for path in sorted((ROOT / "benchmarks").glob("*/__init__.py")) if path.parent.name != "support"]
BENCHMARKS = [f"{path.parent.name}.{path.stem}" for folder in FOLDERS for path in sorted(folder.glob("[!_]*.py"))]


def run(name: str, *arguments: str) -> str:
    """Run `python -m benchmarks.NAME ARGUMENTS` and return its output."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows_of(printed: str) -> dict[str, list[str]]:
    """The cells of each table row, by its first cell."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_documents_commands_that_exist(name):
    text = (ROOT / "benchmarks" / f"{name.replace('.', '/')}.py").read_text()
    document = ast.get_docstring(ast.parse(text))
    commands = dict(re.findall(r"^    python -m benchmarks\.(\S+)(.*)$", document, re.MULTILINE))
    assert commands and commands.keys() <= {name}
    for data in re.findall(r"data=(\w+)", document):
        assert list((ROOT / "configs" / "prior").glob(f"*_{data}.yaml")), f"no presets for data={data}"


def test_help_is_the_docstring_and_a_mistake_is_one_line(monkeypatch, capsys):
    from benchmarks.speed import sampling

    def main(argument):
        monkeypatch.setattr(sys, "argv", ["sampling", argument])
        sampling.main()

    with pytest.raises(SystemExit):
        main("--help")
    assert "python -m benchmarks.speed.sampling threads=1" in capsys.readouterr().out
    for argument in ("threads", "thread=1", "threads=two"):
        with pytest.raises(SystemExit, match=f"^{argument.removesuffix('=1')}: "):
            main(argument)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_steps_are_measured_beside_references():
    """`vqgan` has as many parameters as diffusers' network, and our GPT saves no more memory than GPT-2."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    rows = rows_of(run("speed.train", "threads=1", "repeats=2", "peak=128", "only=gpt tiny, vqgan tiny"))
    head, gpt, gpt2 = rows["model"], rows["gpt tiny"], rows["GPT2LMHeadModel"]
    assert rows["vqgan tiny"][:2] == rows["VQModel"][:2] and float(gpt[4]) < 1.2 * float(gpt2[4])
    for cells in (gpt, rows["vqgan tiny"]):
        found = dict(zip(head, cells, strict=True))
        assert all(float(found[name]) > 0 for name in ("step, ms", "in the loop, ms", "faster"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ladder_measures_every_preset_of_the_digits_once(tmp_path):
    command = ("priors.ladder", "data=digits", "minutes=0.02", "seeds=2", "speed=1", f"out={tmp_path}")
    printed = run(*command)
    kinds = {path.stem.removesuffix("_digits") for path in (ROOT / "configs/prior").glob("*_digits.yaml")}
    kinds -= {"next_scale"}  # over tokens of its own
    rows = rows_of(printed.partition("2 seed(s)")[2].partition("64 samples")[0])
    assert rows.keys() >= kinds | {"marginal", "held-out images"}
    assert all("+-" in rows[kind][3] for kind in kinds)
    assert {"cached", "uncached"} <= set(json.loads((tmp_path / "digits/gpt/seed0/speed.json").read_text()))
    assert run(*command).splitlines()[-8:] == printed.splitlines()[-8:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pixel_models_are_set_beside_published_figures_once(tmp_path):
    from givens.images import write_pictures

    for split, count in (("train", 220), ("test", 12)):
        write_pictures(tmp_path / "images" / split, count)
    command = ["priors.reference", f"source={tmp_path / 'images'}", "only=pixelcnn", f"out={tmp_path / 'runs'}"]
    printed = run(*command, "minutes=0.03", "seeds=2")
    rows = rows_of(printed)
    assert rows["made"][:2] == ["84.87", "not run"] and rows["pixelcnn"][0] == "81.45"
    folder = tmp_path / "runs" / "mnist_drawn"
    nats = [json.loads(path.read_text())["nats_per_image"] for path in folder.glob("pixelcnn/*/evaluation/*.json")]
    assert len(nats) == 2 and rows["pixelcnn"][1].startswith(f"{sum(nats) / 2:.2f} +- ")
    assert (folder / "curves.png").is_file()
    assert run(*command, "train=false", "seeds=2").splitlines()[-8:] == printed.splitlines()[-8:]
    with pytest.raises(AssertionError, match="data=digits: choose from mnist_drawn"):
        run("priors.reference", "data=digits")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_blocks_are_measured_beside_raster_order_once(tmp_path):
    from givens.token_datasets import make_dataset

    make_dataset("pixels").save(tmp_path / "tokens")
    command = ["priors.blocks", f"tokens={tmp_path / 'tokens'}", f"out={tmp_path / 'runs'}", "orders=raster,halton:3"]
    command += ["steps=2", "seeds=2", "samples=64", "masked=3", "model.dim=16", "model.depth=1", "model.heads=2"]
    printed = run(*command)
    rows = rows_of(printed)
    passes = {"gpt": "64", "raster": "64", "halton:3": "3", "masked, 3 steps": "3", "masked along halton:3": "3"}
    assert {name: rows[name][0] for name in passes} == passes and 1 <= float(rows["gpt, parallel"][0]) <= 64
    assert all("+-" in rows[name][1] for name in ("gpt", "raster", "halton:3"))
    assert rows["masked, 3 steps"][1] == "no density"
    assert run(*command).splitlines()[-9:] == printed.splitlines()[-9:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tokenizers_are_trained_for_equal_time_once(tmp_path):
    small = ["limit=64", "augmentations=1", "train.batch_size=8", "model.widths=[16]", "model.blocks=[1]"]
    small += ["gpt.train.batch_size=8", "gpt.model.depth=1", "gpt.model.dim=32"]
    command = ["tokenizers.equal_bits", "data=digits", "minutes=0.002", "gpt_minutes=0.002", f"out={tmp_path}", *small]
    assert "ms per step, gpt: 7x7x128" in run(*command, "only=")
    times = json.loads((tmp_path / "digits" / "steps.json").read_text())
    assert "critic" in times["tokenizer"] and "posthoc" not in times["tokenizer"]
    assert "posthoc: skipped until klvae" in run(*command, "only=ema,posthoc")
    command += ["seeds=2"]
    printed = run(*command)
    rows = rows_of(printed.partition("2 seed(s)")[2])
    assert rows.keys() >= set(times["grids"])
    for name, seconds in times["tokenizer"].items():
        paths = sorted(tmp_path.glob(f"digits/seed*/{name}/figures.json"))
        first, second = (json.loads(path.read_text()) for path in paths)
        assert first["steps"] == max(1, round(0.12 / seconds)) and first["seconds_per_step"] == seconds
        assert first["gpt_steps"] == max(1, round(0.12 / times["gpt"][times["grids"][name]]))
        assert rows[name][3].startswith(f"{(first['psnr'] + second['psnr']) / 2:.2f} +- ")
    assert (tmp_path / "digits" / "rate_distortion.png").is_file()
    assert run(*command).splitlines()[-8:] == printed.splitlines()[-8:]
    with pytest.raises(AssertionError, match="was made with gpt_minutes=0.002"):
        run(*command, "gpt_minutes=1")


@pytest.mark.slow
def test_the_gpu_table_is_measured_on_a_cpu(tmp_path):
    pytest.importorskip("transformers")
    run("speed.gpu", "device=cpu", "tiny=true", "repeats=1", f"out={tmp_path / 'gpu.md'}")
    rows = rows_of((tmp_path / "gpu.md").read_text())
    assert rows.keys() >= {"gpt_imagenet256, compiled", "diffusers VQModel", "gpt, bfloat16", "vqgan, bf16 autocast"}
    assert not any("failed" in cell for cells in rows.values() for cell in cells)
