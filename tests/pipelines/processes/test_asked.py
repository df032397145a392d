"""Files of `accelerate config` work unchanged, and unsupported options are refused before images are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import write_basic_config
from accelerate.utils.dataclasses import DistributedType
from launch import free_port, metrics, output_of, start, tokenizer_arguments, train_tokenizer

from pipelines.config import UserError
from pipelines.images import tables
from pipelines.processes.launch import REFUSED


def launched(home: Path, out: Path) -> str:
    """What a tiny run under `accelerate launch` prints, with the settings in `home` and no options."""
    argv = tokenizer_arguments(out, train__steps=2, data__limit=24)
    command = ["accelerate", "launch", "--main_process_port", str(free_port()), "-m", "pipelines.train_tokenizer"]
    return output_of(start([*command, *argv], HF_HOME=str(home)), seconds=200)


@pytest.mark.slow
def test_the_basic_file_of_this_machine_works_unchanged(tmp_path: Path) -> None:
    write_basic_config(save_location=str(tmp_path / "home" / "accelerate" / "default_config.yaml"))
    assert "1 process on" in launched(tmp_path / "home", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.slow
def test_the_file_for_several_gpus_works_unchanged(tmp_path: Path) -> None:
    """As `accelerate config` writes it for two GPUs; here two processes share the CPU."""
    path = tmp_path / "home" / "accelerate" / "default_config.yaml"
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
    assert "2 processes on" in launched(tmp_path / "home", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


# Refusals


@pytest.mark.parametrize("variable", REFUSED)
def test_unsupported_options_are_refused_before_images_are_read(variable: str, tmp_path: Path, monkeypatch) -> None:
    def read(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(tables, "digits", read)
    with pytest.raises(UserError, match="--use_fsdp --fsdp_version 2"):
        train_tokenizer(tmp_path / "run")
    assert not (tmp_path / "run").exists()
