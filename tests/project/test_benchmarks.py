"""The benchmarks run, and their commands are what there is."""

import ast
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDERS = [path.parent for path in sorted((ROOT / "benchmarks").glob("*/__init__.py")) if path.parent.name != "support"]
BENCHMARKS = [f"{path.parent.name}.{path.stem}" for folder in FOLDERS for path in sorted(folder.glob("[!_]*.py"))]


def ended(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.NAME ARGUMENTS`, from the root."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def run(name: str, *arguments: str) -> str:
    """What it prints."""
    done = ended(name, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def file_of(name: str) -> Path:
    return ROOT / "benchmarks" / f"{name.replace('.', '/')}.py"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_commands_of_a_benchmark_exist(name):
    commands = re.findall(r"^    (?:[A-Z_]+=\S+ )*python -m benchmarks\.(\S+)(.*)$", file_of(name).read_text(), re.M)
    assert name in [command for command, _ in commands] and {command for command, _ in commands} <= set(BENCHMARKS)
    by_preset = [options for command, options in commands if command in ("priors.ladder", "tokenizers.equal_bits")]
    for data in re.findall(r"data=(\w+)", " ".join(by_preset)):
        assert list((ROOT / "configs" / "prior").glob(f"*_{data}.yaml")), f"no presets for data={data}"
        assert [kind for kind in ("vqvae", "pixels") if (ROOT / f"configs/tokenizer/{kind}_{data}.yaml").is_file()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_says_how_to_run_it(name):
    said = ast.get_docstring(ast.parse(file_of(name).read_text()))
    assert run(name, "--help").split() == said.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["threads"], "threads: expected key=value, or --help"),
        (["thread=1"], "thread: unknown; there are threads, repeats"),
        (["threads=two"], "threads=two: expected a whole number"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, message):
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}\n"):
        run("speed.sampling", *arguments)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_steps_stand_beside_those_of_others():
    """Tiny ones of both stages: as many parameters as diffusers' network has, and no more kept than by GPT-2."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    printed = run("speed.train", "threads=1", "repeats=2", "peak=128", "only=gpt tiny, vqgan tiny")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    head, gpt, gpt2, vqgan, vq_model = rows
    assert [row[0] for row in rows[1:]] == ["gpt tiny", "GPT2LMHeadModel", "vqgan tiny", "VQModel"]
    assert vqgan[1:3] == vq_model[1:3] and float(gpt[5]) < 1.2 * float(gpt2[5])
    for row in (gpt, vqgan):
        cells = dict(zip(head, row, strict=True))
        assert float(cells["step, ms"]) > 0 and float(cells["in the loop, ms"]) > 0 and float(cells["faster"]) > 0
        assert 0 <= float(cells["data wait"].rstrip("%")) <= 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_ladder_of_seconds(tmp_path):
    """All presets of the digits, trained for a second each; a second call does nothing again; then parallel passes."""
    command = ("priors.ladder", "data=digits", "minutes=0.02", "seeds=2", "speed=1", f"out={tmp_path}")
    printed = run(*command)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    kinds = {path.stem.removesuffix("_digits") for path in (ROOT / "configs/prior").glob("*_digits.yaml")}
    kinds -= {"next_scale"}  # over tokens of its own
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows} >= kinds | {"marginal", "held-out images"}
    head, _, tables = printed.partition("0.02 CPU minutes each, 2 seed(s)")
    trained = [line for line in tables.partition("64 samples")[0].splitlines() if line[2:].split(" | ")[0] in kinds]
    assert len(trained) == len(kinds) and all("+-" in row for row in trained) and "+-" not in head
    assert {"cached", "uncached"} <= set(json.loads((tmp_path / "digits/gpt/seed0/speed.json").read_text()))
    assert run(*command).splitlines()[-8:] == printed.splitlines()[-8:]
    found = run("priors.parallel", f"ladder={tmp_path / 'digits'}")
    differ = [row.split(" | ")[-1] for row in found.splitlines()[4:] if row.startswith("| ")]
    assert len(differ) == 3 and all(cell.strip(" |") == "0" for cell in differ)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_blocks_are_measured_beside_raster_order(tmp_path):
    """A few steps of small priors on random tokens: every column is filled, and a second call does nothing again."""
    from givens.token_datasets import make_dataset

    make_dataset("pixels").save(tmp_path / "tokens")
    command = ["priors.blocks", f"tokens={tmp_path / 'tokens'}", f"out={tmp_path / 'runs'}", "orders=raster,halton:3"]
    command += ["steps=2", "seeds=2", "samples=64", "masked=3", "model.dim=16", "model.depth=1", "model.heads=2"]
    command += [f"plot={tmp_path / 'plot.png'}"]
    printed = run(*command)
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in printed.splitlines() if line.startswith("| ")}
    passes = {name: cells[0] for name, cells in rows.items() if name not in ("order", "held-out images")}
    named = {"gpt": "64", "raster": "64", "halton:3": "3", "masked, 3 steps": "3", "masked along halton:3": "3"}
    assert named.items() <= passes.items() and 1 <= float(passes["gpt, parallel"]) <= 64
    assert all("+-" in rows[name][1] for name in ("gpt", "raster", "halton:3"))
    assert rows["masked, 3 steps"][1] == "no density" and (tmp_path / "plot.png").stat().st_size > 10_000
    assert run(*command).splitlines()[-9:] == printed.splitlines()[-9:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_tokenizers_for_seconds(tmp_path):
    """A few steps of a small one of each; two processes can share the folder; a second call does nothing again."""
    small = [
        "limit=64",
        "augmentations=1",
        "train.batch_size=8",
        "model.widths=[16]",
        "model.blocks=[1]",
        "gpt.train.batch_size=8",
        "gpt.model.depth=1",
        "gpt.model.dim=32",
    ]
    command = ("tokenizers.equal_bits", "data=digits", "minutes=0.002", "gpt_minutes=0.002", f"out={tmp_path}", *small)
    assert "ms per step, gpt: 7x7x128" in run(*command, "only=")
    times = json.loads((tmp_path / "digits" / "steps.json").read_text())
    assert "critic" in times["tokenizer"] and "posthoc" not in times["tokenizer"]
    printed = run(*command, "only=ema,posthoc")
    assert "posthoc: left out until klvae" in printed and printed.count("starting") == 2
    command = (*command, "seeds=2")
    printed = run(*command)
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in printed.splitlines() if row.startswith("| ")}
    assert set(rows) >= set(times["grids"])
    for name, seconds in times["tokenizer"].items():
        figures = json.loads((tmp_path / "digits" / "seed0" / name / "figures.json").read_text())
        assert figures["steps"] == max(1, round(0.12 / seconds)) and figures["seconds_per_step"] == seconds
        assert figures["gpt_steps"] == max(1, round(0.12 / times["gpt"][times["grids"][name]]))
        both = [json.loads(path.read_text())["psnr"] for path in tmp_path.glob(f"digits/seed*/{name}/figures.json")]
        assert f"| {sum(both) / 2:.2f} +- " in rows[name]
    assert (tmp_path / "digits" / "rate_distortion.png").is_file()
    again = run(*command)
    assert again.splitlines()[-8:] == printed.splitlines()[-8:] and "training rows" not in again
    with pytest.raises(AssertionError, match="was made with gpt_minutes=0.002; choose another out="):
        run(*command, "gpt_minutes=1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_peers_for_seconds(tmp_path):
    """A few steps of each of the chosen ones, without a GPT."""
    small = ["limit=64", "train.batch_size=8", "model.widths=[16]", "model.blocks=[1]", "gpt_minutes=0"]
    names = [
        "subpixel-medium",
        "subpixel-small",
        "nearest-small",
        "vit-small",
        *(["diffusers-small"] if find_spec("diffusers") else []),
    ]
    options = ("set=peers", "data=digits", "minutes=0.002", f"only={','.join(names)}", f"out={tmp_path}")
    printed = run("tokenizers.equal_bits", *options, *small)
    rows = [row.split(" | ")[0].removeprefix("| ") for row in printed.splitlines() if row.startswith("| ")]
    assert set(names) <= set(rows) and "each network at its best size" in printed and "GPT: bits" not in printed
    assert (tmp_path / "digits_peers" / "reconstructions.png").is_file()


# On a GPU


@pytest.mark.slow
def test_the_measurements_of_a_gpu_are_rehearsed(tmp_path):
    pytest.importorskip("transformers")
    run("speed.gpu", "device=cpu", "tiny=true", "repeats=1", f"out={tmp_path / 'gpu.md'}")
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("|")]
    names = [row.split("|")[1].strip() for row in rows]
    assert {"gpt_imagenet256, compiled", "diffusers VQModel", "gpt, bfloat16", "vqgan, bf16 autocast"} <= set(names)
    assert all(row.count("|") == rows[0].count("|") for row in rows[:10])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_robustness_is_measured(tmp_path):
    """A few steps of each: all columns are filled, and a second call does nothing again."""
    command = ["tokenizers.robustness", "source=digits", "limit=300", "steps=3", "prior_steps=3", "more=3"]
    command += ["samples=20", "features=2", "seeds=2", "threads=1", f"out={tmp_path}"]
    printed = run(*command)
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in printed.splitlines() if line.startswith("| ")}
    assert {"none", "swap", "swap-strong", *(f"decoder-{kind}" for kind in ("real", "near", "drawn", "sampled"))} < set(
        rows
    )
    assert all("+-" in cells[0] and "+-" in cells[4] for name, cells in rows.items() if name != "decoder")
    assert {name for name, cells in rows.items() if not cells[1].strip()} == {"none", "decoder-real"}
    assert run(*command).splitlines() == printed.splitlines()[-9:]


def written(folder, tokenizer):
    """A token dataset of random ids."""
    from pipelines.tokens import TokenDataset, TokenSplit

    rows = {"train": 64, "validation": 8, "test": 8}
    grid = tokenizer.grid
    splits = {name: TokenSplit(torch.randint(grid.vocab_size, (n, *grid.shape)), None) for name, n in rows.items()}
    TokenDataset(grid, [], splits, tokenizer, {}).save(folder)
    return folder


@pytest.mark.slow
def test_heads_are_compared_on_levels_and_on_pixels(tmp_path):
    """At the length of a few steps: a row for each case, of finite figures."""
    pytest.importorskip("constriction")
    from small import make_tokenizer

    rvq = {"kind": "rvq", "depth": 2, "book": {"kind": "ema", "codes": 32, "dim": 8}}
    levels = written(tmp_path / "levels", make_tokenizer("vqvae", (8, 8), 1, quantizer=rvq))
    printed = run("priors.levels", f"tokens={levels}", "minutes=0.005", "seeds=1", "rows=8")
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if "+-" in line]
    assert rows == ["gpt, unfolded", "gpt, depth", "blocks, unfolded", "blocks, depth"] and "nan" not in printed

    bytes_ = written(tmp_path / "bytes", make_tokenizer("pixels", (8, 8), 1, levels=256))
    printed = run("priors.intensities", f"tokens={bytes_}", "minutes=0.005", "rows=8", "images=3", "only=pixelcnn_pp")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "pixelcnn_pp |" in line
    ]
    assert [row[1] for row in rows] == ["softmax", "logistic"]
    assert all(0 < float(row[5]) < 12 and float(row[6]) > float(row[5]) * 0.9 for row in rows)
