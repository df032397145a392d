"""The README's code runs, its commands exist, and its file tree is the tree."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines.__main__ import main
from prior import Prior
from tokenizer import TokenGrid

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    line.partition(" #")[0].strip()
    for block in blocks("sh")
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_pipeline_code_runs(tmp_path, monkeypatch):
    tokenizer = make_tokenizer("vqvae", (28, 28), 1, quantizer={"kind": "fsq", "levels": (4, 4, 4)})
    for name in ("gpt", "gpt_any_order"):
        prior = make_prior("gpt", shape=(7, 7), vocab_size=64, num_classes=10, any_order=name == "gpt_any_order")
        pipeline = ImagePipeline(tokenizer, prior, labels=[str(digit) for digit in range(10)])
        pipeline.save_pretrained(tmp_path / f"runs/{name}_digits/pipeline")
    monkeypatch.chdir(tmp_path)
    code = [block for block in blocks("python") if "pipe" in block]
    assert len(code) == 4
    exec("\n".join(code), names := {})
    assert Path("three.png").stat().st_size > 0 and Path("my-pipeline/model_index.json").is_file()
    assert len(names["out"].images) == 4 and names["tokens"].shape == (4, 7, 7)
    assert names["digits"].shape == (4, 1, 28, 28)


def test_the_anomalies_of_the_example_are_looked_for_in_real_images():
    """Samples are always found strange, which would look as if the score did not work."""
    scored = re.findall(r"pipe\.(?:anomaly_score|anomaly_map|heal)\((\w+)", "\n".join(blocks("python")))
    assert len(scored) >= 4 and set(scored) == {"digits"}
    assert "digits = held_out.pixels(" in README and "pipe.calibrate(held_out.pixels(" in README


def test_the_one_file_model_is_a_prior(monkeypatch):
    """It joins the family, and keeps the family's first promises: sums to one, samples what it says."""
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))
    (code,) = (block for block in blocks("python") if "class Unigram" in block)
    exec(code, {"__name__": "prior.unigram"})
    assert "unigram" in Prior.available()
    model = Prior.create("unigram", grid=TokenGrid((1, 2), 3))
    grids = torch.cartesian_prod(torch.arange(3), torch.arange(3)).reshape(-1, 1, 2)
    assert float(model.log_prob(grids).detach().exp().sum()) == pytest.approx(1, abs=1e-6)
    assert model.sample(4).shape == (4, 1, 2)
    with pytest.raises(ValueError, match="scale"):
        Prior.create("unigram", grid=TokenGrid((1, 2), 3), scale=0)


def test_there_are_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch, capsys):
    """Verbs, keys, values, files and launch options exist: `make demo` runs those of the digits for real."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "accelerate":
        at = words.index("-m")
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args([*words[2 : at + 2]])
        assert options.config_file is None or Path(options.config_file).is_file()
        verb, arguments = words[at + 1].removeprefix("pipelines."), words[at + 2 :]
    else:
        assert words[0] == "smalti"
        verb, arguments = words[1], words[2:]
    with pytest.raises(SystemExit) as ended:
        main([verb, *arguments, "--dry-run"])
    assert not ended.value.code, capsys.readouterr().err


def test_every_file_is_in_the_tree():
    tree = README[README.index("## What lies where") : README.index("## On disk")]
    package, named = "", set()
    for line in tree.splitlines():
        if found := re.match(r"(\w+)/ ", line):
            package = found[1]
        elif found := re.match(r"  (\S+\.py) +\S", line):
            named.add(f"{package}/{found[1]}")
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("tokenizer", "prior", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == there


def test_pictures_and_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).is_file(), target
