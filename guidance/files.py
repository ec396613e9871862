"""Files that are there whole or not at all, and locks that end with the process that holds them."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for; files do not mind


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the process is killed or the disk is full.

    A temporary file beside it is written, brought to the disk and renamed. A symbolic link of the file's name is
    replaced, not followed. `sync_folder` brings the new name to the disk.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a process that was killed
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
        try:
            write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_all(handle: int, data: bytes) -> None:
    """Write all of it; the system may take less at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_plain(path: Path, flags: int) -> int:
    """A file of one's own, opened as by `os.open`.

    Raises:
        OSError: it is not there, or it is a symbolic link or no file.
    """
    handle = os.open(path, flags | _PLAIN | _AT_ONCE, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode) or path.is_symlink():  # the latter where O_NOFOLLOW is not known
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a file", str(path))
    return handle


def read_plain(path: Path, limit: int) -> bytes:
    """All of such a file.

    Raises:
        OSError: as `open_plain`; or it is larger than `limit` bytes, so that it is none of one's own.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"Larger than the {limit} bytes that it can have", str(path))
    return content


def real_folder(folder: Path, make: bool = False) -> bool:
    """Whether a folder is there, and made where it is not and `make` is set.

    Raises:
        OSError: in its place is a file or a symbolic link, which might lead elsewhere.
    """
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        if make:
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        return make
    if not stat.S_ISDIR(mode):
        what = "symbolic link, which is not followed" if stat.S_ISLNK(mode) else "file"
        raise NotADirectoryError(f"'{folder}' should be a folder of this run, and it is a {what}")
    return True


class Locks:
    """Locks on numbered places of a file. The system lets them go when the process that holds them ends, however it
    ends. They hold between machines where the disk's file system has such locks, as NFS 4 does.

    Args:
        path: the file; it stays empty.

    Raises:
        OSError: it cannot be opened, or it is a file of others, which is not empty.
    """

    several = fcntl is not None
    """Whether they keep processes apart here; where not, each is given at once."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open_plain(path, os.O_RDWR | os.O_CREAT)
        if os.fstat(self._file).st_size:  # it would be taken away in the end
            os.close(self._file)
            raise FileExistsError(errno.EEXIST, "Not a file of locks, which is empty", str(path))

    @property
    def current(self) -> bool:
        """Whether the file still lies at its path."""
        try:
            here, there = os.fstat(self._file), os.lstat(self.path)
        except FileNotFoundError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def take(self, place: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Take a lock, exclusive or shared, or turn the one that is held into the other; False where another process
        has it, unless it is waited for."""
        if fcntl is None:
            return True
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._file, how, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(f"the disk of '{self.path.parent}' has no file locks") from error
            raise
        return True

    def free(self, place: int) -> None:
        """Let a lock go."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        """Let all locks go."""
        os.close(self._file)
