"""Download the archives of data sets, and say where those are that need a login or a form.

A download that was interrupted is continued by the next one. Its content so far is in the file
`.NAME.part` next to the archive, and `.NAME.part.json` holds what the server said about the file:
its length, and the tag or date of this version. The server sends the rest only if its file is
still this version (the headers Range and If-Range); otherwise it sends all of it again. The archive
gets its name when its length and, where it is known, its checksum are verified.
"""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.command_line import recovery_advice
from engine.tables import write_json
from imaging import atomic_files
from imaging.files import read_json

SECONDS = 30  # without an answer of the server
BLOCK = 2**20  # bytes that are read and written at once

# --- where data sets are --------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file with a direct link."""

    url: str
    size: int | None = None  # bytes; None: not known to us
    sha256: str | None = None  # None: not known to us, and not checked

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """The site of a data set."""

    title: str
    page: str  # where to go; also for source.json and README.txt
    asks: str  # what the site asks for
    files: tuple[File, ...] = ()  # direct links, if there are any
    licence: str = "see the site"  # of the images


KAGGLE = "https://www.kaggle.com/datasets"
STANFORD = "https://stanfordaimi.azurewebsites.net/datasets"
PRANET = Source(
    "PraNet's test data",
    "https://github.com/DengPingFan/PraNet, section 3.1.2 of its README",
    "follow the link to TestDataset.zip",
)
ISIC_2016 = "https://isic-challenge-data.s3.amazonaws.com/2016/ISBI2016_ISIC_Part1"
SOURCES = {
    "kvasir_polyp": Source(
        "Kvasir-SEG",
        "https://datasets.simula.no/kvasir-seg",
        "nothing",
        (File("https://datasets.simula.no/downloads/kvasir-seg.zip"),),
        "research and education, see the site",
    ),
    "isic": Source(
        "ISIC 2016, part 1",
        "https://challenge.isic-archive.com/data",
        "nothing",
        (
            File(f"{ISIC_2016}_Training_Data.zip"),
            File(f"{ISIC_2016}_Training_GroundTruth.zip"),
            File(f"{ISIC_2016}_Test_Data.zip"),
            File(f"{ISIC_2016}_Test_GroundTruth.zip"),
        ),
    ),
    "bkai_polyp": Source("BKAI", f"{KAGGLE}/magiccard/bkai-igh", "log in to Kaggle"),
    "clinicdb_polyp": Source("CVC-ClinicDB", f"{KAGGLE}/balraj98/cvcclinicdb", "log in to Kaggle"),
    "busi": Source(
        "BUSI", f"{KAGGLE}/aryashah2k/breast-ultrasound-images-dataset", "log in to Kaggle"
    ),
    "cvc300_polyp": PRANET,
    "colondb_polyp": PRANET,
    "etis_polyp": PRANET,
    "dfu": Source(
        "DFU 2022",
        "https://dfu-challenge.github.io/dfuc2022.html",
        "send in a form",
        licence="by the form",
    ),
    "camus": Source(
        "CAMUS",
        "https://humanheart-project.creatis.insa-lyon.fr/database",
        "log in",
        licence="see the site; research only",
    ),
    "chexlocalize": Source(
        "CheXlocalize",
        f"{STANFORD}/23c56a0d-15de-405b-87c8-99c30138950c",
        "register",
        licence="Stanford University School of Medicine CheXlocalize Dataset Research Use "
        "Agreement",
    ),
}


def where_to_get(name: str) -> str:
    """Return in one line where the archives of a data set are, and what the site asks for.

    name: of a folder in data/, such as "busi". Raises ValueError if it is not in SOURCES.
    """
    if name not in SOURCES:
        raise ValueError(f"{name}: source unknown, only those of {', '.join(SOURCES)}")
    source = SOURCES[name]
    if source.files:
        names = ", ".join(file.name for file in source.files)
        return f"{source.title} is at {source.page}; --download fetches {names}"
    return f"{source.title} is at {source.page}: {source.asks}, download it and name it with --raw"


def raw_or_download(args: Namespace, name: str) -> list[Path]:
    """Return the archives of a data set: those of --raw, or downloaded ones.

    args: with `raw`, a list of paths or None, and for data sets with direct links `download`, a
    folder or None. Raises ValueError, one line, if both or none is given; otherwise as `download`.
    """
    folder = getattr(args, "download", None)  # commands without direct links lack the option
    if args.raw and folder:
        raise ValueError("--raw and --download: give one of the two")
    if args.raw:
        return args.raw
    if not folder:
        raise ValueError(f"--raw is missing: {where_to_get(name)}")

    source = SOURCES[name]
    print(f"{source.title}, from {source.page}, licence: {source.licence}")
    paths = []
    for file in source.files:
        path = Path(folder) / name / file.name
        download(file.url, path, file.size, file.sha256)
        paths.append(path)
    return paths


def add_option(add) -> None:
    """Add --download to a command. add: the function that adds its options."""
    help = "download the archives to FOLDER (default: downloads); a stopped download is continued"
    add("--download", type=Path, nargs="?", const="downloads", metavar="FOLDER", help=help)


# --- one file -------------------------------------------------------------------------------------


def download(url: str, target: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download a file, or continue a download of it; does nothing if the file exists.

    size: in bytes. sha256: in hexadecimal digits. Prints what is downloaded and how large it is.
    Raises OSError if the connection or the disk fails, ValueError if the file is not the expected
    one or if another process is downloading it; one line each.
    """
    target = Path(target)
    with atomic_files.locked(target.with_name(f".{target.name}.lock"), target.parent):
        if target.is_file():
            verify(target, target, size, sha256)
            print(f"{target}: exists already, not downloaded again")
            return

        part = Part(target)
        advice = "run the same command again to continue the download"
        with recovery_advice(lambda: advice), atomic_files.full_disk_errors(target):
            receive(url, part, size)
            try:
                verify(part.path, target, size or part.size, sha256)
            except ValueError:
                part.remove()  # continuing would not repair it
                raise
            os.replace(part.path, target)
            part.remove()
    checked = "its checksum is right" if sha256 else "its checksum is not known and not checked"
    print(f"{target}: {target.stat().st_size:,} bytes; {checked}")


class Part:
    """The part of a file that is on the disk, and what its server said about the whole file."""

    def __init__(self, target: Path):
        """Read what an earlier download of `target` left."""
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self.about = target.with_name(f".{target.name}.part.json")
        self.size = None  # of the whole file, in bytes
        self.version = None  # tag or date of the file on the server
        if self.path.is_file() and self.about.is_file():
            content = read_json(self.about)  # written by `start`
            self.size = content.get("size")
            self.version = content.get("version")

    def length(self) -> int:
        """Return how many bytes can be continued; 0 if the version or the size is unknown."""
        if self.version is None or self.size is None:
            return 0
        length = self.path.stat().st_size
        return length if length <= self.size else 0

    def start(self, size: int | None, version: str | None) -> None:
        """Store what the server says about the file, before its first byte."""
        self.remove()
        self.size = size
        self.version = version
        write_json(self.about, {"size": size, "version": version})

    def remove(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def receive(url: str, part: Part, size: int | None) -> None:
    """Download all bytes of a file that are not on the disk yet.

    size: that the file must have, in bytes. Raises OSError or ValueError as `download` does.
    """
    start = part.length()
    if start and start == part.size:
        return

    with request(url, start, part) as response:
        continues = start > 0 and response.status == 206
        if continues and range_start(response) != start:
            part.remove()
            raise OSError(f"{url}: the server sent another part; run the same command again")
        if not continues:
            start = 0
            part.start(length_of(response), version_of(response))
        if size and part.size and part.size != size:
            part.remove()
            raise ValueError(f"{url}: has {part.size:,} bytes, expected {size:,}; it was replaced")

        total = f"{part.size:,} bytes" if part.size else "length unknown"
        continued = f", continued at {start:,}" if start else ""
        print(f"downloading {url} to {part.target} ({total}{continued})", flush=True)
        write_blocks(url, response, part, start)


def request(url: str, start: int, part: Part):
    """Return the server's response to a request for a file from byte `start` on.

    Raises OSError, one line, if there is no such file or no connection.
    """
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": part.version}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=SECONDS
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the server's file is shorter now
            part.remove()
        raise OSError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"{url}: no connection ({reason}); try again later") from None

    if response.headers.get_content_type() == "text/html":
        response.close()
        raise OSError(f"{url}: the server sends a web page instead of the file; open it yourself")
    return response


def length_of(response) -> int | None:
    """Return the length of a whole file in bytes, None if the server does not say it."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def version_of(response) -> str | None:
    """Return a tag or date that changes whenever the file does, None if the server has none.

    Weak tags, which start with W/, do not promise the same bytes.
    """
    tag = response.headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified")


def range_start(response) -> int | None:
    """Return the first byte of a partial response, None if it does not say that."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def write_blocks(url: str, response, part: Part, start: int) -> None:
    """Append the bytes of a response to the part on the disk, with a progress bar."""
    bar = tqdm(
        total=part.size, initial=start, desc=part.target.name, unit="B", unit_scale=True,
        disable=None, leave=False,
    )  # fmt: skip
    with bar, open(part.path, "ab") as file:
        for block in blocks(url, response):
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())

    length = part.path.stat().st_size
    if part.size and length < part.size:
        raise OSError(
            f"{url}: the connection broke after {length:,} of {part.size:,} bytes; run the same "
            "command again to continue"
        )


def blocks(url: str, response) -> Iterator[bytes]:
    """Yield the bytes of a response. Raises OSError, one line, if the connection breaks."""
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(
                f"{url}: the connection broke ({error}); run the same command again to continue"
            ) from None
        if not block:
            return
        yield block


def verify(path: Path, target: Path, size: int | None, sha256: str | None) -> None:
    """Raise ValueError, one line, if a file has another length or checksum than expected."""
    length = path.stat().st_size
    if size is not None and length != size:
        raise ValueError(
            f"{target}: has {length:,} bytes, expected {size:,}; remove it and download it again"
        )
    if sha256 is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{target}: has the SHA-256 {digest.hexdigest()}, expected {sha256}; remove it and "
            "download it again"
        )
