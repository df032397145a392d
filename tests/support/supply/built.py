"""The wheel and the source archive of a commit: the same bytes, wherever, whenever and by whom they are built.

    python tests/support/supply/built.py FOLDER

What is built is what git has at HEAD, not what lies around; files get the time of the commit and the usual permissions,
and no owner. The same setuptools is taken for granted: it writes its version into the wheel.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
BUILD = "import setuptools.build_meta as build; build.build_wheel({0!r}); build.build_sdist({0!r})"
UMASK = 0o022


def git(root: Path, *arguments: str) -> bytes:
    """What git prints about a checkout."""
    return subprocess.check_output(["git", "-C", str(root), *arguments])


def even(member: tarfile.TarInfo, time: int) -> tarfile.TarInfo:
    """A file of an archive without what differs from one machine to the next."""
    runs = member.isdir() or member.mode & 0o100
    member.mtime, member.mode = time, 0o755 if runs else 0o644
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def write_evenly(path: Path, time: int) -> None:
    """Write a .tar.gz again: sorted, and without times, owners and permissions of this machine."""
    with tarfile.open(path) as old:
        members = sorted(old.getmembers(), key=lambda member: member.name)
        held = [(member, old.extractfile(member) if member.isfile() else None) for member in members]
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as new:
            for member, file in held:
                member.pax_headers = {}  # where setuptools keeps parts of a second
                new.addfile(even(member, time), file)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, time) as packed:
        packed.write(raw.getvalue())


def build(folder: Path, root: Path = ROOT) -> list[Path]:
    """Build the commit that is checked out at `root` into the new folder `folder`; returns the wheel and the archive.
    Raises `CalledProcessError` where git or setuptools does."""
    time = int(git(root, "log", "-1", "--format=%ct", "HEAD"))
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as source:
        with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "--format=tar", "HEAD"))) as archive:
            members = [even(member, time) for member in archive.getmembers()]
            archive.extractall(source, members, filter="fully_trusted")  # or the umask would have its say
        command = [sys.executable, "-c", BUILD.format(str(folder.resolve()))]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(time)}
        subprocess.run(command, cwd=source, env=environment, umask=UMASK, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (archive_path,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    write_evenly(archive_path, time)
    return [wheel, archive_path]


if __name__ == "__main__":
    print(*build(Path(sys.argv[1])), sep="\n")
