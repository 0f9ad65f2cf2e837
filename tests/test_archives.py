"""Zip and tar archives and folders, read alike; archives that are refused, in one line."""

import io
import os
import stat
import tarfile
import zipfile

import pytest

from preparation import archives

FILES = {
    "Set/images/b 1.jpg": b"image b",
    "Set/images/a.jpg": b"image a" * 40_000,
    "Set/masks/ä.png": b"mask",
    "Set/readme.txt": b"",
}
SYSTEM = {
    "__MACOSX/Set/images/._a.jpg": b"x",
    "Set/.DS_Store": b"x",
    "Set/images/Thumbs.db": b"x",
}


def write_zip(path, files, **attributes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("Set") if hasattr(archive, "mkdir") else None
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


MAKERS = {
    "a.zip": write_zip,
    "a.tar": write_tar,
    "a.tar.gz": lambda path, files: write_tar(path, files, "w:gz"),
    "a.tar.xz": lambda path, files: write_tar(path, files, "w:xz"),
    "folder": write_folder,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_members_are_the_same_in_every_kind(kind, tmp_path):
    path = MAKERS[kind](tmp_path / kind, FILES | SYSTEM)
    with archives.open_archive(path) as archive:
        assert set(archive.names) == set(FILES)
        assert archive.sizes == {name: len(content) for name, content in FILES.items()}
        for name, content in reversed(FILES.items()):  # behind the one read before, too
            assert archive.read(name) == content
        for name in FILES:
            archive.extract(name, tmp_path / "extracted")
            assert (tmp_path / "extracted").read_bytes() == FILES[name]
        with archive.open("Set/images/a.jpg") as file:
            assert file.read(7) == b"image a"

        assert archive.folder("Set/images", "images") == "Set/images"
        assert archive.folder("Other/images", "masks") == "Set/masks"
        images = {"a.jpg": "Set/images/a.jpg", "b 1.jpg": "Set/images/b 1.jpg"}
        assert archive.files_in("Set/images") == images
        assert archive.files_in("") == {}
        assert archive.folders() == {"Set", "Set/images", "Set/masks"}
        assert archive.summary() == "2 .jpg, 1 .png, 1 .txt in Set" or kind == "folder"
        positions = [archive.position(name) for name in archive.names]
        assert positions == [0, 1, 2, 3]
        with pytest.raises(FileNotFoundError, match="^no folder labels: .* holds 2 .jpg, 1 .png"):
            archive.folder("labels")
        with pytest.raises(FileNotFoundError, match="has no Set/c.jpg; it holds 2 .jpg"):
            archive.read("Set/c.jpg")


def test_stored_order_is_that_of_the_archive(tmp_path):
    for kind in ("a.zip", "a.tar.gz"):
        with archives.open_archive(MAKERS[kind](tmp_path / kind, FILES)) as archive:
            assert archive.names == list(FILES)


def test_names_of_windows_and_with_a_leading_dot(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"./Set/a.png": b"a", "Set\\masks\\b.png": b"b"})
    with archives.open_archive(path) as archive:
        assert archive.names == ["Set/a.png", "Set/masks/b.png"]
        assert archive.read("Set/masks/b.png") == b"b"


def test_two_folders_that_fit(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"one/images/a": b"", "two/images/a": b""})
    with archives.open_archive(path) as archive:
        assert archive.folder("two/images", "images") == "two/images"
        with pytest.raises(ValueError, match="holds 2 folders images .one/images, two/images.; gi"):
            archive.folder("images")
    images = write_zip(tmp_path / "images.zip", {"images/a": b""})
    masks = write_zip(tmp_path / "masks.zip", {"masks/a": b""})
    with archives.open_archives([images, masks]) as opened:
        assert archives.find_folder(opened, "Set/masks", "masks") == (opened[1], "masks")
        with pytest.raises(FileNotFoundError, match="^no folder x: .*images.zip holds 1 other in"):
            archives.find_folder(opened, "x")
    write_folder(tmp_path / "folder", {"images.zip": b"", "a.txt": b""})
    message = "give an archive like images.zip itself"
    with (
        archives.open_archive(tmp_path / "folder") as archive,
        pytest.raises(FileNotFoundError, match=message),
    ):
        archive.folder("images")


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("name", ["../a.png", "Set/../../a.png", "/etc/a.png", "C:\\a.png", "x\ny"])
def test_names_that_leave_the_folder(kind, name, tmp_path):
    path = MAKERS[kind](tmp_path / kind, FILES | {name: b"x"})
    with pytest.raises(ValueError, match=f"{kind}: the member '.*' (leaves|is an abs|is not the)"):
        archives.open_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("Set/a.png", b"1")
        archive.writestr("./Set/a.png", b"2")
    with pytest.raises(ValueError, match=r"holds Set/a.png twice"):
        archives.open_archive(tmp_path / "a.zip")


def test_encrypted_members(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    content = bytearray(path.read_bytes())
    header = content.rindex(b"PK\x01\x02")
    content[header + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Set/readme.txt is encrypted; unpack it with the passw"):
        archives.open_archive(path)


def test_links_in_a_tar(tmp_path):
    def write(target, kind):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            info = tarfile.TarInfo("Set/a.png")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
            link = tarfile.TarInfo("Set/sub/link.png")
            link.type = kind
            link.linkname = target
            archive.addfile(link)
        return tmp_path / "a.tar"

    for target, kind in (("Set/a.png", tarfile.LNKTYPE), ("/etc/passwd", tarfile.SYMTYPE)):
        path = write(target, kind)
        if target.startswith("/"):
            with pytest.raises(ValueError, match="link.png is a link to /etc/passwd, which is no"):
                archives.open_archive(path)
        else:
            with archives.open_archive(path) as archive:
                assert archive.read("Set/sub/link.png") == b"abc"
    for target in ("../../../etc/passwd", "missing.png", "link.png"):
        with pytest.raises(ValueError, match=r"is a link to .*, which is no file in it"):
            archives.open_archive(write(target, tarfile.SYMTYPE))
    write("x", tarfile.FIFOTYPE)
    with pytest.raises(ValueError, match="is a device"):
        archives.open_archive(tmp_path / "a.tar")


def test_symbolic_links_in_a_tar_are_relative_to_their_folder(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("Set/sub/link.png")
        link.type = tarfile.SYMTYPE
        link.linkname = "../a.png"
        archive.addfile(link)
        info = tarfile.TarInfo("Set/a.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with archives.open_archive(tmp_path / "a.tar") as archive:
        assert archive.read("Set/sub/link.png") == b"abc"


def test_a_link_in_a_zip(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a": b"/etc"}, external_attr=stat.S_IFLNK << 16)
    with pytest.raises(ValueError, match=r"a.zip: a is a link"):
        archives.open_archive(path)


def test_bombs(tmp_path, monkeypatch):
    """Small stand-ins: the limit of what counts as large is lowered."""
    monkeypatch.setattr(archives, "LARGE", 2**20)
    zeros = {"a.png": bytes(2**21)}
    with pytest.raises(ValueError, match=r"a.zip: the member a.png would grow to 0 GiB from 0.0 M"):
        archives.open_archive(write_zip(tmp_path / "a.zip", zeros))
    with pytest.raises(ValueError, match=r"a.tar.gz: the content would grow to 0 GiB"):
        archives.open_archive(write_tar(tmp_path / "a.tar.gz", zeros, "w:gz"))
    many = {f"{n}.png": bytes(2**20) for n in range(4)}
    with pytest.raises(ValueError, match=r"a.zip: the content would grow to"):
        archives.open_archive(write_zip(tmp_path / "a.zip", many))

    path = write_zip(tmp_path / "b.zip", {"a.png": os.urandom(2**21), "empty.png": bytes(2**19)})
    with archives.open_archive(path) as archive:
        assert len(archive.read("a.png")) == 2**21


# 0.3: within the first file, 0.75 and 0.9: behind it, in headers or in the list at the end
@pytest.mark.parametrize("share", [0.3, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_archives_that_are_cut_off(kind, share, tmp_path):
    files = {f"{n}.png": os.urandom(3000) for n in range(4)}
    path = MAKERS[kind](tmp_path / kind, files)
    content = path.read_bytes()
    if kind == "a.tar":
        content = content.rstrip(b"\0") + bytes(512)
        whole = len(content) - 512
        content = content[: whole if share > 0.99 else round(share * whole)]
    else:
        content = content[: int(share * len(content))]
    path.write_bytes(content)
    message = f"{kind}: listing its members failed, it is damaged or cut off .*; download it again"
    with pytest.raises(ValueError, match=message):
        archives.open_archive(path)


def test_a_damaged_header_is_not_the_end(tmp_path):
    files = {f"{n}.png": os.urandom(600) for n in range(4)}
    path = write_tar(tmp_path / "a.tar", files)
    content = bytearray(path.read_bytes())
    content[content.index(b"2.png") + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut off .no end behind 2 files"):
        archives.open_archive(path)


def test_a_damaged_member_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:  # stored, not compressed
        archive.writestr("a.png", b"0123456789")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"0123456789", b"0123456780"))
    with archives.open_archive(tmp_path / "a.zip") as archive:
        for read in (archive.read, lambda name: archive.extract(name, tmp_path / "out")):
            with pytest.raises(ValueError, match=r"reading a.png failed, it is damaged or cut off"):
                read("a.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file, not a zip or tar"),
        (b"\n<!DOCTYPE html>", "is a web page, not a zip or tar archive; the site wants a login"),
        (b"Rar!\x1a\x07", "is a RAR archive"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"\x89PNG\r\n" + bytes(600), "is neither a zip nor a tar archive"),
        (b"\x1f\x8b" + bytes(8), "a.zip: listing its members failed, it is damaged"),
    ],
)
def test_files_that_are_no_archives(content, message, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        archives.open_archive(tmp_path / "a.zip")


def test_missing_archives_and_pipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.zip: no such archive or folder"):
        archives.open_archive(tmp_path / "a.zip")
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="is not a file, but a pipe"):
        archives.open_archive(tmp_path / "a.zip")


def test_links_in_a_folder_are_followed(tmp_path):
    write_folder(tmp_path / "disk", {"a.png": b"a"})
    (tmp_path / "download").mkdir()
    (tmp_path / "download/images").symlink_to(tmp_path / "disk")
    (tmp_path / "download/loop").symlink_to(tmp_path / "download")
    with archives.open_archive(tmp_path / "download") as archive:
        assert archive.names == ["images/a.png"]
        assert archive.read("images/a.png") == b"a"


def test_several_archives_are_closed_together(tmp_path):
    one = write_zip(tmp_path / "one.zip", FILES)
    two = write_tar(tmp_path / "two.tar", FILES)
    with archives.open_archives([one, two]) as opened:
        assert [archive.read("Set/images/b 1.jpg") for archive in opened] == [b"image b"] * 2
    with pytest.raises(ValueError, match="closed"):
        opened[0].read("Set/masks/ä.png")
    with (
        pytest.raises(FileNotFoundError, match="three.zip: no such"),
        archives.open_archives([one, tmp_path / "three.zip"]),
    ):
        pass


def test_damage_that_libraries_report_in_other_ways_is_one_line(tmp_path):
    """An empty name, a seek before the start, a broken bzip2 stream, errors of several lines."""
    path = write_zip(tmp_path / "a.zip", FILES)
    content = path.read_bytes()
    for mark, position, value in ((b"PK\1\2", 28, 0), (b"PK\5\6", 12, 127)):  # lengths
        damaged = bytearray(content)
        start = content.rfind(mark) + position
        damaged[start : start + 4] = bytes([value]) * 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.zip: "):
            archives.open_archive(path)

    path.write_bytes(content.replace("ä".encode(), b"\xfc\xfc"))
    with pytest.raises(ValueError, match="a.zip: "):
        archives.open_archive(path)

    path = write_tar(tmp_path / "a.tar", FILES, "w:bz2")
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.tar: listing its members failed.+") as raised:
        archives.open_archive(path)
    assert "\n" not in str(raised.value)
