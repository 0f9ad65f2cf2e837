"""A local stand-in for the Hugging Face hub that answers its client over real HTTP.

    with Hub(folder) as hub:                                  # folder/owner/name/revision/file
        subprocess.run(..., env=hub.environment(home))        # a process that knows no other hub

It answers like the hub: /api/models/ID[/revision/REV] with the files and their sizes, and
/ID/resolve/REV/FILE with ETag, X-Repo-Commit and byte ranges. Weights are redirected to another
host, the "CDN", which is this server under its other name. X-Error-Code says what is missing.
`requests` lists all requests; `cut = n` breaks every transfer at byte n; files named in `altered`
arrive with another last byte.

Uploads: a repository is created, files are announced, large ones are put to the storage that a
batch request names and are verified, and one commit takes them all in. `tokens` says who may
"write" or "read"; what is in `private` or `gated` needs a token. `broken` is the start of paths at
which the connection is cut.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
UPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<step>preupload|commit)/main")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<step>batch|verify)")
SMALL = (".json", ".md", ".txt")  # files that the hub itself holds


class Hub:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.requests, self.cut, self.altered, self.broken = [], None, set(), None
        self.tokens = {}  # token -> "read" or "write"
        self.private, self.gated = set(), set()  # repositories
        self.commits = {}  # repository -> what each upload committed: the names of its files
        self.objects = {}  # SHA-256 -> content of a large file
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

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process whose hub is this one and whose cache is `home`."""
        outside = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(outside)}
        if token:
            environment["HF_TOKEN"] = token
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # xet is another protocol, with servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def commit(self, repo: str, revision: str) -> str:
        uploads = len(self.commits.get(repo, ()))
        return hashlib.sha1(f"{repo} {revision} {uploads}".encode()).hexdigest()

    def find(self, repo: str, revision: str) -> Path | None:
        """The folder of a branch, a tag or a commit."""
        for folder in (self.folder / repo).iterdir():
            if revision in (folder.name, self.commit(repo, folder.name)):
                return folder
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server.hub, self.start()
        if path.startswith("/cdn/"):
            return self.send(hub.folder / path.removeprefix("/cdn/"), {})
        ask = API.fullmatch(path) or FILE.fullmatch(path)
        repo, revision = ask["repo"], ask["revision"] or "main"
        if self.has_wrong_token():
            return self.refuse_token()
        is_hidden = repo in hub.private and not self.permission()
        if is_hidden or not (hub.folder / repo).is_dir():
            return self.refuse(401, "RepoNotFound")  # 401: it may exist and be private
        if repo in hub.gated and ask.re is FILE:
            return self.refuse(403, "GatedRepo")
        folder = hub.find(repo, revision)
        if folder is None:
            return self.refuse(404, "RevisionNotFound")
        commit = hub.commit(repo, folder.name)
        if ask.re is API:
            is_private = repo in hub.private
            return self.answer_json(describe(repo, commit, folder) | {"private": is_private})
        file = folder / ask["file"]
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(file)}"'}
        if file.suffix in SMALL:
            return self.send(file, headers)
        headers |= {"X-Linked-ETag": headers.pop("ETag"), "X-Linked-Size": file.stat().st_size}
        headers["Location"] = f"{hub.cdn}/cdn/{file.relative_to(hub.folder).as_posix()}"
        return self.answer(302, b"", headers)

    do_HEAD = do_GET

    # --- uploads ---

    def do_POST(self):
        hub, path = self.server.hub, self.start()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.broken and path.startswith(hub.broken):
            return self.hang_up()
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer_json({"errors": [], "warnings": []})
        if self.has_wrong_token() or not self.permission():
            return self.refuse_token()
        if self.permission() != "write":
            return self.refuse(403, "", {"X-Error-Message": "you have no write access"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        ask = UPLOAD.fullmatch(path) or BATCH.fullmatch(path)
        return getattr(self, ask["step"])(ask["repo"], body)

    def do_PUT(self):
        """Store a large file."""
        hub, path = self.server.hub, self.start()
        if hub.broken and path.startswith(hub.broken):
            self.rfile.read(1000)
            return self.hang_up()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = path.removeprefix("/storage/")
        assert hashlib.sha256(body).hexdigest() == oid
        hub.objects[oid] = body
        return self.answer(200, b"")

    def create(self, wanted: dict):
        hub, repo = self.server.hub, f"{wanted['organization']}/{wanted['name']}"
        if (hub.folder / repo).is_dir():
            return self.refuse(409, "")
        (hub.folder / repo / "main").mkdir(parents=True)
        if wanted["visibility"] == "private":
            hub.private.add(repo)
        return self.answer_json({"url": f"{hub.url}/{repo}"})

    def preupload(self, repo: str, body: bytes):
        files = []
        for file in json.loads(body)["files"]:
            mode = "regular" if file["path"].endswith(SMALL) else "lfs"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return self.answer_json({"files": files})

    def batch(self, repo: str, body: bytes):
        hub, objects = self.server.hub, []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{hub.cdn}/storage/{wanted['oid']}"}
            verify = {"href": f"{hub.url}/{repo}.git/info/lfs/objects/verify"}
            objects.append(wanted | {"actions": {"upload": upload, "verify": verify}})
        return self.answer_json({"transfer": "basic", "objects": objects})

    def verify(self, repo: str, body: bytes):
        wanted = json.loads(body)
        assert len(self.server.hub.objects[wanted["oid"]]) == wanted["size"]
        return self.answer_json({})

    def commit(self, repo: str, body: bytes):
        hub, names = self.server.hub, []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.objects[value["oid"]]
            else:
                continue
            names.append(value["path"])
            (hub.folder / repo / "main" / value["path"]).write_bytes(content)
        hub.commits.setdefault(repo, []).append(names)
        oid = hub.commit(repo, "main")
        return self.answer_json({"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    # --- who asks ---

    def start(self) -> str:
        """The path of a request, which is noted."""
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        return path

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def permission(self) -> str | None:
        return self.server.hub.tokens.get(self.token())

    def has_wrong_token(self) -> bool:
        return self.token() is not None and self.permission() is None

    def refuse_token(self):
        message = "Invalid credentials in Authorization header"
        self.refuse(401, "", {"X-Error-Message": message})

    # --- answers ---

    def refuse(self, status: int, code: str, headers: dict | None = None):
        named = {"X-Error-Code": code} if code else {}
        self.answer(status, b"{}", named | (headers or {}))

    def hang_up(self):
        self.close_connection = True

    def send(self, file: Path, headers: dict):
        """The file, or the part of it that a Range header asks for."""
        body, status, start = file.read_bytes(), 200, 0
        if file.name in self.server.hub.altered:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(span[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.answer(status, body[start:], headers, start)

    def answer_json(self, content: dict):
        self.answer(200, json.dumps(content).encode())

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
    return {"id": repo, "sha": commit, "siblings": files}
