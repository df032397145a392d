"""The W&B agent turns docs/sweep.yaml into valid commands, and a run logs its metric. Offline."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from launch import make_tokens

from pipelines.config.command import parse
from pipelines.train_prior import PriorTask, TrainPriorConfig

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "docs" / "sweep.yaml"


def trial(sweep: dict[str, Any], seed: int) -> dict[str, Any]:
    """Sample values like a sweep server."""
    draw, found = random.Random(seed), {}
    for name, how in sweep["parameters"].items():
        value = draw.choice(how["values"]) if "values" in how else draw.uniform(how["min"], how["max"])
        found[name] = {"value": value}
    return found


def started_by_the_agent(
    args: dict[str, Any], run_id: str, folder: Path, monkeypatch
) -> tuple[list[str], dict[str, str]]:
    """The command and environment with which the agent would start a trial."""
    agents = pytest.importorskip("wandb.wandb_agent")
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    found: list[Any] = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        found.append((command, env))
        return SimpleNamespace(poll=lambda: 0, last_sigterm_time=None)

    monkeypatch.setattr(agents, "AgentProcess", start)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "")  # set by the agent; restored after the test
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    sweep = load_sweep_config(str(SWEEP))
    agent = SimpleNamespace(
        _sweep_command=sweep["command"], _in_jupyter=False, _function=None, _forward_signals=False, _run_processes={}
    )
    agents.Agent._command_run(agent, {"args": args, "run_id": run_id, "program": sweep["program"]})
    return found[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_command_of_the_agent_is_valid(seed: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = yaml.safe_load(SWEEP.read_text())
    args = trial(sweep, seed)
    command, environment = started_by_the_agent(args, "trial7", tmp_path, monkeypatch)
    stub = tmp_path / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment["PATH"] = f"{stub.parent}{os.pathsep}{environment['PATH']}"
    argv = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert argv[:3] == ["launch", "-m", "pipelines.train_prior"]
    config = parse(TrainPriorConfig, argv[3:], verb="train_prior", description=None).model_dump()
    assert config["out"] == "runs/sweep/trial7"
    for name, value in args.items():
        node: Any = config
        for part in name.split("."):
            node = node[part]
        assert node == value["value"], name


def test_the_metric_is_one_that_a_run_logs(tmp_path: Path) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    tokens = make_tokens(tmp_path / "tokens")
    config = parse(TrainPriorConfig, [f"tokens={tokens}", f"out={tmp_path}/run"], verb="", description=None)
    task = PriorTask(config)
    figures = {f"{task.watched}/{name}" for name in task.evaluate(task.model, task.watched)}
    assert sweep["metric"] == {"name": "validation/bits_per_token", "goal": "minimize"}
    assert sweep["metric"]["name"] in figures
