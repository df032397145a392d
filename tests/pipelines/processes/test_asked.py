"""Files of `accelerate config` work unchanged, and unsupported options are refused before images are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import write_basic_config
from accelerate.utils.dataclasses import DistributedType
from launch import free_port, metrics, output_of, start, tokenizer_arguments, train_tokenizer

from pipelines.config import UserError
from pipelines.images import loading
from pipelines.processes.launch import REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_of_accelerate_config_works_unchanged(tmp_path: Path, processes: int) -> None:
    """The basic file of this machine, and one for two GPUs, whose processes share the CPU here."""
    path = tmp_path / "home" / "accelerate" / "default_config.yaml"
    if processes == 1:
        write_basic_config(save_location=str(path))
    else:
        path.parent.mkdir(parents=True)
        ClusterConfig(
            compute_environment="LOCAL_MACHINE",
            distributed_type=DistributedType.MULTI_GPU,
            mixed_precision="no",
            use_cpu=False,
            debug=False,
            num_processes=2,
            gpu_ids="all",
            same_network=True,
        ).to_yaml_file(str(path))
    argv = tokenizer_arguments(tmp_path / "run", train__steps=2, data__limit=24)
    command = ["accelerate", "launch", "--main_process_port", str(free_port()), "-m", "pipelines.train_tokenizer"]
    assert f"{processes} process" in output_of(start([*command, *argv], HF_HOME=str(tmp_path / "home")))
    assert metrics(tmp_path / "run")[-1]["step"] == 2


# Refusals


@pytest.mark.parametrize("variable", REFUSED)
def test_unsupported_options_are_refused_before_images_are_read(variable: str, tmp_path: Path, monkeypatch) -> None:
    def read(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(loading, "open_digits", read)
    with pytest.raises(UserError, match="--use_fsdp --fsdp_version 2"):
        train_tokenizer(tmp_path / "run")
    assert not (tmp_path / "run").exists()
