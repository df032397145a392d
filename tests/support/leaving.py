"""How a process of a pair ends: at once, for gloo's threads now and then abort an interpreter that ends by itself."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave_group() -> NoReturn:
    """Leave the process group, and end this process with success: everything it was to write is written."""
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
