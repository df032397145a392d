"""Shared by all tests: no network, no W&B server, one thread, one seed."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if os.environ.get("SMALTI_ROUNDING"):
    import other_rounding

    other_rounding.install()


@pytest.fixture
def shared_data() -> Path:
    """Real image sets, where they are at hand."""
    folder = Path(os.environ.get("SMALTI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real image sets are not here; set SMALTI_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global seed."""
    torch.manual_seed(0)
