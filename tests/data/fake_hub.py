"""A server on this machine that answers what the Hub's clients ask when a dataset is streamed, and counts the bytes."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class FakeHub:
    """Datasets with their branches and tags; a context manager that serves them.

    Attributes:
        url: for `HF_ENDPOINT`.
        repos: by name, then by revision: the files of a commit.
        sent: bytes sent of each file.
        asked: method and path of each request.
    """

    def __init__(self, repos):
        """Take repositories: name to revision (branch or tag) to path to content in bytes."""
        self.repos = repos
        self.sent = {}
        self.asked = []

    def commit(self, name, revision):
        """The commit of a branch or tag: a hash of its files."""
        for branch, files in self.repos[name].items():
            listing = [(path, hashlib.sha1(content).hexdigest()) for path, content in sorted(files.items())]
            sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
            if revision in (branch, sha):
                return sha, files
        return None, None

    def __enter__(self):
        """Start the server."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go in two parts, of which the second would wait 40 ms
    hub: FakeHub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append((self.command, path))
        name = next((name for name in self.hub.repos if name + "/" in path + "/"), None)
        if name is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        before, _, rest = (path + "/").partition(f"datasets/{name}/")
        kind, _, rest = rest.rstrip("/").partition("/")
        revision, _, inner = rest.partition("/")
        sha, files = self.hub.commit(name, revision or "main")
        if sha is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if before == "/api/":
            if kind in ("", "revision"):
                siblings = [{"rfilename": path} for path in files]
                return self._send_json({"id": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})
            if kind == "tree":
                recursive = "true" in "".join(parse_qs(url.query).get("recursive", [])).lower()
                return self._send_json(_listing(files, inner, recursive))
            if kind == "paths-info":
                given = json.loads(raw) if raw.startswith("{") else parse_qs(raw)
                everything = [entry for folder in _folders(files) for entry in _listing(files, folder, False)]
                paths = [path.strip("/") for path in given["paths"]]
                return self._send_json([entry for entry in everything if entry["path"] in paths])
        if kind == "resolve" and inner in files:
            return self._send_file(files[inner], sha, inner)
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})

    def _send_file(self, content, sha, path):
        start, end, status = 0, len(content), 200
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(len(content), int(last or len(content)) + 1), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + end - start
        self._send(status, content[start:end], headers)

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content):
    return hashlib.sha1(content).hexdigest()


def _folders(files):
    return {"", *(path.rpartition("/")[0] for path in files)}


def _listing(files, folder, recursive):
    prefix = folder + "/" if folder else ""
    entries = {}
    for path, content in files.items():
        if path.startswith(prefix):
            inner, slash, _ = path[len(prefix) :].partition("/")
            if slash:
                entries[prefix + inner] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + inner}
            if recursive or not slash:
                entries[path] = {"type": "file", "oid": _oid(content), "size": len(content), "path": path}
    return list(entries.values())
