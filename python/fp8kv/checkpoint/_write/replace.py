"""Atomic replacement of a folder: readers, or a crash, see either the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """An empty folder next to `destination`, which replaces it if the block ends without an exception.

    All files are flushed to disk first. If the system can exchange two folders (Linux; not all network file
    systems), `destination` is complete at any moment. Otherwise there is a gap between two renames; a crash
    at that point leaves the old folder under the temporary name with the suffix ".old".

    Args:
        destination: a folder, or a path that does not exist yet, but not a symbolic link. Missing parents are
            created.

    Raises:
        OSError: a file operation failed. The temporary folder is removed.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.with_name(f".{destination.name}.tmp-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
        if destination.exists():
            shutil.copymode(destination, folder)
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        _take_place(folder, destination)
        _sync(destination.parent)
    finally:
        # The failed folder, or the replaced one. An error here would hide whether the new folder is in place.
        shutil.rmtree(folder, ignore_errors=True)


def _take_place(folder: Path, destination: Path) -> None:
    """`destination` becomes `folder`, and `folder` what was there, if anything."""
    if not destination.exists() or not any(destination.iterdir()):
        os.rename(folder, destination)
    elif not _exchange(folder, destination):
        backup = folder.with_name(f"{folder.name}.old")
        os.rename(destination, backup)
        try:
            os.rename(folder, destination)
        except BaseException:
            os.rename(backup, destination)
            raise
        os.rename(backup, folder)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step; False if the system or the file system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
