"""What file systems say and cannot, and calls that not every one has."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
LONGEST = 255  # bytes of a name
NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""What a file system says of a call that it does not have."""
SWAP, NEW = 2, 1  # flags of renameat2: RENAME_EXCHANGE, RENAME_NOREPLACE
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
    if code in NOT_KNOWN:
        return None
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    raise OSError(code, os.strerror(code), str(other))
