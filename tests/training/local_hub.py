"""A local stand-in of the hub's HTTP API: creating, committing to and downloading a model repository.

Small files travel in the commit, large ones and weights by the LFS batch protocol (git-lfs's docs/api/batch.md, with
the hub's own ``multipart`` transfer): batch -> PUT of the bytes to a storage host -> verify -> commit by checksum.
Downloads of them are redirected to the storage host, as the hub redirects to its CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"
REGULAR_LIMIT = 10 * 2**20
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class LocalHub(ThreadingHTTPServer):
    """``files``: content by repository and path; ``private``: repositories that are; ``objects``: LFS content by
    checksum; ``requests``: method and path.

    With ``part_size``, larger objects are uploaded in parts of it. ``refused``: status by the start of a request;
    ``damaged``: methods whose LFS bytes change on the way.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.part_size = 0
        self.refused: dict[str, int] = {}
        self.damaged: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Another host than the hub, as the client sees it."""
        return f"http://localhost:{self.server_address[1]}/storage"

    def stored_parts(self, oid: str) -> list[bytes]:
        return [self.parts[key] for key in sorted(self.parts) if key[0] == oid]


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _begin(self) -> str | None:
        """The path to serve; None for a request that has been refused."""
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        status = next((code for start, code in self.server.refused.items() if request.startswith(start)), None)
        if status is None and not path.startswith("/storage/"):
            status = None if self.headers.get("Authorization") == f"Bearer {TOKEN}" else 401
        if status is not None:
            self._json({"error": f"refused: {request}"}, status)
        return path if status is None else None

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _in_transit(self, content: bytes) -> bytes:
        damaged = self.command in self.server.damaged
        return content[:-1] + bytes([content[-1] ^ 1]) if damaged else content

    def do_PUT(self) -> None:
        """LFS bytes, whole or one part. As S3, nothing without a length."""
        if "Content-Length" not in self.headers:
            return self._answer(411)
        content = self._in_transit(self._body())
        path = self._begin()
        if path is None:
            return None
        _, _, oid, *part = path.split("/")
        if part:
            self.server.parts[oid, int(part[0])] = content
        else:
            self.server.objects[oid] = content
        return self._answer(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def do_POST(self) -> None:
        body = self._body()
        path = self._begin()
        if path is None:
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            self._json({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.startswith("/storage/complete/"):
            self._complete(json.loads(body))
        elif path == "/lfs/verify":
            self._verify(json.loads(body))
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._json({"error": f"no route {path}"}, 404)

    def _create(self, fields: dict[str, Any]) -> None:
        repository = "/".join(part for part in (fields.get("organization"), fields["name"]) if part)
        url = f"{self.server.url}/{repository}"
        if repository in self.server.files:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.server.files[repository] = {".gitattributes": ATTRIBUTES}
        if fields.get("private") or fields.get("visibility") == "private":
            self.server.private.add(repository)
        return self._json({"url": url})

    @staticmethod
    def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT
        return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}

    def _batch(self, request: dict[str, Any]) -> None:
        assert (request["operation"], request["hash_algo"]) == ("upload", "sha256")
        in_parts = self.server.part_size and "multipart" in request["transfers"]
        objects = [self._upload_actions(entry["oid"], entry["size"], in_parts) for entry in request["objects"]]
        self._json({"transfer": "multipart" if in_parts else "basic", "objects": objects})

    def _upload_actions(self, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
        """An object that is there gets none."""
        if oid in self.server.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.server.storage_url}/{oid}"}
        if in_parts and size > self.server.part_size:
            count = -(-size // self.server.part_size)
            parts = {f"{number:05}": f"{upload['href']}/{number}" for number in range(1, count + 1)}
            header = {"chunk_size": str(self.server.part_size), **parts}
            upload = {"href": f"{self.server.storage_url}/complete/{oid}", "header": header}
        verify = {"href": f"{self.server.url}/lfs/verify"}
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _complete(self, request: dict[str, Any]) -> None:
        parts = self.server.stored_parts(request["oid"])
        etags = [{"partNumber": n, "etag": f'"{hashlib.md5(part).hexdigest()}"'} for n, part in enumerate(parts, 1)]
        if request["parts"] != etags:
            return self._json({"error": "parts do not match"}, 400)
        self.server.objects[request["oid"]] = b"".join(parts)
        return self._json({"success": True})

    def _verify(self, request: dict[str, Any]) -> None:
        content = self.server.objects[request["oid"]]
        if (hashlib.sha256(content).hexdigest(), len(content)) != (request["oid"], request["size"]):
            del self.server.objects[request["oid"]]
            return self._json({"error": "checksum of the upload does not match its oid"}, 422)
        return self._json({})

    def _commit(self, repository: str, body: bytes) -> None:
        changed: dict[str, bytes] = {}
        deleted: set[str] = set()
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self._json({"error": f"{value['path']}: its LFS object is not there"}, 400)
                changed[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.add(value["path"])
        kept = {name: content for name, content in self.server.files[repository].items() if name not in deleted}
        self.server.files[repository] = kept | changed
        url = f"{self.server.url}/{repository}/commit/{COMMIT}"
        return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_GET(self) -> None:
        path = self._begin()
        if path is None:
            return None
        if path.startswith("/storage/"):
            return self._answer(200, self._in_transit(self.server.objects[path.removeprefix("/storage/")]))
        for repository, files in self.server.files.items():
            if path in (f"/api/models/{repository}/tree/{revision}" for revision in ("main", COMMIT)):
                return self._json([_tree_entry(name, content) for name, content in files.items()])
            if re.fullmatch(rf"/api/models/{repository}(/revision/\w+)?", path):
                listing = [{"rfilename": name} for name in files]
                info = {"sha": COMMIT, "private": repository in self.server.private, "tags": []}
                return self._json({"id": repository, "siblings": listing, **info})
            name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
            if name in files:
                return self._send_file(name, files[name])
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _send_file(self, name: str, content: bytes) -> None:
        lfs = _tree_entry(name, content).get("lfs")
        if lfs is None:
            etag = _tree_entry(name, content)["oid"]
            return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        linked = {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"]), "X-Repo-Commit": COMMIT}
        return self._answer(302, headers={"Location": f"{self.server.storage_url}/{lfs['oid']}", **linked})

    do_HEAD = do_GET


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    """As the hub lists a file: the checksum of its git blob (for LFS the pointer's), and that of its content."""
    if not (name.endswith(LFS_SUFFIXES) or len(content) > REGULAR_LIMIT):
        return {"type": "file", "path": name, "size": len(content), "oid": _git_sha(content)}
    oid = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
    lfs = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": len(content), "oid": _git_sha(pointer), "lfs": lfs}


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
