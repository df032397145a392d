"""The plan of a run as a user sees it: against published sizes, in words, and as the documentation shows it.

Covers: pipelines/planning/facts.py, pipelines/planning/forecast.py, pipelines/planning/machine.py,
pipelines/planning/page.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from givens.plans import TINY, planned
from launch import prior_arguments
from small import SMALL, TOKENIZERS, make_prior, make_tokenizer, quantizer_of

from pipelines.__main__ import main
from pipelines.commands import plan
from pipelines.config.command import parse
from pipelines.planning.budget import GPUS
from pipelines.planning.costs import Recipe, tokenizer_turn
from pipelines.planning.paper import on_paper
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_tokenizer import TrainTokenizerConfig
from prior import Prior
from tokenizer import TokenGrid, Tokenizer
from tokenizer.quantizers import Quantizer

ROOT = Path(__file__).parents[3]
GPT_PRESET = "configs/prior/gpt_imagenet256.yaml"
VQGAN_PRESET = "configs/tokenizer/vqgan_imagenet256.yaml"
IMAGENET = ["grid=[16,16]", "vocab_size=16384", "classes=1000", "rows=1281167"]
# Sun et al. 2024: width, depth, heads, and how many parameters they say it has.
LLAMAGEN = {
    "B": (768, 12, 12, "111M"),
    "L": (1024, 24, 16, "343M"),
    "XL": (1280, 36, 20, "775M"),
    "XXL": (1536, 48, 24, "1.4B"),
    "3B": (3200, 24, 32, "3.1B"),
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch, one_process):
    """Presets are named as in the documentation."""
    monkeypatch.chdir(ROOT)


# What is already there


def test_facts_come_from_the_token_dataset(tokens, capsys):
    argv = prior_arguments(Path("x"), tokens)
    forecast = planned(*argv)
    assert forecast.rows == 72 and forecast.tokens_per_image == 49
    with torch.device("meta"):
        model = Prior.create("gpt", grid=TokenGrid((7, 7), 16), num_classes=3, dim=32, depth=2, heads=2)
    assert forecast.sizes.parameters == sum(p.numel() for p in model.parameters())
    assert (tokens / "train.safetensors").stat().st_size - forecast.dataset < 1000
    what_if = parse(plan.PlanPriorConfig, [*argv, "rows=1000"], verb="plan", description=None)
    assert plan.facts_of(what_if, None).rows == 1000


def test_an_aligned_prior_costs_what_its_frozen_copy_and_its_second_label_do(capsys):
    """Eight forward passes in the place of three, and one more copy of the weights, which lasts; what is saved and
    evaluated is the same."""
    plain, aligned = planned(*TINY, "gpus=2"), planned(*TINY, "gpus=2", "objective=cca")
    assert "the frozen copy" in capsys.readouterr().out
    assert aligned.costs.work.flops == pytest.approx(plain.costs.work.flops * 8 / 3, rel=0.05)
    assert aligned.launches == plain.launches * 8 // 3
    assert aligned.pauses.evaluate == pytest.approx(plain.pauses.evaluate, rel=0.05)
    assert aligned.sizes.state == plain.sizes.state and aligned.snapshot == plain.snapshot
    assert {way for way in plain.memory if way.startswith("FSDP")} and not any(w[0] == "F" for w in aligned.memory)
    before, now = plain.memory["DDP"], aligned.memory["DDP"]
    assert now["the frozen copy"] == now["weights"] == before["weights"] and not before["the frozen copy"]
    assert now["activations and logits"] >= 2 * (before["activations"] + before["logits"])
    assert aligned.evaluating("DDP") == plain.evaluating("DDP") + now["weights"]
    for more, told in {
        "classes=0": "labels of two classes",
        "model.kind=masked": "a prior whose log p is exact",
    }.items():
        with pytest.raises(SystemExit):
            planned(*TINY, "objective=cca", more)
        assert f"objective: cca needs {told}" in capsys.readouterr().err


def test_a_prior_that_is_tuned_is_that_of_its_pipeline(tmp_path, monkeypatch):
    """No model is named then, and `init` is that of a prior."""
    prior = make_prior("gpt")
    prior.save_pretrained(tmp_path / "prior")
    monkeypatch.setattr(plan, "run", lambda config: config)
    config = plan.main([f"init={tmp_path}", "objective=cca", "grid=[3,4]", "vocab_size=5", "classes=3"])
    assert isinstance(config, plan.PlanPriorConfig) and config.model["kind"] == "gpt"
    assert plan.facts_of(config, None).prior_of(config.model).state_dict().keys() == prior.state_dict().keys()
    assert all(config.model[key] == getattr(prior.config, key) for key in ("dim", "depth", "heads"))


# Against what is published


@pytest.mark.parametrize("size", LLAMAGEN)
def test_parameters_of_llamagen(size, capsys):
    """Theirs by their code: no QK gains, no embeddings of start and axes, and SwiGLU's width is a multiple of 256."""
    dim, depth, heads, published = LLAMAGEN[size]
    hidden = -(-int(8 * dim / 3) // 256) * 256
    theirs = 1001 * dim + 2 * 16384 * dim + depth * (4 * dim**2 + 3 * dim * hidden + 2 * dim) + dim
    shown = f"{theirs / 1e6:.0f}M" if theirs < 1e9 else f"{theirs / 1e9:.1f}B"
    assert shown == published
    model = plan.on_meta(
        lambda: Prior.create(
            "gpt", grid=TokenGrid((16, 16), 16384), num_classes=1000, dim=dim, depth=depth, heads=heads, hidden=hidden
        )
    )
    ours = sum(p.numel() for p in model.parameters())
    assert ours - theirs == dim + (16 + 16) * dim + depth * heads  # start, axes, gains
    table = (ROOT / "docs" / "scaling.md").read_text()
    assert f"{theirs:,}" in table and f"{ours:,}" in table


def test_parameters_of_the_published_tokenizer():
    """LlamaGen's VQ-16 has 72 million."""
    config = parse(plan.PlanTokenizerConfig, ["--config", VQGAN_PRESET], verb="plan", description=None)
    tokenizer = plan.on_meta(lambda: plan.tokenizer_of(config))
    assert f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.0f}" == "72"


# The page


def test_a_run_that_ends_by_the_clock(capsys):
    """About as many steps as the minutes allow, or those that are given, if they are fewer."""
    small = ["model.blocks=[0]", "model.tail=[16,8]", "train.optimizer=adamw"]
    argv = ["--config", "vqvae_digits", "rows=3800", "gpus=1", *small, "train.minutes=5"]
    forecast = planned(*argv, "train.steps=null")
    page = capsys.readouterr().out
    assert forecast.steps == round(300 / forecast.whole_step) and forecast.hours * 60 == pytest.approx(5, rel=1e-3)
    assert f"{forecast.steps:,}  steps, " in page and "about, in the 5 minutes that it has" in page
    assert re.search(r"the run takes +5\.0 min", page) and "warning: train.steps" not in page
    fewer = planned(*argv, "train.steps=100")
    assert fewer.steps == 100 and "minutes that it has" not in capsys.readouterr().out
    assert planned(*argv[:-1], "train.steps=null", "train.minutes=null").hours is None
    assert "warning: train.steps: null needs train.minutes" in capsys.readouterr().out


def test_a_tokenizer_by_the_name_of_its_preset(capsys):
    small = ["model.depth=1", "classes=10", "rows=100", "gpus=1"]
    forecast = planned("--config", "gpt_digits", "tokenizer=vqvae_digits", *small)
    assert forecast.tokens_per_image == 49 and "7x7 tokens of 128 ids" in capsys.readouterr().out


@pytest.mark.parametrize("depth", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_page_of_a_prior(depth, capsys):
    forecast = planned("--config", GPT_PRESET, "gpus=8", "gpu=a100", f"model.depth={depth}", *IMAGENET)
    page = capsys.readouterr().out
    check_page(page)
    assert depth == 1 or (forecast.sizes.parameters == 110_913_936 and "110,913,936" in page)
    assert forecast.share == 32 and "299.7 epochs" in page
    flops = 3 * 256 * (2 * (depth * (4 * 768**2 + 3 * 768 * 2048) + 768 * 16384) + 4 * depth * 256 * 768)
    assert forecast.costs.work.flops == flops and forecast.flops_per_step == 256 * flops
    assert forecast.hours * (1 - forecast.beside) == pytest.approx(1_500_000 * 256 * flops / (8 * 312e12 * 0.3) / 3600)
    assert forecast.dataset == 1281167 * (512 + 8)
    assert "warning" not in page


@pytest.mark.slow
def test_twice_as_many_gpus_and_a_tokenizer_to_ask(capsys):
    small = ["--config", GPT_PRESET, "model.depth=1", "classes=1000", "gpu=a100"]
    one = planned(*small, "gpus=8", "grid=[16,16]", "vocab_size=16384", "rows=100")
    two = planned(*small, "gpus=16", f"tokenizer={VQGAN_PRESET}")
    assert one.sizes == two.sizes and two.rows is None and two.share == one.share / 2
    assert two.seconds_per_step == pytest.approx(one.seconds_per_step / 2)
    assert two.costs.work.turns[0].parts["activations"] == pytest.approx(
        one.costs.work.turns[0].parts["activations"] / 2, rel=0.01
    )
    assert two.snapshot - one.snapshot == pytest.approx(4 * 71_883_403, rel=0.01)
    assert "warning: rows: not known" in capsys.readouterr().out


def check_page(page: str) -> None:
    """It fits a terminal, columns are aligned, and parts add up."""
    lines = page.splitlines()
    assert max(map(len, lines)) <= 110 and not [line for line in lines if line != line.rstrip()]
    start = next(n for n, line in enumerate(lines) if line.startswith("memory"))
    header, *table = lines[start + 1 : lines.index("", start)]
    wide = max(len(re.split(r" {2,}", line.strip())[0]) for line in table) + 2
    ends = {match.end() for line in table for match in re.finditer(r"[\d.]+%?(?= |$)|yes|no(?= |$)", line[wide:])}
    ways = list(re.finditer(r"\S+(?:,? \S+)*", header))
    assert ends == {way.end() - wide for way in ways}
    cells = {line[:wide].strip(): line[wide : ways[0].end()].strip() for line in table[:-2]}
    first = {part: float(cell) for part, cell in cells.items() if cell}
    total = first.pop("all, in training")
    first.pop("while evaluating", None)
    first.pop("smalti evaluate, on one")
    assert total == pytest.approx(sum(first.values()), abs=0.06)


@pytest.mark.slow
def test_page_of_a_tokenizer_with_critic_and_perceptual_network(capsys):
    forecast = planned("--config", VQGAN_PRESET, "gpus=8", "gpu=a100", "rows=1281167")
    page = capsys.readouterr().out
    check_page(page)
    assert set(forecast.sizes.parts) == {"encoder", "quantizer", "decoder", "critic"}
    assert {"activations", "perceptual network", "critic"} <= set(forecast.memory["DDP"])
    assert "40.0 epochs" in page
    assert f"16 at a time, {forecast.costs.evaluation / 1e9:.1f} GB" in " ".join(SCALING.split())
    assert forecast.evaluating("DDP") < sum(forecast.memory["DDP"].values())
    assert f"| {forecast.flops_per_step * 400_000 / 1e18:.1f} EFLOP | 16% |" in SCALING


def facts_for(path):
    """What a plan of a prior's preset has to be told: a tokenizer, where its tokens have scales, levels or channels."""
    preset = yaml.safe_load(path.read_text())
    name = preset["tokens"].removeprefix("runs/").removesuffix("_tokens")
    kind, headed = preset["model"]["kind"], "head" in preset["model"]
    if kind == "pixelcnn_pp":
        return [f"tokenizer=pixels_{name}", "classes=10"]
    if kind == "next_scale" or headed:
        return [f"tokenizer={name}", "classes=10"]
    return ["grid=[7,7]", "vocab_size=64", "classes=10"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[pt]*/*.yaml")), ids=lambda path: path.stem)
def test_every_preset_has_a_plan(path, capsys):
    facts = facts_for(path) if path.parent.name == "prior" else []
    try:
        planned("--config", str(path), "train.accumulate=1", "gpus=1", *facts)
    except SystemExit:
        assert "takes no GPU" in capsys.readouterr().err
    else:
        check_page(capsys.readouterr().out)


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=() if name == "vq" else pytest.mark.slow) for name in Quantizer.available()]
)
def test_every_quantizer_has_a_turn(kind):
    choices = {**SMALL["vqgan"], "quantizer": quantizer_of(kind, 8, 4)}
    assert check_turn("vqgan", choices) > 0


@pytest.mark.slow
def test_every_tokenizer_has_a_turn_or_takes_no_gpu(capsys):
    trained = []
    for kind in TOKENIZERS:
        if plan.on_meta(lambda: count_trained(kind)):  # noqa: B023
            check_turn(kind, SMALL.get(kind, {}))
            trained.append(kind)
            continue
        with pytest.raises(SystemExit):
            planned(f"model={json.dumps({'kind': kind, **SMALL.get(kind, {})})}", "data.image_size=16")
        assert f"error: model.kind: a {kind} tokenizer has no weights to train" in capsys.readouterr().err
    assert set(trained) >= {"vqvae", "vqgan", "vit", "klvae"}


def count_trained(kind: str) -> int:
    model = make_tokenizer(kind, (16, 8))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_turn(kind: str, choices) -> int:
    """Bytes of activations on paper: about twice as many for twice the images, and hardly more than in a real run."""
    turns = []
    for count, paper in ((4, True), (8, True), (4, False)):
        with torch.device("meta") if paper else nullcontext():
            model = Tokenizer.create(kind, image_size=(16, 8), channels=3, **choices)
        recipe = Recipe(model, {"l1": 0.0, "l2": 1.0, **model.loss_weights})
        if not paper:
            model(torch.randn(32, *model.image_shape))  # its codebook starts
        with on_paper(model) if paper else nullcontext():
            turns.append(tokenizer_turn(recipe, count, True))
    small, large, real = (turn.parts["activations"] for turn in turns)
    assert 1.4 * small < large < 2 * small
    assert small == pytest.approx(real, rel=0.05, abs=8_000)  # on a CPU, mse_loss keeps all differences
    return small


# What is warned of


def lines_of(capsys) -> str:
    return " ".join(line.strip() for line in capsys.readouterr().out.partition("warning: ")[2].splitlines())


def test_what_does_not_divide_and_what_does(capsys):
    planned(*TINY, "gpus=12", "train.batch_size=256")
    told = lines_of(capsys)
    assert "256 is not a multiple of gpus x train.accumulate (12 x 1)" in told and "252 or 264 is" in told
    seldom = ["train.steps=1000000", *(f"train.{name}_every=500000" for name in ("evaluate", "preview", "save"))]
    planned(*TINY, "gpus=4", "train.accumulate=2", "train.batch_size=256", *seldom)
    assert not lines_of(capsys)


@pytest.mark.slow
def test_what_does_not_fit_and_what_does(capsys):
    forecast = planned(*TINY, "gpus=4", "train.batch_size=4096", "train.accumulate=1")
    totals = {way: sum(parts.values()) / 1e9 for way, parts in forecast.memory.items()}
    assert totals["DDP"] > totals["DDP, checkpointed"] > totals["FSDP, checkpointed"]
    capsys.readouterr()
    middle = (totals["DDP, checkpointed"] + totals["FSDP"]) / 2 / 0.9
    forecast = planned(*TINY, "gpus=4", "train.batch_size=4096", f"gpu_memory={middle}")
    told = lines_of(capsys)
    assert not forecast.fits("DDP") and "what fits: DDP, checkpointed; FSDP, checkpointed" in told
    # Where nothing fits, so many images do, and hardly more.
    small = totals["FSDP, checkpointed"] * 0.5
    planned(*TINY, "gpus=4", "train.batch_size=4096", f"gpu_memory={small}")
    most = int(re.search(r"FSDP, checkpointed with ([\d,]+) images at a time", lines_of(capsys))[1].replace(",", ""))
    for count, fits in ((most, True), (most + most // 20, False)):
        again = planned(*TINY, "gpus=4", f"train.batch_size={4 * count}", f"gpu_memory={small}")
        assert again.fits("FSDP, checkpointed") == fits


# What is wrong


BAD = [
    ([], "model.kind: nothing to plan; give the command line of train_prior or train_tokenizer"),
    (["model.kind=quantum"], "model.kind: no Prior is called 'quantum'; there are"),
    (
        ["model.kind=gpt"],
        "grid, vocab_size, classes: missing, as no token dataset is given; for example grid=16,16 vocab_size=16384 "
        "classes=1000 (0: no labels); tokenizer=PRESET says grid and vocab_size",
    ),
    (
        ["--config", GPT_PRESET, "classes=10"],
        "grid, vocab_size: missing, as token dataset 'runs/imagenet256_tokens' is not there yet",
    ),
    (["--config", GPT_PRESET, "grid=[16,16]", "vocab_size=4"], "classes: missing"),
    (["--config", GPT_PRESET, *IMAGENET, "gpus=0"], "gpus: must be >= 1 (got 0)"),
    (["--config", GPT_PRESET, *IMAGENET, "gpu=tpu"], "gpu: must be one of"),
    (["--config", GPT_PRESET, *IMAGENET, "utilization=2"], "utilization: must be <= 1 (got 2)"),
    (["--config", GPT_PRESET, *IMAGENET, "gpuss=2"], "gpuss: unknown key; did you mean 'gpus'?"),
    (["--config", GPT_PRESET, *IMAGENET, "precision=float32"], "peak_tflops: precision=float32 needs the peak"),
    (["--config", GPT_PRESET, *IMAGENET, "train.mixed_precision=no"], "peak_tflops: precision=float32 needs the peak"),
    (
        ["--config", GPT_PRESET, *IMAGENET, "train.mixed_precision=no", "precision=bf16"],
        "precision: bf16, and train.mixed_precision=no",
    ),
    (["--config", GPT_PRESET, *IMAGENET, "model.heads=7"], "heads: dim must be a multiple of 2 * heads"),
    (["--config", GPT_PRESET, *IMAGENET, "grid=[0,16]"], "grid: a grid needs positive whole sizes"),
    (
        ["--config", GPT_PRESET, "tokenizer=nowhere", "classes=2"],
        "tokenizer: neither a tokenizer's folder nor a preset: nowhere",
    ),
    (["--config", GPT_PRESET, "tokenizer=nowhere.yaml", "classes=2"], "nowhere.yaml: cannot be read"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["--config", VQGAN_PRESET, "data.image_size=250"], "widths: 5 levels halve 4 times"),
    (["model.kind=vqvae", "critic.weight=1", "critic.layers=6"], "critic.layers: a critic of 6 layers needs images"),
    (["model.kind=palette"], "model.kind: a palette tokenizer has no weights to train, so it takes no GPU"),
]


@pytest.mark.parametrize(
    ("argv", "told"),
    [pytest.param(*case, marks=() if n % 6 == 0 else pytest.mark.slow) for n, case in enumerate(BAD)],
    ids=lambda part: part[:30] if isinstance(part, str) else "",
)
def test_mistakes_are_told_in_lines(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *argv])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines and all(line.startswith("error: ") for line in lines)
    assert any(line.startswith(f"error: {told}") or told in line for line in lines), lines


@pytest.mark.slow
def test_train_commands_are_taken_as_they_are(tmp_path, capsys):
    """Every key of the two training verbs is one of a plan, and a dry run can be given back."""
    for cls, base in ((plan.PlanPriorConfig, TrainPriorConfig), (plan.PlanTokenizerConfig, TrainTokenizerConfig)):
        assert set(base.model_fields) <= set(cls.model_fields)
        assert set(cls.model_fields) == set(base.model_fields) | set(plan.PlanConfig.model_fields)
    for preset in (GPT_PRESET, VQGAN_PRESET):
        texts = []
        for path in (preset, str(tmp_path / "again.yaml")):
            with pytest.raises(SystemExit) as ended:
                main(["plan", "--config", path, "gpus=3", "--dry-run"])
            assert not ended.value.code
            texts.append(capsys.readouterr().out)
            (tmp_path / "again.yaml").write_text(texts[-1])
        assert texts[0] == texts[1] and "gpus: 3" in texts[0]


@pytest.mark.slow
def test_nothing_is_allocated_for_three_billion_parameters():
    """In a process of its own: what it holds at most is what importing takes, and some."""
    dim, depth, heads, _ = LLAMAGEN["3B"]
    code = (
        "import re, sys\nfrom pipelines.commands import plan\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak()\nplan.main(sys.argv[1:])\nprint('MiB', peak() - before)"
    )
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is measured as Linux counts it")
    argv = ["--config", GPT_PRESET, *IMAGENET, f"model.dim={dim}", f"model.depth={depth}", f"model.heads={heads}"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("MiB")[1]) < 600  # the weights alone would take 12,000


# The documentation


SCALING = (ROOT / "docs" / "scaling.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", SCALING, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [
    line.partition(" #")[0].strip() for line in BLOCKS.splitlines() if re.match("smalti|accelerate|[A-Z_]+=", line)
]


def test_there_are_commands_in_the_documentation():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=pytest.mark.slow if n % 6 else ()) for n, line in enumerate(COMMANDS)]
)
def test_commands_of_the_documentation_are_understood(command, capsys):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        at = words.index("-m")
        options = launch_command_parser().parse_args(words[2 : at + 2])
        assert options.config_file is None or Path(options.config_file).is_file()
        words = ["smalti", words[at + 1].removeprefix("pipelines."), *words[at + 2 :]]
    assert words[0] == "smalti"
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--dry-run"])
    assert not ended.value.code, capsys.readouterr().err


SIZES = dict(zip(LLAMAGEN, [shlex.split(line)[2:] for line in COMMANDS if "train.steps=" in line], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("size", LLAMAGEN)
def test_figures_of_the_documentation_are_those_of_the_plan(size, capsys):
    """Each row of the table is what its command prints."""
    forecast = planned(*SIZES[size])
    page = capsys.readouterr().out
    check_page(page)
    (row,) = (line for line in SCALING.splitlines() if re.match(rf"\| {size} \| \d+, \d+ \|", line))
    _, shared, token, run, *rest = (cell.strip() for cell in row.strip("|").split("|"))
    assert shared == f"{forecast.machine.gpus}, {forecast.schedule.batch_size}"
    assert re.search(rf"a token +{re.escape(token)}$", page, re.M) and re.search(
        rf"the run +{re.escape(run)}$", page, re.M
    )
    totals = [sum(parts.values()) for parts in forecast.memory.values()]
    assert rest == [f"{size / 1e9:.2f}" for size in (*totals, forecast.sizes.state)]


def test_gpus_of_the_help_are_those_of_the_table():
    assert set(plan.PlanConfig.model_fields["gpu"].annotation.__args__) == set(GPUS)
