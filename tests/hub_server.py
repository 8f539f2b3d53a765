"""Hubs on localhost: a server with the file APIs of the Hugging Face Hub and of ModelScope, which fails on command.

Only what their clients ask for: a revision's commit, the tree of a commit, files with ETag, X-Repo-Commit,
X-Linked-Size and ranges. `tests/http_server.py` has the faults and the count of requests.
"""

import hashlib
import json
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.http_server import FileServer, _Handler

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_ABOVE = 2000  # bytes; a hub keeps larger files apart and tells their sha256


def git_sha1(data: bytes) -> str:
    """Return the name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer(FileServer):
    """Serve `folder` as the repository `ID` of both hubs; `main`, `master` and the tag `v1` are its commit."""

    def __init__(self, folder: Path, repository: str = "lab/tiny", gated: bool = False) -> None:
        super().__init__(folder)
        self.repository, self.commit, self.gated = repository, COMMIT, gated
        self.lies: dict[str, int] = {}  # file -> the size that the tree tells
        outer = self

        class Handler(_HubHandler):
            server_state = outer

        self._server.RequestHandlerClass = Handler

    def names(self) -> list[str]:
        """Return the repository's files."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


class _HubHandler(_Handler):
    server_state: HubServer

    def _answer(self, method: str) -> None:
        state = self.server_state
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        known = ("main", "master", "v1", state.commit)
        for kind in ("models", "datasets"):
            root = f"/api/{kind}/{state.repository}"
            if path == root or path.startswith(f"{root}/revision/"):
                revision = path.removeprefix(root).removeprefix("/revision/") or "main"
                if state.gated:
                    return self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
                if revision not in known:
                    return self._json(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": name} for name in state.names()]
                return self._json(200, {"id": state.repository, "sha": state.commit, "siblings": siblings})
            if path.startswith(f"{root}/tree/"):
                below = path.removeprefix(f"{root}/tree/").partition("/")[2]
                return self._json(200, self._tree(below, query.get("recursive", [""])[0].lower() == "true"))
            if path.startswith(f"/api/v1/{kind}/{state.repository}/repo"):
                return self._modelscope(method, kind, path, query)
            prefix = "" if kind == "models" else "datasets/"
            start = f"/{prefix}{state.repository}/resolve/"
            if path.startswith(start):
                revision, _, name = path.removeprefix(start).partition("/")
                if revision in known and (state.folder / name).is_file():
                    return self._file(method, name)
                return self._json(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
        self._json(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:  # noqa: N802 (the base class names it)
        """Answer what is known of some paths."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "/paths-info/" not in self.path:
            return self._json(404, {"error": "no such question"})
        self._json(200, [entry for entry in self._tree("", True) if entry["path"] in asked["paths"]])

    def _tree(self, below: str, recursive: bool) -> list[dict]:
        """Return the entries of a folder of the repository, and with `recursive` of those inside it."""
        folder = self.server_state.folder
        found = sorted((folder / below).rglob("*") if recursive else (folder / below).glob("*"))
        names = [(str(path.relative_to(folder)), path.is_dir()) for path in found]
        return [
            {"type": "directory", "path": name, "oid": git_sha1(name.encode()), "size": 0}
            if is_folder
            else self._tree_entry(name)
            for name, is_folder in names
        ]

    def _tree_entry(self, name: str) -> dict:
        data = (self.server_state.folder / name).read_bytes()
        size = self.server_state.lies.get(name, len(data))
        entry = {"type": "file", "path": name, "size": size, "oid": git_sha1(data)}
        if len(data) > LFS_ABOVE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        return entry

    def _modelscope(self, method: str, kind: str, path: str, query: dict[str, list[str]]) -> None:
        state = self.server_state
        if "FilePath" in query:
            return self._file(method, query["FilePath"][0])
        if query.get("Revision", ["master"])[0] not in ("master", "v1"):
            return self._json(404, {"Code": 10010205001, "Message": "revision not found", "Success": False})
        files = []
        for name in state.names():
            data = (state.folder / name).read_bytes()
            files.append(
                {"Path": name, "Name": name, "Type": "blob", "Size": state.lies.get(name, len(data)),
                 "Sha256": hashlib.sha256(data).hexdigest(), "Revision": state.commit}
            )  # fmt: skip
        self._json(200, {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}})

    def _file(self, method: str, name: str) -> None:
        """Answer with a file, the way of `http_server` with the hub's own headers."""
        data = (self.server_state.folder / name).read_bytes()
        is_lfs = len(data) > LFS_ABOVE
        self.hub_headers = {
            "X-Repo-Commit": self.server_state.commit,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest() if is_lfs else git_sha1(data)}"',
        }
        self.path = f"/{name}"
        try:
            super()._answer(method)
        finally:
            self.hub_headers = {}

    def end_headers(self) -> None:
        for header, value in getattr(self, "hub_headers", {}).items():
            self.send_header(header, value)
        super().end_headers()

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
