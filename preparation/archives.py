"""Read downloads as each site gives them: a zip or tar archive, or the folder that was unpacked.

All are used alike: a list of members and their bytes. Nothing is unpacked to the disk but what a
caller writes with `Archive.extract`. An archive that could do harm, or that is not whole, is
refused in one line: names that leave the folder, links out of it, names that occur twice, encrypted
members, and members that are absurdly large for the bytes that hold them.
"""

import bz2
import errno
import functools
import gzip
import lzma
import posixpath
import shutil
import stat
import tarfile
import zipfile
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from imaging import atomic_files, layouts

# Image data shrinks little, and text about tenfold. A member or an archive that grows more than
# this is refused if it is also large: a few empty masks may shrink a thousandfold.
MOST_GROWTH = 200
LARGE = 2**30  # bytes

NOT_ARCHIVES = (  # first bytes, what they are, what to do
    (b"", "an empty file", "download it again"),
    (b"<", "a web page", "the site wants a login or a click first; download it in a browser"),
    (b"Rar!", "a RAR archive", "unpack it and give the folder"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it and give the folder"),
    (b"version https://git-lfs", "a Git LFS pointer", "run git lfs pull in its folder"),
    (b"%PDF", "a PDF file", "give the archive with the images"),
)
DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError,
    NotImplementedError, RuntimeError, UnicodeDecodeError,
)  # fmt: skip


PACKED = (".zip", ".tar", ".tgz", ".tar.gz")


class Archive:
    """The members of a zip or tar archive, or the files of a folder. Close it after use.

    path: of the archive or folder. names: of the members, POSIX paths in the order in which they
    are stored (of a folder: sorted); without folders, hidden files and `__MACOSX`. Reading members
    in this order is fast for every kind of archive; a compressed tar starts anew for each member
    that lies behind the one read before.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.sizes = {}  # name -> bytes
        self._total = 0
        try:
            self._open_files()
        except BaseException:
            self.close()
            raise
        self.names = list(self.sizes)
        self._positions = {name: number for number, name in enumerate(self.names)}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    # Each kind of archive defines these.

    def _open_files(self) -> None:
        """List the members with `_add`."""
        raise NotImplementedError

    def _open_member(self, name: str) -> BinaryIO:
        """Open a member for reading."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files that are open."""

    # The same for all kinds.

    def _add(self, stored_name: str, size: int, packed: int | None = None) -> str | None:
        """List a member and return its name, or None if it is skipped.

        size: in bytes. packed: bytes of the file that hold it, if the archive says. Raises
        ValueError for a member that is refused.
        """
        name = self._checked_name(stored_name)
        self._total += size
        if packed is not None:
            self._refuse_growth(f"the member {name}", size, packed)
        self._refuse_growth("the content", self._total, self.path.stat().st_size)

        parts = PurePosixPath(name).parts
        is_system = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if is_system or parts[-1].lower() in layouts.SYSTEM_FILES:
            return None
        if name in self.sizes:
            raise ValueError(f"{self.path}: holds {name} twice; download it again")
        self.sizes[name] = size
        return name

    def _checked_name(self, stored_name: str) -> str:
        """Return a stored name as a POSIX path without a leading "./". Raises ValueError."""
        name = stored_name.replace("\\", "/")
        if ".." in PurePosixPath(name).parts:
            raise ValueError(f"{self.path}: the member {name!r} leaves its folder; do not use it")
        try:
            layouts.check_name(name, "the member")
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return PurePosixPath(name).as_posix()

    def _refuse_growth(self, noun: str, size: int, packed: int) -> None:
        """Raise ValueError if `size` bytes are absurdly many for the `packed` ones."""
        if size > LARGE and size > MOST_GROWTH * max(1, packed):
            raise ValueError(
                f"{self.path}: {noun} would grow to {size / 2**30:,.0f} GiB from "
                f"{packed / 2**20:,.1f} MiB; this is no archive of images, do not use it"
            )

    @contextmanager
    def _one_line_errors(self, doing: str) -> Iterator[None]:
        """Turn the errors of libraries about damage into one line that names the archive."""
        try:
            yield
        except (*DAMAGE, OSError) as error:
            # bz2 raises a plain OSError; a damaged offset makes the system refuse a seek.
            is_plain = type(error) is OSError and error.errno in (None, errno.EINVAL)
            if not isinstance(error, DAMAGE) and not is_plain:
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.path}: {doing} failed, it is damaged or cut off ({reason}); download it "
                "again"
            ) from None

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a member for reading. Raises FileNotFoundError, or ValueError for damage."""
        if name not in self.sizes:
            raise FileNotFoundError(f"{self.path}: has no {name}; it holds {self.summary()}")
        with self._one_line_errors(f"reading {name}"), self._open_member(name) as file:
            yield file

    def read(self, name: str) -> bytes:
        """Return the bytes of a member."""
        with self.open(name) as file:
            content = file.read()
            if len(content) != self.sizes[name]:
                raise EOFError(f"{len(content)} of {self.sizes[name]} bytes")
        return content

    def extract(self, name: str, target: Path) -> None:
        """Write a member to the file `target`, whose folder must exist."""
        with self.open(name) as file, open(target, "wb") as out:
            shutil.copyfileobj(file, out, 2**20)
            if out.tell() != self.sizes[name]:
                raise EOFError(f"{out.tell()} of {self.sizes[name]} bytes")

    def position(self, name: str) -> int:
        """Return the place of a member in `names`, from 0: a key to sort by."""
        return self._positions[name]

    def files_in(self, folder: str) -> dict[str, str]:
        """Return {file name: member} of a folder without its sub-folders; "" for the root."""
        files = {}
        for name in self.names:
            parent, _, file_name = name.rpartition("/")
            if parent == folder:
                files[file_name] = name
        return files

    def folders(self) -> set[str]:
        """Return the paths of all folders that hold files, without the root."""
        folders = {name.rpartition("/")[0] for name in self.names}
        return folders - {""}

    def folders_named(self, tail: str) -> list[str]:
        """Return the folders whose paths end with the path `tail`, sorted.

        The tail "Kvasir-SEG/images" names the folder "download/Kvasir-SEG/images".
        """
        folders = []
        for folder in self.folders():
            if folder == tail or folder.endswith(f"/{tail}"):
                folders.append(folder)
        return sorted(folders)

    def folder(self, *tails: str) -> str:
        """Return the only folder that the first fitting tail names, see `find_folder`."""
        return find_folder([self], *tails)[1]

    def summary(self) -> str:
        """Return what is inside, for messages: "12 .jpg, 3 .csv in images, masks"."""
        if not self.names:
            return "nothing"
        counts = Counter(PurePosixPath(name).suffix.lower() or "other" for name in self.names)
        kinds = [f"{n} {kind}" for kind, n in counts.most_common(3)]
        tops = sorted({name.split("/")[0] for name in self.names if "/" in name})
        listed = ", ".join(tops[:4])
        if len(tops) > 4:
            listed += f" and {len(tops) - 4} more"
        return ", ".join(kinds) + (f" in {listed}" if tops else "")


class FolderArchive(Archive):
    """The files of a folder. Links to files and folders on the disk are followed."""

    def _open_files(self) -> None:
        for path in layouts.files_below(self.path, with_masks=True):
            if path.is_file():
                self.sizes[path.relative_to(self.path).as_posix()] = path.stat().st_size

    def _open_member(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")


class ZipArchive(Archive):
    """The members of a zip archive."""

    _zip = None

    def _open_files(self) -> None:
        self._members = {}
        with self._one_line_errors("listing its members"):
            self._zip = zipfile.ZipFile(self.path)
        for info in self._zip.infolist():
            if info.filename.endswith(("/", "\\")):  # a folder
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise ValueError(f"{self.path}: {info.filename} is a link; unpack it by hand")
            if info.flag_bits & 1:
                raise ValueError(
                    f"{self.path}: {info.filename} is encrypted; unpack it with the password and "
                    "give the folder"
                )
            name = self._add(info.filename, info.file_size, info.compress_size)
            if name is not None:
                self._members[name] = info

    def _open_member(self, name: str) -> BinaryIO:
        return self._zip.open(self._members[name])

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()


class TarArchive(Archive):
    """The members of a tar archive, plain or compressed with gzip, bzip2 or xz."""

    _tar = None

    def _open_files(self) -> None:
        self._members = {}
        links = []
        with self._one_line_errors("listing its members"):
            self._tar = tarfile.open(self.path)  # noqa: SIM115, `close` closes it
            for member in self._tar:
                if member.isdir():
                    continue
                if member.issym() or member.islnk():
                    links.append(member)
                elif not member.isfile():
                    raise ValueError(f"{self.path}: {member.name} is a device; do not use it")
                name = self._add(member.name, member.size)
                if name is not None:
                    self._members[name] = member
            self._read_to_end()
        for link in links:
            self._follow(link)

    def _read_to_end(self) -> None:
        """Raise EOFError if the archive lacks its end, and the errors of a damaged compression.

        tarfile takes a damaged or missing header for the end, which is a block of zeros.
        """
        file = self._tar.fileobj
        file.seek(self._tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError(f"no end behind {len(self.sizes)} files")
        while file.read(2**20):
            pass

    def _follow(self, link: tarfile.TarInfo) -> None:
        """Let a link stand for the file it leads to. Raises ValueError if it leads elsewhere."""
        name = PurePosixPath(link.name.replace("\\", "/")).as_posix()
        target = link.linkname
        if link.issym():
            target = (PurePosixPath(name).parent / target).as_posix()
        target = posixpath.normpath(target)
        member = self._members.get(target)
        if member is None or not member.isfile():
            raise ValueError(
                f"{self.path}: {name} is a link to {link.linkname}, which is no file in it; do not "
                "use it"
            )
        if name in self.sizes:
            self._members[name] = member
            self.sizes[name] = member.size

    def _open_member(self, name: str) -> BinaryIO:
        return self._tar.extractfile(self._members[name])

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()


COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}  # first bytes -> module


def open_archive(path: Path) -> Archive:
    """Open a zip or tar archive, or a folder, whatever its name.

    Raises FileNotFoundError, or ValueError for other files and for archives that are refused.
    """
    path = Path(path)
    if path.is_dir():
        return FolderArchive(path)
    if not path.exists():
        raise FileNotFoundError(f"{layouts.missing_file(path)}: no such archive or folder")
    if not path.is_file():
        raise ValueError(f"{path}: is not a file, but a pipe or a device")

    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(b"PK"):
        return ZipArchive(path)
    if is_tar(path, start):
        return TarArchive(path)

    for first_bytes, noun, hint in NOT_ARCHIVES:
        is_kind = start.lstrip().startswith(first_bytes) if first_bytes else not start
        if is_kind:
            raise ValueError(f"{path}: is {noun}, not a zip or tar archive; {hint}")
    raise ValueError(f"{path}: is neither a zip nor a tar archive, nor a folder; download it again")


def is_tar(path: Path, start: bytes) -> bool:
    """Return True if a file begins like a tar archive. start: its first 512 bytes."""
    for first_bytes, module in COMPRESSED.items():
        if start.startswith(first_bytes):
            try:
                with module.open(path) as file:
                    start = file.read(512)
            except (OSError, EOFError, zlib.error, lzma.LZMAError):
                return True  # `TarArchive` says that it is damaged
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


@contextmanager
def open_archives(paths: Iterable[Path]) -> Iterator[list[Archive]]:
    """Open several archives or folders, and close all of them at the end of the block."""
    opened = []
    try:
        for path in paths:
            opened.append(open_archive(path))
        yield opened
    finally:
        for archive in opened:
            archive.close()


def find_folder(opened: list[Archive], *tails: str) -> tuple[Archive, str]:
    """Return the archive and the path of the only folder that a tail names, the first that fits.

    With the tails "Kvasir-SEG/images" and "images" the download may be the folder Kvasir-SEG itself
    as well as one that holds it. Raises FileNotFoundError if no folder fits, ValueError if several
    do.
    """
    for tail in tails:
        fitting = []
        for archive in opened:
            fitting += [(archive, folder) for folder in archive.folders_named(tail)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            listed = ", ".join(folder for _, folder in fitting[:3])
            raise ValueError(
                f"{fitting[0][0].path}: holds {len(fitting)} folders {tail} ({listed}); give the "
                "folder that holds the right one"
            )

    raise FileNotFoundError(f"no folder {tails[0]}: {contents(opened)}")


def contents(opened: list[Archive]) -> str:
    """Return what archives hold, for messages about what they lack."""
    lines = []
    for archive in opened:
        line = f"{archive.path} holds {archive.summary()}"
        packed = [name for name in archive.names if name.lower().endswith(PACKED)]
        if packed:
            line += f" (give an archive like {packed[0]} itself)"
        lines.append(line)
    return "; ".join(lines)


# --- commands that read a folder ------------------------------------------------------------------


def add_download(add: Callable, help: str) -> None:
    """Add the argument DOWNLOAD of a command, which may also be written as --raw DOWNLOAD.

    add: the function that adds options. help: of the argument.
    """
    add("download", type=Path, nargs="?", metavar="DOWNLOAD", help=help)
    help = "the same as DOWNLOAD, written as in the commands of the prompted data sets"
    add("--raw", type=Path, metavar="DOWNLOAD", help=help)


def given_download(args: Namespace) -> Path:
    """Return DOWNLOAD of a command with `add_download`. Raises ValueError, one line."""
    if bool(args.download) == bool(args.raw):
        problem = "is given twice" if args.raw else "is missing"
        raise ValueError(f"DOWNLOAD {problem}: name the archive or its unpacked folder once")
    return args.download or args.raw


def takes_archives(run: Callable[[Namespace], int]) -> Callable[[Namespace], int]:
    """Let a command that reads the folder `args.download` take an archive as well.

    The command gets the folder in `args.download`, and what the user named in `args.raw`.
    """

    @functools.wraps(run)
    def run_unpacked(args: Namespace) -> int:
        atomic_files.refuse_existing(args.out)
        args.raw = given_download(args)
        with unpacked(args.raw, args.out) as folder:
            args.download = folder
            return run(args)

    return run_unpacked


@contextmanager
def unpacked(path: Path, out: Path) -> Iterator[Path]:
    """Yield a folder with the files of an archive; a folder is yielded as it is.

    An archive is unpacked next to `out`, and these files are removed at the end. If all of them lie
    in one folder, it is that folder. Errors about the files name the archive. Raises ValueError or
    OSError, one line.
    """
    if not path.is_file():
        yield path
        return

    folder = out.with_name(f".{out.name}.unpacked")
    with atomic_files.locked(folder.with_name(f"{folder.name}.lock"), out):
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
        try:
            with open_archive(path) as archive, atomic_files.full_disk_errors(out):
                for name in tqdm(
                    archive.names, f"unpacking {path.name}", disable=None, leave=False
                ):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    archive.extract(name, target)
            yield inner_folder(folder)
        except (ValueError, OSError) as error:
            if atomic_files.is_full_disk(error) or str(folder) not in str(error):
                raise
            message = str(error).replace(f"{folder}/", f"{path}: ").replace(str(folder), str(path))
            raise ValueError(message) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def inner_folder(folder: Path) -> Path:
    """Return the folder that holds everything: the folder itself, or the only one within it."""
    content = list(folder.iterdir())
    while len(content) == 1 and content[0].is_dir():
        folder = content[0]
        content = list(folder.iterdir())
    return folder
