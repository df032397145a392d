"""docs/sweep.yaml holds a valid command, and a run logs its metric."""

from __future__ import annotations

import os
import random
import subprocess
from functools import reduce
from pathlib import Path

import yaml
from launch import make_tokens

from pipelines.config.command import parse
from pipelines.train_prior import PriorTask, TrainPriorConfig

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "docs" / "sweep.yaml"


def test_the_command_of_a_trial_is_valid(tmp_path: Path) -> None:
    """As the agent starts it, with values that a sweep server could draw."""
    sweep, draw = yaml.safe_load(SWEEP.read_text()), random.Random(0)
    values = {
        name: draw.choice(how["values"]) if "values" in how else draw.uniform(how["min"], how["max"])
        for name, how in sweep["parameters"].items()
    }
    *command, arguments = sweep["command"]
    assert arguments == "${args_no_hyphens}"
    stub = tmp_path / "accelerate"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "WANDB_RUN_ID": "trial7"}
    command += [f"{name}={value}" for name, value in values.items()]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    argv = printed.splitlines()
    assert argv[:3] == ["launch", "-m", "pipelines.train_prior"]
    config = parse(TrainPriorConfig, argv[3:], verb="train_prior", description=None).model_dump()
    assert config["out"] == "runs/sweep/trial7"
    for name, value in values.items():
        assert reduce(lambda node, part: node[part], name.split("."), config) == value, name


def test_the_metric_is_one_that_a_run_logs(tmp_path: Path) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    tokens = make_tokens(tmp_path / "tokens")
    config = parse(TrainPriorConfig, [f"tokens={tokens}", f"out={tmp_path}/run"], verb="", description=None)
    task = PriorTask(config)
    figures = {f"{task.watched}/{name}" for name in task.evaluate(task.model, task.watched)}
    assert sweep["metric"] == {"name": "validation/bits_per_token", "goal": "minimize"}
    assert sweep["metric"]["name"] in figures
