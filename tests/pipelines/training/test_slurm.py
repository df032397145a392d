"""The Slurm script of docs/scaling.md, with shell stubs for `srun` and `scontrol`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from launch import end, environment, free_port, metrics, output_of, prior_arguments, start

ROOT = Path(__file__).parents[3]
TWO_NODES = ROOT / "configs" / "accelerate" / "two_nodes.yaml"
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\nnode-2\\n'\n"


def script() -> str:
    """The batch script on the page."""
    (found,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL
    )
    return found


@pytest.mark.slow
def test_the_script_trains_on_two_nodes(tokens, tmp_path):
    """Both launchers run on this machine, with one CPU process each."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = yaml.safe_load(TWO_NODES.read_text())
    settings |= {"num_processes": 2, "main_process_port": free_port(), "mixed_precision": "no"}
    (tmp_path / "two_nodes.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    verb = " ".join(f"'{part}'" for part in prior_arguments(run, tokens, train__steps=4)).replace("'", '"\'"')
    text = script().replace("configs/accelerate/two_nodes.yaml", str(tmp_path / "two_nodes.yaml"))
    text = text.replace("--config configs/prior/gpt_imagenet256.yaml", verb)
    (tmp_path / "job.sh").write_text(text)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{environment()['PATH']}"
    process = start(
        ["bash", str(tmp_path / "job.sh")], PATH=path, SLURM_JOB_NODELIST="node-[1-2]", ACCELERATE_USE_CPU="true"
    )
    try:
        printed = output_of(process, 120)
    finally:
        end(process)
    assert "2 processes on cpu" in printed
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4]
    assert (run / "pipeline" / "model_index.json").is_file()
