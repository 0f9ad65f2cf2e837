"""Downloads from a server of the test: whole, continued, broken, changed."""

import errno
import hashlib
import re
import threading
import time
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from engine import command_line
from preparation import downloads

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """What the server does, and what it was asked for."""

    def __init__(self):
        self.content = CONTENT
        self.tag = '"first"'
        self.date = None
        self.has_ranges = True
        self.breaks_after = None  # bytes of the body
        self.says_length = True
        self.kind = "application/zip"
        self.status = None
        self.wrong_range = False
        self.pause = None  # an event that the server waits for, in the middle of the body
        self.ranges = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server.site
        site.ranges.append(self.headers.get("Range"))
        if site.status:
            self.send_error(site.status)
            return
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        is_weak = (condition or "").startswith("W/")  # such a condition never holds
        if asked and site.has_ranges and condition in (site.tag, site.date) and not is_weak:
            start = int(asked[1])
        self.answer(site, start)

    def answer(self, site, start):
        body = site.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", site.kind)
        if site.says_length:
            self.send_header("Content-Length", str(len(body)))
        if site.tag:
            self.send_header("ETag", site.tag)
        if site.date:
            self.send_header("Last-Modified", site.date)
        if start:
            first = start + 1 if site.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{len(body)}/{len(site.content)}")
        self.end_headers()
        if site.pause:
            self.wfile.write(body[:1000])
            site.pause.wait(20)
            body = body[1000:]
        self.wfile.write(body[: site.breaks_after])


@pytest.fixture
def site():
    """A server, and how to change what it does."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = site
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}/set.zip"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "downloads/set.zip"


def files_of(target):
    """The names of the files next to the target."""
    return sorted(path.name for path in target.parent.glob("*"))


def refused(error, *arguments):
    """The line with which a download fails."""
    with pytest.raises(error) as caught:
        downloads.download(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    assert command_line.describe_error(caught.value).startswith("error: ")
    return message


def break_after(site, target, count):
    """Start a download that breaks after this number of bytes."""
    site.breaks_after = count
    message = refused(OSError, site.url, target)
    assert f"broke after {count:,} of 3,000,000 bytes" in message
    assert files_of(target) == [".set.zip.part", ".set.zip.part.json"]
    site.breaks_after = None


def test_a_file_is_downloaded_once(site, target, capsys):
    downloads.download(site.url, target, len(CONTENT), SHA256)
    assert target.read_bytes() == CONTENT and files_of(target) == ["set.zip"]
    printed = capsys.readouterr().out
    assert f"downloading {site.url} to {target} (3,000,000 bytes)\n" in printed
    assert printed.endswith("3,000,000 bytes; its checksum is right\n")

    downloads.download(site.url, target, len(CONTENT), SHA256)
    assert site.ranges == [None]
    assert capsys.readouterr().out == f"{target}: exists already, not downloaded again\n"


def test_an_unknown_checksum_is_said(site, target, capsys):
    downloads.download(site.url, target)
    assert "its checksum is not known and not checked" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["tag", "date", "weak tag and date"])
def test_a_broken_download_is_continued(site, target, capsys, version):
    if version != "tag":
        site.tag = None if version == "date" else 'W/"first"'
        site.date = "Mon, 03 Mar 2025 10:00:00 GMT"
    break_after(site, target, 1_234_567)
    capsys.readouterr()
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges == [None, "bytes=1234567-"]
    assert target.read_bytes() == CONTENT and files_of(target) == ["set.zip"]
    assert "(3,000,000 bytes, continued at 1,234,567)" in capsys.readouterr().out


def test_a_download_may_break_several_times(site, target):
    site.breaks_after = 1_000_000
    for _ in range(2):
        refused(OSError, site.url, target)
    downloads.download(site.url, target)
    assert site.ranges == [None, "bytes=1000000-", "bytes=2000000-"]
    assert target.read_bytes() == CONTENT


def test_without_ranges_it_starts_again(site, target):
    site.has_ranges = False
    break_after(site, target, 1_234_567)
    downloads.download(site.url, target)
    assert site.ranges == [None, "bytes=1234567-"]
    assert target.read_bytes() == CONTENT


def test_without_a_version_it_starts_again(site, target):
    site.tag = None
    break_after(site, target, 1_234_567)
    downloads.download(site.url, target)
    assert site.ranges == [None, None]
    assert target.read_bytes() == CONTENT


def test_a_file_that_changed_is_not_mixed_with_the_old_one(site, target):
    break_after(site, target, 1_234_567)
    site.tag = '"second"'
    site.content = CONTENT[::-1][:2_500_000]
    downloads.download(site.url, target)
    assert target.read_bytes() == CONTENT[::-1][:2_500_000]


def test_a_part_that_was_complete_is_not_downloaded_again(site, target):
    break_after(site, target, 1_234_567)
    target.with_name(".set.zip.part").write_bytes(CONTENT)  # stopped before the rename
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges == [None] and files_of(target) == ["set.zip"]


def test_a_part_that_is_too_long_is_not_continued(site, target):
    break_after(site, target, 1_234_567)
    target.with_name(".set.zip.part").write_bytes(CONTENT + b"x")
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges == [None, None]


def test_a_part_without_its_description_is_not_continued(site, target):
    break_after(site, target, 1_234_567)
    target.with_name(".set.zip.part.json").unlink()
    downloads.download(site.url, target)
    assert site.ranges == [None, None] and target.read_bytes() == CONTENT


def test_another_part_than_asked_for_is_refused(site, target):
    break_after(site, target, 1_234_567)
    site.wrong_range = True
    assert "the server sent another part" in refused(OSError, site.url, target)
    downloads.download(site.url, target)
    assert target.read_bytes() == CONTENT


def test_another_length_is_refused_before_the_download(site, target):
    message = refused(ValueError, site.url, target, 2_999_999)
    assert "has 3,000,000 bytes, expected 2,999,999" in message
    assert files_of(target) == []
    downloads.download(site.url, target)
    message = refused(ValueError, site.url, target, 2_999_999)
    assert message.startswith(f"{target}: has 3,000,000 bytes") and target.exists()


def test_another_checksum_is_refused_and_the_next_download_is_a_new_one(site, target):
    message = refused(ValueError, site.url, target, None, "0" * 64)
    assert f"has the SHA-256 {SHA256}, expected 000" in message
    assert files_of(target) == []
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges == [None, None]


def test_a_length_that_the_server_does_not_say(site, target, capsys):
    site.says_length = False
    downloads.download(site.url, target)
    assert "(length unknown)" in capsys.readouterr().out
    assert target.read_bytes() == CONTENT
    target.unlink()
    site.breaks_after = 10
    assert "has 10 bytes" in refused(ValueError, site.url, target, 3_000_000)
    assert files_of(target) == []


@pytest.mark.parametrize("status, words", [(404, "404 Not Found"), (403, "403"), (503, "503")])
def test_an_error_of_the_server_keeps_what_is_there(site, target, status, words):
    site.status = status
    assert f"{site.url}: the server answers {words}" in refused(OSError, site.url, target)
    assert files_of(target) == []
    site.status = None
    break_after(site, target, 1_234_567)
    site.status = status
    refused(OSError, site.url, target)
    site.status = None
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges[-1] == "bytes=1234567-"


def test_a_range_that_the_server_does_not_have_starts_again(site, target):
    break_after(site, target, 1_234_567)
    site.status = 416
    refused(OSError, site.url, target)
    site.status = None
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges[-1] is None


def test_a_web_page_is_no_archive(site, target):
    site.kind = "text/html; charset=utf-8"
    assert "sends a web page instead of the file" in refused(OSError, site.url, target)
    assert files_of(target) == []


def test_no_connection(target):
    message = refused(OSError, "http://127.0.0.1:9/set.zip", target)
    assert message.startswith("http://127.0.0.1:9/set.zip: no connection (")


def test_a_server_that_stops_answering(site, target, monkeypatch):
    monkeypatch.setattr(downloads, "SECONDS", 0.2)
    site.pause = threading.Event()
    message = refused(OSError, site.url, target)
    site.pause.set()
    assert "the connection broke (timed out)" in message


def test_a_full_disk_is_one_line_and_what_is_there_stays(site, target, monkeypatch):
    break_after(site, target, 1_234_567)

    def full(url, response):
        yield CONTENT[1_234_567:2_000_000]
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "blocks", full)
        with pytest.raises(OSError) as caught:
            downloads.download(site.url, target)
    message = command_line.describe_error(caught.value)
    assert message == (
        f"error: {target} could not be written (No space left on device): free some space; run "
        "the same command again to continue the download"
    )
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges[-1] == "bytes=2000000-"


def test_ctrl_c_says_how_to_continue(site, target, monkeypatch):
    def stopped(url, response):
        yield CONTENT[:1000]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "blocks", stopped)
        with pytest.raises(KeyboardInterrupt) as caught:
            downloads.download(site.url, target)
    message = command_line.describe_error(caught.value)
    assert message == ("stopped by Ctrl-C: run the same command again to continue the download")
    downloads.download(site.url, target, sha256=SHA256)
    assert site.ranges[-1] == "bytes=1000-"


def test_two_downloads_of_a_file_do_not_mix(site, target):
    site.pause = threading.Event()
    first = threading.Thread(target=downloads.download, args=(site.url, target))
    first.start()
    while not target.with_name(".set.zip.part").exists():
        time.sleep(0.01)
    message = refused(ValueError, site.url, target)
    assert "another process is writing to this folder" in message
    site.pause.set()
    first.join()
    assert target.read_bytes() == CONTENT and len(site.ranges) == 1


# --- data sets ------------------------------------------------------------------------------------


def parse(*words):
    parser = ArgumentParser()
    parser.add_argument("--raw", nargs="+")
    downloads.add_option(parser.add_argument)
    return parser.parse_args(words)


def test_archives_are_given_or_downloaded(site, tmp_path, monkeypatch, capsys):
    source = downloads.Source("Set", "example.org", "nothing", (downloads.File(site.url),), "CC0")
    monkeypatch.setitem(downloads.SOURCES, "set", source)
    monkeypatch.chdir(tmp_path)
    assert downloads.raw_or_download(parse("--raw", "a", "b"), "set") == ["a", "b"]
    assert site.ranges == []

    (path,) = downloads.raw_or_download(parse("--download"), "set")
    assert str(path) == "downloads/set/set.zip" and path.read_bytes() == CONTENT
    printed = capsys.readouterr().out
    assert printed.startswith("Set, from example.org, licence: CC0\n")
    (path,) = downloads.raw_or_download(parse("--download", "here"), "set")
    assert str(path) == "here/set/set.zip"


def test_what_is_missing_is_one_line(tmp_path):
    for words, name, message in [
        ((), "busi", "--raw is missing: BUSI is at https://www.kaggle.com/datasets/aryashah2k/"),
        ((), "isic", "--raw is missing: ISIC 2016, part 1 is at https://challenge"),
        (("--download", "--raw", "a"), "isic", "--raw and --download: give one of the two"),
    ]:
        with pytest.raises(ValueError) as caught:
            downloads.raw_or_download(parse(*words), name)
        assert str(caught.value).startswith(message)


def test_every_data_set_has_a_place():
    for name, source in downloads.SOURCES.items():
        line = downloads.where_to_get(name)
        assert source.page in line and "\n" not in line
        assert ("--download fetches" in line) == bool(source.files)
        assert ("--raw" in line) == (not source.files)
        for file in source.files:
            assert file.url.startswith("https://") and file.name.endswith(".zip")
            assert file.sha256 is None and file.size is None  # not known to us
    with pytest.raises(ValueError, match="other: source unknown"):
        downloads.where_to_get("other")
