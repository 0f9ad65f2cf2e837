"""Write files completely or not at all, lock folders, remove leftovers, compute checksums."""

import errno
import os
import re
import secrets
import shutil
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --- locks ---------------------------------------------------------------------------------------

LOCK_DESCRIPTORS = set()  # locks that this process holds
MOST_FAILURES = 100  # to create a file in a folder that is there


def close_locks_in_child() -> None:
    """Close inherited locks: a data-loading process must not keep the lock of a killed parent."""
    for descriptor in LOCK_DESCRIPTORS:
        os.close(descriptor)
    LOCK_DESCRIPTORS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_locks_in_child)


def open_locked(path: Path) -> int | None:
    """Open and lock a file, which is created if missing, and return its descriptor for `release`.

    Returns None if the system or the file system has no locks. Raises BlockingIOError if another
    process holds the lock, FileNotFoundError where no file can be created, such as in /proc.
    """
    if fcntl is None:
        return None

    failures = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the last holder has removed its empty folder
            failures += 1
            if failures == MOST_FAILURES:
                raise
            continue

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(error.errno, "locked", str(path)) from None
            return None

        # The last holder may have removed the file between our open and our lock. A lock on a
        # removed file keeps nobody out, so try again with the file that now has the name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                LOCK_DESCRIPTORS.add(descriptor)
                return descriptor
        os.close(descriptor)


def release(descriptor: int | None) -> None:
    """Release a lock of `open_locked`."""
    if descriptor is not None:
        LOCK_DESCRIPTORS.discard(descriptor)
        os.close(descriptor)


# --- atomic files ---------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, keep_ending: bool = False):
    """Yield a temporary file name next to `path`; at the end of the block the file replaces `path`.

    `path` is always the complete old file or the complete new one, even if the process is killed.
    The temporary file stays locked meanwhile, so that `remove_leftovers` spares it. keep_ending:
    for writers that choose the format by the ending. Raises OSError with errno ENOSPC if the disk
    is full, whatever error a library raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # containers share process numbers
    part = path.with_name(f".{token}.{path.name}" if keep_ending else f".{path.name}.{token}")
    with full_disk_errors(path):
        descriptor = open_part(part)
        try:
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
            release(descriptor)


def open_part(part: Path) -> int | None:
    """Open and lock a new temporary file; see `open_locked`."""
    while True:
        with suppress(BlockingIOError):  # `remove_if_free` locked it before we did
            return open_locked(part)


# Messages about a full disk of libraries that lose the error number: safetensors, torch.save (when
# it writes, and when it then closes the file), numpy.
FULL_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|PytorchStreamWriter failed"
    r"|unexpected pos \d+ vs \d+|\d+ requested and \d+ written"
)
FULL_DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full_disk(error: BaseException | None) -> bool:
    """Return True if an error or one of its causes means that nothing more can be written.

    That is a full disk, a quota or a limit on the size of files.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK_NUMBERS:
            return True
        if isinstance(error, Exception) and FULL_DISK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def full_disk_errors(path: Path):
    """Turn every error about a full disk into an OSError (ENOSPC) that names `path`."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            number = getattr(error, "errno", None) or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


# --- leftovers -----------------------------------------------------------------------------------

ENDING = r"\.(?:before|bin|crc|csv|gz|html|json|md|nii|npy|npz|png|pt|safetensors|txt)"
TEMPORARY = re.compile(rf"\.[^.].*{ENDING}\.[0-9a-f]{{8}}|\.[0-9a-f]{{8}}\.[^.].*{ENDING}")
DAY = 24 * 60 * 60  # seconds


def remove_leftovers(folder: Path, recursive: bool = True) -> None:
    """Remove the temporary files that killed processes left in a folder and its sub-folders.

    Only files with a name of `atomic_write` are removed, and only if their lock is free, so that
    nobody is writing them. On a file system without locks they must be a day old. Links and hidden
    folders are not followed. Files that cannot be removed stay.
    """
    with suppress(OSError):  # the folder is missing or cannot be listed
        for item in os.scandir(folder):
            if item.is_dir(follow_symlinks=False):
                if recursive and not item.name.startswith("."):
                    remove_leftovers(Path(item.path))
            elif item.is_file(follow_symlinks=False) and TEMPORARY.fullmatch(item.name):
                with suppress(OSError):
                    remove_if_free(Path(item.path))


def remove_if_free(part: Path) -> None:
    """Remove a temporary file unless a process is writing it. Raises OSError if that fails.

    This is BlockingIOError if a process holds the lock of the file.
    """
    age = time.time() - part.stat().st_mtime
    descriptor = open_locked(part)
    if descriptor is not None or age > DAY:
        part.unlink(missing_ok=True)
    release(descriptor)


# --- checksums -----------------------------------------------------------------------------------


def checksums(paths) -> bytes:
    """Return a line with CRC-32 and name for each file, about a second per GB."""
    lines = []
    for path in paths:
        crc = 0
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                crc = zlib.crc32(block, crc)
        lines.append(f"{crc:08x}  {path.name}\n")
    return "".join(lines).encode()


def is_intact(paths, listed: Path) -> bool:
    """Return True if the files match their checksums in the file `listed`.

    False if one of them is missing, or if they are of an older version without checksums.
    """
    if not all(path.is_file() for path in (*paths, listed)):
        return False
    return listed.read_bytes() == checksums(paths)


# --- atomic folders -------------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    """Raise ValueError if an output already exists, or cannot because it lies below a file."""
    if out.exists() or out.is_symlink():  # a link to nothing is in the way, too
        raise ValueError(f"{out}: exists already; choose another --out, or remove it")
    if any(path.exists() and not path.is_dir() for path in out.parents):
        raise ValueError(f"{out}: lies below a file; choose another --out")


@contextmanager
def atomic_folder(out: Path):
    """Yield the name of a temporary folder next to `out`, which becomes `out` if there is no error.

    Raises ValueError if `out` has content, or if another process is writing it.
    """
    with temporary_folder(out, out) as part:
        if out.exists() and any(out.iterdir()):  # written since the program checked
            refuse_existing(out)
        with full_disk_errors(out):
            yield part
        os.replace(part, out)


@contextmanager
def temporary_folder(out: Path, folder: Path):
    """Yield the name of a temporary folder next to `out`, which is removed at the end of the block.

    Only one process at a time gets it. folder: the folder that an error names. Raises ValueError if
    another process has it.
    """
    with locked(out.with_name(f".{out.name}.lock"), folder) as is_locked:
        # Without locks two processes may get this far, and each needs a name of its own.
        ending = "part" if is_locked else secrets.token_hex(4)
        part = out.with_name(f".{out.name}.{ending}")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


# --- one process per folder -----------------------------------------------------------------------


@contextmanager
def claim_folder(folder: Path):
    """Keep all other processes out of an output folder while this one works in it.

    The folder is created if missing, and removed again if nothing was written to it. Temporary
    files that killed processes left in it are removed. Raises ValueError if another process has
    claimed the folder, if this is one of several processes, or if a file has this name.
    """
    refuse_several_processes()
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"{folder}: is a file, or lies below one; choose another --out")
    with locked(folder / ".lock", folder):
        remove_leftovers(folder)
        yield


@contextmanager
def locked(path: Path, folder: Path):
    """Hold an operating-system lock on the file `path`, so that only one process writes `folder`.

    The system releases the lock when the process ends, even after kill -9, so that a leftover file
    locks nothing. Missing folders around `path` are created, and removed again if they stay empty.
    Yields True; or, after printing a warning, False if the file system has no locks. Raises
    ValueError if another process holds the lock, OSError, one line, if the folder is read-only.
    """
    missing = [parent for parent in path.parents if not parent.exists()]  # the innermost first
    try:
        descriptor = open_locked(path)
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another process is writing to this folder; wait until it ends, or choose "
            "another --out"
        ) from None
    except OSError as error:
        if is_full_disk(error):
            raise
        raise OSError(
            f"{folder}: cannot be written to ({error.strerror}); choose another --out"
        ) from None

    if descriptor is None:
        path.unlink(missing_ok=True)
        print(f"{folder}: the file system has no locks; start no second process on this folder")
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock is released, see `open_locked`
            release(descriptor)
        for parent in missing:
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def refuse_several_processes() -> None:
    """Raise ValueError if torchrun or a similar launcher started this as one of several."""
    size = os.environ.get("WORLD_SIZE", "")
    has_rank = "RANK" in os.environ or "LOCAL_RANK" in os.environ
    if has_rank and size.isdecimal() and int(size) > 1:
        raise ValueError(
            f"WORLD_SIZE is {size}: several processes are not supported yet; start a single one, "
            "without torchrun"
        )
