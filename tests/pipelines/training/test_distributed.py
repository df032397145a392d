"""Two processes train as one does: the same losses, the same codebook on both at every step, the same tokens.

`accelerate launch` starts this file in two processes (`test_distributed.py NAME FOLDER`), which do many things in turn.

Covers: pipelines/processes/launched.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from launch import (
    GPT,
    MACHINE,
    VQVAE,
    arguments,
    assert_equal_tensors,
    exact,
    kill_the_second,
    launched,
    losses,
    make_tokens,
    metrics,
    output_of,
    prior_arguments,
    start,
    states,
    tensors,
    tokenizer_arguments,
    train_prior,
    train_tokenizer,
    two_processes,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from small import QUANTIZERS, node_of, train_on
from torch import nn
from two_processes import digest, gathered, leave_group

from pipelines import ImagePipeline, encode
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.metrics.likelihood import bits_per_token
from pipelines.processes.launched import TWO_PROCESSES, build_accelerator
from pipelines.processes.sharing import Team
from pipelines.stages.provenance import tokenizer_defaults
from pipelines.tokens import load_tokens
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import loop as training
from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.ema import EMA

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_process")]

STEPS = 20
TOLERANCE = 1e-5  # relative; 3e-7 was measured, as sums are taken in another order
BUSY = {"kind": "ema", "codes": 32, "dim": 8, "revive_every": 2, "revive_below": 0.3}  # codes die and rise all the time
TOKENIZER = {
    "train__steps": STEPS,
    "train__save_every": 5,
    "data__augment__rotate": 8,
    "data__cache_mb": 0,  # so that each process checks its share
    "model": {**VQVAE, "quantizer": BUSY},
}
PRIOR = {"train__steps": STEPS, "train__optimizer": "muon"}
EVALUATED = {
    "train__steps": 8,
    "train__log_every": 2,
    "train__evaluate_every": 2,
    "train__preview_every": 4,
    "train__save_every": 2,
    "train__warmup_steps": 0,
}
SCORES = [1.0, 4.0, 2.0, 3.0]  # so that the second evaluation is of the best weights
KINDS = [name for name in QUANTIZERS if name != "ema"]


def with_quantizer(name: str) -> dict[str, Any]:
    """A short run with a small quantizer of this kind."""
    return {"train__steps": 6, "model": {**VQVAE, "quantizer": node_of(name)}}


# In each of two processes


def drive(quantizer: EMA, steps: int, part: slice) -> list[dict[str, Any]]:
    """Train a codebook on its part of each step's vectors, with codes that are made to die; its state at each step."""
    seen = []
    for step in range(steps):
        z = torch.randn(16, quantizer.dim, 4, 4, generator=torch.Generator().manual_seed(step)) * (1 + step / 10)
        if step == 9:
            quantizer.counts[3:9] = 0.0
            quantizer.sums[3:9] = 0.0
        train_on(quantizer, z[part])
        rows = z.movedim(1, -1).reshape(-1, quantizer.dim)
        revived = [code for code, row in enumerate(quantizer.codebook) if (rows == row).all(1).any()]
        buffers = (quantizer.codebook, quantizer.counts, quantizer.sums)
        seen.append({"digest": digest(buffers), "input": digest([z[part]]), "revived": revived})
    return seen


def new_codebook() -> EMA:
    torch.manual_seed(0)
    quantizer: Any = Quantizer.create("ema", codes=32, dim=8, revive_every=5, revive_below=0.3, decay=0.9)
    return quantizer.train()


def codebooks(folder: Path) -> dict[str, Any]:
    """Half of the vectors each."""
    rank, quantizer = dist.get_rank(), new_codebook()
    seen = gathered(drive(quantizer, 40, slice(8 * rank, 8 * rank + 8)))
    learned: Any = Quantizer.create("vq", codes=32, dim=8)
    learned.train().quantize(torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(rank)))
    if rank == 0:
        save_file(quantizer.state_dict(), folder / "codebook.safetensors")
    return {"codebooks": seen, "learned": gathered(digest([learned.codebook]))}


def watched_runs(found: dict[str, Any], sick: set[int]) -> Callable[[str, Callable[[], Any]], None]:
    """watch(name, run): what `found` holds of a run, by its name, after every step, or the error it ended with. On rank
    1, losses of tokenizers in `sick` steps are no numbers."""
    rank = int(os.environ["RANK"])
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
    take_step, loss = training.take_step, TokenizerTask.loss
    log: list[Any] = []

    def watched(run: Any, *rest: Any) -> None:
        take_step(run, *rest)
        weights = [p for net in run.task.nets.values() for p in net.parameters()]
        wrapped = all(isinstance(net, nn.parallel.DistributedDataParallel) for net in run.task.nets.values())
        quantizer = getattr(getattr(run.task, "tokenizer", None), "quantizer", None)
        log.append(
            gathered(
                {
                    "weights": digest(weights),
                    "average": digest(run.averaged.module.parameters()),
                    "buffers": digest(run.task.model.buffers()),
                    "seed": torch.initial_seed(),
                    "wrapped": wrapped,
                    "codebook": digest(quantizer.buffers()) if quantizer else "",
                    "batch": digest(rest[0][0]),
                }
            )
        )

    def sick_on_rank_one(self: Any, player: str, batch: Any, step: int) -> Any:
        value, terms = loss(self, player, batch, step)
        return value * (math.nan if rank == 1 and step in sick else 1.0), terms

    training.take_step = watched
    TokenizerTask.loss = sick_on_rank_one  # type: ignore[method-assign]

    def watch(name: str, run: Callable[[], Any]) -> None:
        log.clear()
        try:
            run()
        except UserError as error:
            found[f"{name} error"] = gathered(str(error))
        found[name] = list(log)

    return watch


def leave(found: dict[str, Any], folder: Path) -> None:
    """Write down what was found, and end."""
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps({"world": dist.get_world_size(), **found}))
    leave_group()


def kinds(folder: Path) -> None:
    """A run with each kind of quantizer."""
    found: dict[str, Any] = {}
    watch = watched_runs(found, set())
    for name in KINDS:
        watch(name, lambda name=name: train_tokenizer(folder / name, **with_quantizer(name)))
    leave(found, folder)


def trainings(folder: Path) -> None:
    """Several runs in one process group, each watched after every step."""
    found: dict[str, Any] = {}
    sick: set[int] = set()
    watch = watched_runs(found, sick)
    watch("tokenizer", lambda: train_tokenizer(folder / "tokenizer", **TOKENIZER))
    sick |= {0, 5, 6, 11}
    watch("sick", lambda: train_tokenizer(folder / "sick", **TOKENIZER))
    sick |= set(range(30))
    watch("dying", lambda: train_tokenizer(folder / "dying", **TOKENIZER))
    sick.clear()
    watch("prior", lambda: train_prior(folder / "prior", folder / "tokens", **PRIOR))
    dropout = {**PRIOR, "train__accumulate": 2, "model": {**GPT, "dropout": 0.2}}
    watch("dropout", lambda: train_prior(folder / "dropout", folder / "tokens", **dropout))
    watch("odd batch", lambda: train_tokenizer(folder / "odd", **{**TOKENIZER, "train__batch_size": 15}))
    for stage in ("prior", "tokenizer"):
        found[f"evaluated {stage}"] = gathered(evaluated(stage, folder / f"evaluated {stage}", folder / "tokens"))
    for rows in (1, 2, 37):
        encode.run(encoding(folder / "tokenizer" / "tokenizer", folder / f"encoded{rows}", rows))
    leave({**found, **codebooks(folder)}, folder)


@contextmanager
def evaluated_in_parts() -> Iterator[dict[str, list[Any]]]:
    """Evaluations in small batches, whose scores are chosen: how many batches this process did of how many, and how
    many images it sampled at a time."""
    mine, call, seen = Team.mine, ImagePipeline.__call__, {"batches": [], "sampled": []}
    scores = {task: iter(SCORES) for task in (PriorTask, TokenizerTask)}

    def counted(team: Team, items: Any) -> Any:
        found = mine(team, items)
        seen["batches"].append([len(found), len(items)])
        return found

    def sampled(pipeline: Any, num_images: int, *rest: Any, **more: Any) -> Any:
        seen["sampled"].append(num_images)
        return call(pipeline, num_images, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "mine", counted)
        patch.setattr(ImagePipeline, "__call__", sampled)
        patch.setattr("pipelines.metrics.likelihood.LOGITS", 5 * 49 * 16)
        patch.setattr("pipelines.metrics.reconstruction.EVALUATED_PIXELS", 3 * 784)
        for task, some in scores.items():
            patch.setattr(task, "score", lambda self, evaluation, some=some: next(some))
        yield seen


def evaluated(stage: str, out: Path, tokens: Path) -> dict[str, list[Any]]:
    """A run that is evaluated, looked at and saved again and again, and leaves its second average."""
    with evaluated_in_parts() as seen:
        if stage == "prior":
            train_prior(out, tokens, **EVALUATED)
        else:
            train_tokenizer(out, **EVALUATED)
    return seen


def encoding(tokenizer: Path, out: Path, rows: int) -> encode.EncodeConfig:
    argv = encode_arguments(tokenizer, out, rows)
    return parse(encode.EncodeConfig, argv, verb="encode", description=None, defaults=tokenizer_defaults)


def encode_arguments(tokenizer: Path, out: Path, rows: int) -> list[str]:
    """An odd number of rows, so that the last share is not full; augmented, so that a batch spans variants."""
    return arguments(
        {"tokenizer": str(tokenizer), "out": str(out), "data.limit": rows, "augmentations": 2, "batch_size": 8}
    )


# From outside


def in_two_processes(name: str, folder: Path) -> dict[str, Any]:
    """Run a function of this file in two processes, by the documented command; what it left, and what they printed."""
    command = launched(["--multi_gpu", "--num_processes", "2", *MACHINE], __file__, name, str(folder))
    printed = output_of(start(command, PYTHONPATH=os.environ["PYTHONPATH"]))
    found = json.loads((folder / "found.json").read_text())
    assert found["world"] == 2
    return {**found, "printed": printed}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trainings")
    make_tokens(folder / "tokens")
    return folder, in_two_processes("trainings", folder)


def test_codebooks_are_equal_on_both_at_every_step(pair):
    steps = list(zip(*pair[1]["codebooks"], strict=True))
    assert len(steps) == 40
    assert all(one["digest"] == two["digest"] and one["revived"] == two["revived"] for one, two in steps)
    assert all(one["input"] != two["input"] for one, two in steps)
    assert len({one["digest"] for one, _ in steps}) == 40  # it moved


def test_two_codebooks_learn_what_one_does(pair):
    folder, found = pair
    quantizer = new_codebook()
    alone = drive(quantizer, 40, slice(None))
    assert [step["revived"] for step in alone] == [step["revived"] for step in found["codebooks"][0]]
    assert set(range(3, 9)) <= set(alone[9]["revived"]) and not alone[8]["revived"]  # those that were made to die
    together = load_file(folder / "codebook.safetensors")
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-5)


def test_a_learned_codebook_starts_alike(pair):
    one, two = pair[1]["learned"]
    assert one == two


@pytest.mark.parametrize("name", ["tokenizer", "sick", "prior", "dropout"])
def test_both_hold_the_same_model_at_every_step(pair, name):
    assert_alike(pair[1][name], STEPS)


@pytest.fixture(scope="module")
def pair_of_kinds(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kinds")
    return folder, in_two_processes("kinds", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_both_hold_the_same_quantizer_of_any_kind_at_every_step(pair_of_kinds, name):
    """What two processes do to each kind by itself is in the tests of quantizers."""
    assert_alike(pair_of_kinds[1][name], 6)


def assert_alike(steps: list[Any], count: int) -> None:
    """At each of so many, both processes hold the same."""
    assert len(steps) == count
    for one, two in steps:
        assert one["wrapped"] and two["wrapped"]
        for part in ("weights", "average", "buffers", "codebook"):
            assert one[part] == two[part]
        assert one["batch"] != two["batch"] and one["seed"] != two["seed"]  # each its own images, and its own dropout


def test_what_is_sick_on_one_is_skipped_by_both(pair):
    folder, found = pair
    steps = [one for one, _ in found["sick"]]
    for step in range(1, STEPS):
        same = [steps[step][part] == steps[step - 1][part] for part in ("weights", "average")]
        assert same == [step in (5, 6, 11)] * 2
    assert metrics(folder / "sick")[-1]["skipped_steps"] == 4
    assert all(torch.isfinite(value.float()).all() for value in tensors(folder / "sick").values())


def test_ten_sick_steps_end_both(pair):
    one, two = pair[1]["dying error"]
    assert one == two and "step 10: 10 steps in a row" in one


def test_an_odd_batch_is_refused_by_both(pair):
    assert all("15 is not a multiple of processes x accumulate (2 x 1)" in m for m in pair[1]["odd batch error"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name != "gumbel"])
def test_two_train_every_quantizer_as_one_does(pair_of_kinds, tmp_path, name):
    """All but gumbel, whose noise is each process's own."""
    alone = train_tokenizer(tmp_path / "alone", **with_quantizer(name))
    for figure in ("loss", "l2", "gradient_norm", "codebook_usage"):
        found, expected = losses(pair_of_kinds[0] / name, figure), losses(alone, figure)
        assert len(found) == 6 and found == pytest.approx(expected, rel=1e-4), figure


@pytest.mark.parametrize("stage", ["prior", "tokenizer"])
def test_two_evaluate_what_one_does_each_its_part(pair, tmp_path, stage):
    """The same rows and figures, at every evaluation and of the weights that the run leaves: those that were best,
    which the second process gets from the first."""
    folder, found = pair
    both, shares = folder / f"evaluated {stage}", found[f"evaluated {stage}"]
    alone = evaluated(stage, tmp_path / "alone", folder / "tokens")
    one, two, whole = (
        [batch for batch in share["batches"] if batch[1] > 2] for share in (*shares, alone)
    )  # no pictures
    assert [items for _, items in one] == [items for _, items in two] == [items for _, items in whole]
    for (here, items), (there, _) in zip(one, two, strict=True):
        assert here + there == items and 0 <= here - there <= 1
    assert len(one) == 5 and whole == [[items, items] for _, items in one]
    names = {name for line in metrics(both) for name in line if name.startswith(("validation/", "held_out/"))}
    assert len(names) >= 2
    for name in sorted(names):
        assert losses(both, name) == pytest.approx(losses(tmp_path / "alone", name), rel=TOLERANCE)
        assert len(losses(both, name)) == (4 if name.startswith("validation") else 1)


def test_what_two_leave_is_what_they_evaluated(pair):
    """The last figure is that of the best weights, to the bit; and the pictures are those that one process draws."""
    folder, found = pair
    run = folder / "evaluated prior"
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert pipe.provenance["prior"]["best_step"] == 4
    with evaluated_in_parts():
        bits = bits_per_token(pipe.prior, load_tokens(folder / "tokens").splits["test"])
        drawn = pipe.sample_picture()
    assert losses(run, "held_out/bits_per_token") == [bits]
    assert np.array_equal(pipe.sample_grid, drawn)
    with Image.open(run / "previews" / "samples-00000008.png") as preview:
        assert np.array_equal(np.asarray(preview), drawn)
    for share in found["evaluated prior"]:  # steps 0 and 4 are looked at, 2 and 6 saved, 8 both: once each
        assert share["sampled"] == [40] * 5
    pictures = [path.name for path in (folder / "evaluated tokenizer" / "previews").iterdir()]
    assert {name.split("-")[0] for name in pictures} == {"reconstructions", "codebook"}


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_rows_than_shares(pair, tmp_path, rows):
    folder, _ = pair
    encode.run(encoding(folder / "tokenizer" / "tokenizer", tmp_path / "alone", rows))
    assert_equal_tensors(tensors(folder / f"encoded{rows}"), tensors(tmp_path / "alone"))


# The documented command


@pytest.fixture(scope="module")
def by_command(tmp_path_factory) -> Path:
    """A tokenizer that two processes trained."""
    run = tmp_path_factory.mktemp("by_command") / "run"
    printed = output_of(start(two_processes("train_tokenizer", tokenizer_arguments(run, **TOKENIZER))))
    assert printed.count("2 processes on cpu") == 1, printed
    return run


def test_two_train_a_tokenizer_as_one_does(pair, tmp_path):
    both, alone = pair[0] / "tokenizer", train_tokenizer(tmp_path / "alone", **TOKENIZER)
    assert_same_figures(both, alone, ["loss", "l2", "commitment", "gradient_norm"])
    assert [line["learning_rate"] for line in metrics(both)] == [line["learning_rate"] for line in metrics(alone)]


def test_one_of_two_says_so(pair):
    said = [line for line in pair[1]["printed"].splitlines() if f"{pair[0] / 'tokenizer'}: starting" in line]
    assert len(said) == 1 and "2 processes on cpu" in said[0]


@pytest.mark.slow
def test_two_train_a_tokenizer_by_command(pair, by_command):
    assert exact(by_command) == exact(pair[0] / "tokenizer")


def assert_same_figures(both: Path, alone: Path, names: list[str]) -> None:
    for name in names:
        found, expected = losses(both, name), losses(alone, name)
        assert len(found) == STEPS and found[0] != found[-1]
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_two_train_a_prior_as_one_does(pair, tmp_path):
    folder, _ = pair
    alone = train_prior(tmp_path / "alone", folder / "tokens", **PRIOR)
    assert_same_figures(folder / "prior", alone, ["loss", "bits_per_token", "gradient_norm"])


@pytest.mark.slow
def test_two_train_a_prior_by_command(pair, tmp_path):
    folder, _ = pair
    argv = prior_arguments(tmp_path / "both", folder / "tokens", **PRIOR)
    printed = output_of(start(two_processes("train_prior", argv)))
    assert printed.count("2 processes on cpu") == 1, printed
    assert exact(tmp_path / "both") == exact(folder / "prior")


def assert_same_dataset(both: Path, tokenizer: Path, alone: Path) -> None:
    """37 rows, each with two variants, to the bit."""
    encode.run(encoding(tokenizer, alone, 37))
    for name in ("train.safetensors", "test.safetensors", "meta.json", "manifest.json"):
        assert (both / name).read_bytes() == (alone / name).read_bytes()
    assert load_file(both / "train.safetensors")["tokens"].shape == (111, 7, 7)


def test_two_encode_what_one_does(pair, tmp_path):
    folder, _ = pair
    assert_same_dataset(folder / "encoded37", folder / "tokenizer" / "tokenizer", tmp_path / "alone")


@pytest.mark.slow
def test_two_encode_by_command(by_command, tmp_path):
    argv = encode_arguments(by_command / "tokenizer", tmp_path / "both", 37)
    output_of(start(two_processes("encode", argv)))
    assert_same_dataset(tmp_path / "both", by_command / "tokenizer", tmp_path / "alone")


@pytest.mark.slow
def test_a_run_of_two_is_killed_and_goes_on(by_command, tmp_path):
    """One of them dies; the other ends too, and the same command ends where the uninterrupted run did."""
    argv = tokenizer_arguments(tmp_path / "run", **TOKENIZER)
    process = start(two_processes("train_tokenizer", argv))
    file = tmp_path / "run" / "metrics.jsonl"
    workers = kill_the_second(process, lambda: file.exists() and file.read_bytes().count(b"\n") >= 7)
    assert not any(worker.is_running() for worker in workers)
    assert 5 <= metrics(tmp_path / "run")[-1]["step"] < STEPS
    printed = output_of(start(two_processes("train_tokenizer", argv)))
    assert "continuing from step" in printed and "2 processes" in printed
    assert exact(tmp_path / "run") == exact(by_command)
    assert_equal_tensors(tensors(states(tmp_path / "run")[-1]), tensors(states(by_command)[-1]))


@pytest.mark.parametrize("steps", ["2", "auto", ""])
def test_accumulation_that_accelerate_was_asked_for_is_refused(steps, monkeypatch):
    """Accelerate would divide every loss by it, and the loop, which accumulates by itself, would not know."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert build_accelerator().gradient_accumulation_steps == 1
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    with pytest.raises(UserError, match=r"^ACCELERATE_GRADIENT_ACCUMULATION_STEPS=\w*: .*train\.accumulate=.*$"):
        build_accelerator()


STARTS_ONE = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


def test_a_launcher_that_starts_one_is_found_out(tmp_path, monkeypatch):
    """By what accelerate's own launcher tells the only process that it would start."""
    from accelerate.commands import launch

    command = [*STARTS_ONE.split(), "-m", "pipelines.train_tokenizer"]
    with patch.object(launch.subprocess, "Popen", return_value=Mock(returncode=0)) as started:
        launch.launch_command(launch.launch_command_parser().parse_args(command))
    assert started.call_count == 1
    for name, value in started.call_args.kwargs["env"].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="only one was started") as refused:
        train_tokenizer(tmp_path / "run")
    assert TWO_PROCESSES in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_that_starts_one_is_found_out(tmp_path):
    command = ["accelerate", "launch", *STARTS_ONE.split(), "-m", "pipelines.train_tokenizer"]
    printed = output_of(start([*command, *tokenizer_arguments(tmp_path / "run")]), code=None)
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "only one was started" in line and TWO_PROCESSES in line
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
