"""A local stand-in for the Hugging Face hub that answers its client over real HTTP.

    with Hub(folder) as hub:                                  # folder/owner/name/revision/file
        subprocess.run(..., env=hub.environment(home))        # a process that knows no other hub

It answers like the hub: /api/models/ID[/revision/REV] with the files and their sizes, and
/ID/resolve/REV/FILE with ETag, X-Repo-Commit and byte ranges. Weights are redirected to another
host, the "CDN", which is this server under its other name. X-Error-Code says what is missing.
`requests` lists all requests; `cut = n` breaks every transfer at byte n.
"""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.requests, self.cut = [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        """From here on the port is closed: the machine has no network."""
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """For a process whose hub is this one and whose cache is `home`."""
        outside = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(outside)}
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # xet is another protocol, with servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def find(self, repo: str, revision: str) -> Path | None:
        """The folder of a branch, a tag or a commit."""
        for folder in (self.folder / repo).iterdir():
            if revision in (folder.name, self.commit(repo, folder.name)):
                return folder
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/cdn/"):
            return self.send(hub.folder / path.removeprefix("/cdn/"), {})
        ask = API.fullmatch(path) or FILE.fullmatch(path)
        repo, revision = ask["repo"], ask["revision"] or "main"
        if not (hub.folder / repo).is_dir():
            return self.refuse(401, "RepoNotFound")  # 401: it may exist and be private
        folder = hub.find(repo, revision)
        if folder is None:
            return self.refuse(404, "RevisionNotFound")
        commit = hub.commit(repo, folder.name)
        if ask.re is API:
            return self.answer(200, json.dumps(describe(repo, commit, folder)).encode())
        file = folder / ask["file"]
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(file)}"'}
        if file.suffix == ".json":
            return self.send(file, headers)
        headers |= {"X-Linked-ETag": headers.pop("ETag"), "X-Linked-Size": file.stat().st_size}
        headers["Location"] = f"{hub.cdn}/cdn/{file.relative_to(hub.folder).as_posix()}"
        return self.answer(302, b"", headers)

    do_HEAD = do_GET

    def refuse(self, status: int, code: str, headers: dict | None = None):
        self.answer(status, b"", {"X-Error-Code": code} | (headers or {}))

    def send(self, file: Path, headers: dict):
        """The file, or the part of it that a Range header asks for."""
        body, status, start = file.read_bytes(), 200, 0
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(span[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.answer(status, body[start:], headers, start)

    def answer(self, status: int, body: bytes, headers: dict | None = None, start: int = 0):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.hub.cut
        if cut is not None and start + len(body) > cut:
            body, self.close_connection = body[: max(cut - start, 0)], True
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on stderr; `requests` has it."""


def etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def describe(repo: str, commit: str, folder: Path) -> dict:
    """What /api/models says with `blobs=true`."""
    files = [
        {"rfilename": file.relative_to(folder).as_posix(), "size": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    return {"id": repo, "sha": commit, "private": False, "siblings": files}
