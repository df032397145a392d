"""The system's errors of a full disk, and a call that not every file system has."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from tokenizer.files import UNSUPPORTED

FULL = (errno.ENOSPC, errno.EDQUOT)
NEW = 1  # flag of renameat2: RENAME_NOREPLACE
HERE = -100  # AT_FDCWD


def renameat2(one: Path, other: Path, flags: int) -> bool | None:
    """Whether the rename was done; None if the system or its file system has no such call. Raises `OSError`."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(other), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return None
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    raise OSError(code, os.strerror(code), str(other))
