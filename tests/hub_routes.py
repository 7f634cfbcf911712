"""The routes of the loopback hub, as huggingface_hub asks for them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.hub_repository import Fault, File, Repository, User

if TYPE_CHECKING:
    from tests.hub_server import HubServer

LICENSES = {"apache-2.0", "mit", "openrail++", "cc-by-nc-4.0", "other"}
TASKS = {"text-to-image", "text-generation", "unconditional-image-generation"}
LARGE = (".safetensors", ".png")


class _Answered(Exception):  # noqa: N818  not an error: leaves the route
    pass


class Handler(BaseHTTPRequestHandler):
    """One connection of a client; `hub` is set by the server."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    fault: Fault | None

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        self.fault = self.hub.take_fault(request)
        kind = self.fault.kind if self.fault else None
        if kind == "hang":
            self.hub.ending.wait()
        if kind in ("drop", "hang"):  # in the middle of the upload, if there is one
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.close()
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.fault and isinstance(kind, int):
                self.answer(kind, self.fault.body, self.fault.headers)
            self.route(path)
        except _Answered:
            pass

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> NoReturn:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        if self.fault and self.fault.kind == "drop_after":
            self.close()
            raise _Answered
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if not headers or "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        raise _Answered

    def refuse(self, status: int, message: str, code: str = "") -> NoReturn:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, {"error": message}, headers)

    # Who asks, and for what.

    def user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            self.refuse(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repository(self, name: str, write: bool = False) -> Repository:
        user, repo = self.user(), self.hub.repos.get(name)
        own = user is not None and name.startswith(f"{user.name}/")
        if repo is None or (repo.private and not own):
            if user is None:
                self.refuse(401, "Invalid username or password.")  # the Hub does not tell strangers what exists
            self.refuse(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            self.refuse(401, "Invalid username or password.")
        if write and not (own and user and user.may_write):
            self.refuse(403, f"you do not have the rights to write to {name}")
        return repo

    def commit_of(self, repo: Repository, revision: str) -> str:
        return repo.resolve(unquote(revision)) or self.refuse(404, "Invalid rev id", "RevisionNotFound")

    # Routes.

    def route(self, path: str) -> None:
        repo = r"/api/models/([\w.-]+/[\w.-]+)"
        routes = [
            ("POST /api/validate-yaml", self.validate_yaml),
            ("POST /api/repos/create", self.create_repo),
            (f"GET {repo}(?:/revision/([^/]+))?", self.model_info),
            (f"GET {repo}/refs", self.refs),
            (f"GET {repo}/tree/([^/]+)", self.list_tree),
            (f"POST {repo}/branch/([^/]+)", self.create_branch),
            (f"DELETE {repo}/branch/([^/]+)", self.delete_branch),
            (f"POST {repo}/preupload/([^/]+)", self.preupload),
            (f"POST {repo}/commit/([^/]+)", self.commit),
            (r"POST /([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"PUT /storage/([0-9a-f]{64})", self.store),
            (r"(?:GET|HEAD) /storage/([0-9a-f]{64})", self.download_large),
            (r"(?:GET|HEAD) /([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, method in routes:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                with self.hub.lock:
                    method(*match.groups())
        self.refuse(404, f"no such route: {path}")

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
        data = yaml.safe_load(match[1]) if match else {}
        index = data.get("model-index") or []
        metrics = [m for entry in index for result in entry["results"] for m in result["metrics"]]
        wrong = {
            '"license" must be one of the known licences': data.get("license", "mit") not in LICENSES,
            '"pipeline_tag" must be a known task': data.get("pipeline_tag", "text-to-image") not in TASKS,
            '"base_model" must be a model id': not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")),
            '"model-index" metrics need type and value': not all({"type", "value"} <= m.keys() for m in metrics),
        }
        errors = [{"message": message} for message, holds in wrong.items() if holds]
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        if self.headers.get("Accept") == "text/plain" and errors:
            self.answer(400, "\n".join(f"- {error['message']}" for error in errors).encode())
        self.answer(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def create_repo(self) -> None:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            self.refuse(401, "Invalid username or password.")
        owner = asked.get("organization") or user.name
        name = f"{owner}/{asked['name']}"
        if owner == "nowhere":
            self.refuse(404, "the namespace nowhere does not exist")
        if owner != user.name or not user.may_write:
            self.refuse(403, f'you do not have the rights to create a model under the namespace "{owner}"')
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.create(name, asked.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def model_info(self, name: str, revision: str | None) -> None:
        repo = self.repository(name)
        sha = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self.answer(200, {"id": name, "modelId": name, "private": repo.private, "sha": sha, "siblings": siblings})

    def refs(self, name: str) -> None:
        repo = self.repository(name)

        named = {"branches": repo.branches, "tags": repo.tags, "converts": {}}
        self.answer(
            200, {k: [{"name": n, "ref": n, "targetCommit": sha} for n, sha in v.items()] for k, v in named.items()}
        )

    def list_tree(self, name: str, revision: str) -> None:
        repo = self.repository(name)
        files = repo.commits[self.commit_of(repo, revision)]
        entries = []
        for path, file in sorted(files.items()):
            entries.append({"type": "file", "path": path, "size": len(file.content), "oid": file.oid})
            if file.large:
                entries[-1]["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        self.answer(200, entries)

    def create_branch(self, name: str, branch: str) -> None:
        repo, branch = self.repository(name, write=True), unquote(branch)
        if branch in repo.branches:
            self.refuse(409, "Reference already exists")
        repo.branches[branch] = self.commit_of(repo, json.loads(self.body or "{}").get("startingPoint", "main"))
        self.answer(200)

    def delete_branch(self, name: str, branch: str) -> None:
        del self.repository(name, write=True).branches[unquote(branch)]
        self.answer(200)

    def preupload(self, name: str, revision: str) -> None:
        repo, asked = self.repository(name, write=True), json.loads(self.body)
        files = repo.commits[self.commit_of(repo, revision)]
        ignored = asked.get("gitIgnore")
        if ignored is None:
            ignored = files[".gitignore"].content.decode() if ".gitignore" in files else ""
        modes = [
            {
                "path": (path := file["path"]),
                "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                "shouldIgnore": path in ignored.split(),
                "oid": files[path].etag if path in files else None,
            }
            for file in asked["files"]
        ]
        self.answer(200, {"files": modes})

    def lfs_batch(self, name: str) -> None:
        self.repository(name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.store:
                href = f"{self.hub.storage}/{asked['oid']}?signature=upload"
                entry |= {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def signed(self, kind: str) -> None:
        if self.query.get("signature") != [kind] or "Authorization" in self.headers:
            self.refuse(400, "the storage takes a signature and no token")

    def store(self, oid: str) -> None:
        self.signed("upload")
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "the content does not match its sha256")
        self.hub.store[oid] = self.body
        self.answer(200)

    def commit(self, name: str, revision: str) -> None:
        repo, branch = self.repository(name, write=True), unquote(revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if branch not in repo.branches:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
        head = repo.branches[branch]
        if header.get("parentCommit", head) != head:
            self.refuse(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[head])
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                tree[path] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    self.refuse(400, f"LFS object {value['oid']} was not uploaded")
                tree[path] = File(self.hub.store[value["oid"]], True)
            elif line["key"] == "deletedFile":
                if tree.pop(path, None) is None:
                    self.refuse(400, f"there is no {path}")
        sha = repo.commit(branch, tree, header["summary"])  # nothing of it was visible before this line
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repository(name)
        sha = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": sha}
        file = repo.commits[sha].get(unquote(path))
        if file is None:
            self.answer(404, {}, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if not file.large:
            self.download(file, headers)
        location = f"{self.hub.storage}/{file.sha256}?signature=download&name={quote(path)}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content)), "ETag": f'"{file.oid}"'}
        self.answer(302, b"", headers | linked | {"Location": location})

    def download_large(self, oid: str) -> None:
        self.signed("download")
        self.download(File(self.hub.store[oid], True), {})

    def download(self, file: File, headers: dict[str, str]) -> None:
        content, start, kind = file.content, 0, self.fault.kind if self.fault else None
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if kind == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        size = len(content) - start
        sent = content[start : start + size // 2] if kind == "short" else content[start:]
        headers |= {"ETag": f'"{file.etag}"', "Content-Length": str(size), "Accept-Ranges": "bytes"}
        if kind == "short":
            self.close_connection = True  # the body ends before the length that was announced
        self.answer(206 if start else 200, sent, headers | {"Content-Type": "application/octet-stream"})
