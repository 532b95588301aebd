"""`owner/repo[:QUANT]` against a local server that speaks the hub's protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from gguf.constants import GGUFValueType
from gguf_files import RawTensor, pack, text, value

from scarlet_jax import gguf, hub
from scarlet_jax.errors import BadInput

# --- The server --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Repo:
    """What the server has of a repository, and how it misbehaves."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    token: str | None = None  # private: only for who shows this
    gated: bool = False  # listed for everybody, given to nobody
    status: int = 200  # of the listing
    hang_ups: int = 0  # downloads to break off half-way
    claimed_size: int | None = None
    log: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)  # method, path, Range

    def fetched(self) -> list[str]:
        """The files sent, in order of asking, with repetitions."""
        return [
            path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and "/cdn/" in path
        ]


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.leaked_tokens: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # Files come from another host, as on the real hub. The library must not send it the user's token.
        self.cdn = f"http://localhost:{self.server_port}/cdn"


class Handler(BaseHTTPRequestHandler):
    """HEAD and GET of /api/models/OWNER/REPO, /OWNER/REPO/resolve/COMMIT/FILE and /cdn/OWNER/REPO/FILE."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        prefix, names = self._split(path)
        repo = self.server.repos.get("/".join(names[:2]))
        if repo is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
            return
        repo.log.append((self.command, f"/{path}", self.headers.get("Range")))
        if prefix == "cdn":
            self._send_file(repo, "/".join(names[2:]))
        elif repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self._refuse_token()
        elif prefix == "api/models":
            self._send_listing(repo, "/".join(names[:2]))
        else:
            self._redirect(repo, "/".join(names[:2]), "/".join(names[4:]))

    def do_HEAD(self) -> None:
        self.do_GET()

    @staticmethod
    def _split(path: str) -> tuple[str, list[str]]:
        for prefix in ("api/models", "cdn"):
            if path.startswith(f"{prefix}/"):
                return prefix, path.removeprefix(f"{prefix}/").split("/")
        return "", path.split("/")

    def _refuse_token(self) -> None:
        if "Authorization" in self.headers:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": message})

    def _send_listing(self, repo: Repo, name: str) -> None:
        if repo.status != 200:
            self._answer(repo.status, {}, b'{"error": "a bad\\nday"}')
            return
        siblings = [{"rfilename": file} for file in repo.files]
        self._answer(200, {}, json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode())

    def _redirect(self, repo: Repo, name: str, file: str) -> None:
        if repo.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted.")
            return
        if file not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        size = repo.claimed_size or len(repo.files[file])
        etag = hashlib.sha256(repo.files[file]).hexdigest()
        facts = {"X-Repo-Commit": repo.commit, "X-Linked-Size": str(size), "X-Linked-ETag": f'"{etag}"'}
        self._answer(302, facts | {"Location": f"{self.server.cdn}/{name}/{file}"})

    def _send_file(self, repo: Repo, file: str) -> None:
        if "Authorization" in self.headers:
            self.server.leaked_tokens.append(self.headers["Authorization"])
        content = repo.files[file]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        hang_up = self.command == "GET" and repo.hang_ups > 0
        repo.hang_ups -= hang_up
        self._answer(206 if asked else 200, headers, content[start:], hang_up=hang_up)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"", hang_up: bool = False) -> None:
        self.send_response(status)
        for name, content in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, content)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if hang_up else body)
        self.close_connection = hang_up

    def log_message(self, *_: object) -> None:
        """Say nothing: the tests look at `Repo.log`."""


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as hub_server:
        threading.Thread(target=hub_server.serve_forever, daemon=True).start()
        yield hub_server
        hub_server.shutdown()


# --- The client --------------------------------------------------------------------------------------------

# huggingface_hub reads its environment when it is imported, so it is used from a process of its own: one for
# all tests, who keep out of each other's way by the names of their repositories.
CLIENT = """
import json, sys
from scarlet_jax import hub
from scarlet_jax.errors import BadInput
for line in sys.stdin:
    try:
        print(json.dumps({"path": str(hub.resolve(json.loads(line)))}), flush=True)
    except BadInput as error:
        print(json.dumps({"refusal": str(error)}), flush=True)
"""


def environment(server: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {name: content for name, content in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "NO_PROXY": "*"} | more


class Client:
    def __init__(self, env: dict[str, str], **limits) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **limits,
        )

    def ask(self, model: str) -> dict[str, str]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(model), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)

    def resolve(self, model: str) -> Path:
        return Path(self.ask(model)["path"])

    def refusal(self, model: str) -> str:
        message = self.ask(model)["refusal"]
        assert "\n" not in message
        return message

    def close(self) -> str:
        """What it said on stderr."""
        return self.process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def client(server, home) -> Iterator[Client]:
    one = Client(environment(server, home))
    yield one
    one.close()


@pytest.fixture
def one_off(server, home):
    """A client with an environment or limits of its own."""
    clients: list[Client] = []

    def start(more: dict[str, str] | None = None, **limits) -> Client:
        clients.append(Client(environment(server, home, **(more or {})), **limits))
        return clients[-1]

    yield start
    for one in clients:
        one.close()


def model_file(name: str, *split: int) -> bytes:
    """A GGUF that says its name; `split` is its number, the count of parts and of tensors."""
    keys = [("split.no", GGUFValueType.UINT16), ("split.count", GGUFValueType.UINT16)]
    keys.append(("split.tensors.count", GGUFValueType.INT32))
    values = [(key, value(kind, content)) for (key, kind), content in zip(keys, split, strict=False)]
    tensor = RawTensor(f"t{split[0] if split else ''}", [4], data=bytes(16))
    return pack([("general.name", text(name)), *values], [tensor])


@pytest.fixture
def repo(server, request) -> Iterator[tuple[str, Repo]]:
    """A repository of its own for each test: its name, and the server's side of it."""
    words = re.findall(r"[A-Za-z0-9]+", request.node.name.removeprefix("test"))
    name = f"owner/{'-'.join(words)}"
    quants = ("Q8_0", "Q4_K_M", "UD-Q4_K_XL", "Q3_K_S", "BF16")
    files = {f"Qwen3.5-2B-{quant}.gguf": model_file(quant) for quant in quants}
    files |= {"README.md": b"# hello", "mmproj-Qwen3.5-2B-F16.gguf": b"", "imatrix_unsloth.gguf": b""}
    server.repos[name] = Repo(files)
    yield name, server.repos[name]
    assert not server.leaked_tokens


# --- Paths -------------------------------------------------------------------------------------------------


def test_a_path_is_itself(tmp_path):
    path = tmp_path / "m.gguf"
    path.touch()
    assert hub.resolve(str(path)) == hub.resolve(path) == path


def test_a_path_that_looks_like_a_repository_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "repo").touch()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/repo") == Path("owner/repo")


@pytest.mark.parametrize(
    "model",
    [
        *(
            "m.gguf",
            "models/m.gguf",
            "models/m.GGUF",
            "/models/m",
            "./m",
            "../m",
            "a/b/c",
            "m",
            "~/m",
            "a/b:c/d",
        ),
        *("owner/", "/repo", "owner/repo:", ":Q4_K_M", "owner /repo", "", "a\0b", "a" * 5000, "a/b\n"),
    ],
)
def test_what_is_no_repository_never_reaches_the_hub(model, monkeypatch):
    monkeypatch.setattr(hub, "_list", None)
    with pytest.raises(BadInput, match="no such file"):
        hub.resolve(model)


# --- Choosing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        (":Q8_0", "Qwen3.5-2B-Q8_0.gguf"),
        (":q8_0", "Qwen3.5-2B-Q8_0.gguf"),
        (":Q4_K_XL", "Qwen3.5-2B-UD-Q4_K_XL.gguf"),
        (":UD-Q4_K_XL", "Qwen3.5-2B-UD-Q4_K_XL.gguf"),
        (":Qwen3.5-2B-Q3_K_S", "Qwen3.5-2B-Q3_K_S.gguf"),
        (":BF16", "Qwen3.5-2B-BF16.gguf"),
        ("", "Qwen3.5-2B-Q4_K_M.gguf"),
    ],
)
def test_quant(repo, client, tag, file):
    name, there = repo
    path = client.resolve(name + tag)
    assert path.name == file
    assert path.read_bytes() == there.files[file]
    assert there.fetched() == [file]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["m-Q8_0.gguf", "m-BF16.gguf", "m-Q2_K.gguf"], "m-Q8_0.gguf"),
        (["m-BF16.gguf", "m-Q2_K.gguf"], "m-BF16.gguf"),
        (["m-Q2_K.gguf", "mmproj-F16.gguf", "m-mmproj-BF16.gguf"], "m-Q2_K.gguf"),
        (["m.gguf", "config.json"], "m.gguf"),
        (["m.Q4_K_M.gguf", "m.IQ4_XS.gguf"], "m.Q4_K_M.gguf"),
        (["Q4_K_M/m-Q4_K_M.gguf", "BF16/m-BF16.gguf"], "Q4_K_M/m-Q4_K_M.gguf"),
    ],
)
def test_without_a_quant_the_usual_one_or_the_only_one(files, chosen):
    assert hub._choose("o/r", "", files) == [chosen]


@pytest.mark.parametrize(
    ("quant", "files", "expected"),
    [
        ("Q5_K_M", ["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "has no Q5_K_M, expected one of Q4_K_M, Q8_0"),
        ("F16", ["m-BF16.gguf"], "has no F16, expected one of BF16"),
        ("F16", ["mmproj-F16.gguf", "m-Q8_0.gguf"], "has no F16, expected one of Q8_0"),
        ("Q4.K.M", ["m-Q4_K_M.gguf"], "has no Q4.K.M, expected one of Q4_K_M"),
        (
            "",
            ["m-Q2_K.gguf", "m-Q3_K_S.gguf"],
            "has no Q4_K_M or Q8_0 or BF16 or F16 or F32, expected one of Q2_K",
        ),
        ("", ["model.safetensors"], "has no Q4_K_M or Q8_0 or BF16 or F16 or F32, nor any other GGUF model"),
        ("Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0 fits several models, expected one of a-Q8_0, b-Q8_0"),
        (
            "",
            ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"],
            "Q4_K_M fits several models, expected one of a-Q4_K_M, b-Q4_K_M",
        ),
        ("Q2_K", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "has no Q2_K, expected one of a-Q8_0, b-Q8_0"),
        ("Q8_0", ["m-Q8_0-00002-of-00002.gguf"], "m-Q8_0-00002-of-00002.gguf is one of 2 parts, 1 are there"),
    ],
)
def test_what_cannot_be_chosen(quant, files, expected):
    with pytest.raises(BadInput) as caught:
        hub._choose("o/r", quant, files)
    assert str(caught.value).startswith(f"o/r: {expected}")


def test_all_of_a_name_chooses_between_two_that_end_alike():
    files = ["m-Q8_0.gguf", "m-MTP-Q8_0.gguf", "x-m-Q8_0.gguf"]
    assert hub._choose("o/r", "m-q8_0", files) == ["m-Q8_0.gguf"]


# --- Downloading -------------------------------------------------------------------------------------------


def test_a_second_use_downloads_nothing(repo, client):
    name, there = repo
    assert client.resolve(name) == client.resolve(name)
    assert there.fetched() == ["Qwen3.5-2B-Q4_K_M.gguf"]
    asked_again = there.log[-1]
    assert asked_again == ("GET", f"/api/models/{name}", None)  # one question: is this still the commit?


def test_every_part_of_a_split_set_is_downloaded(repo, client):
    name, there = repo
    parts = [f"Q6_K/m-Q6_K-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    there.files = {part: model_file("big", number, 3, 3) for number, part in enumerate(parts)} | there.files
    path = client.resolve(f"{name}:q6_k")
    assert path.parts[-2:] == ("Q6_K", "m-Q6_K-00001-of-00003.gguf")
    assert there.fetched() == [part.partition("/")[2] for part in parts]
    model = gguf.read(path)
    assert model.metadata["general.name"] == "big"
    assert list(model.tensors) == ["t0", "t1", "t2"]


def test_a_lost_connection_is_resumed(repo, client):
    """The library writes 10 MiB at a time: of 15 that came before the loss it has kept 10."""
    name, there = repo
    file = "Qwen3.5-2B-Q4_K_M.gguf"
    there.files[file] = random.Random(0).randbytes(30 * 2**20)
    there.hang_ups = 1
    assert client.resolve(name).read_bytes() == there.files[file]
    asked = [asked for method, path, asked in there.log if method == "GET" and "/cdn/" in path]
    assert asked == [None, f"bytes={10 * 2**20}-"]


def test_token_is_shown_to_the_hub_and_to_nobody_else(repo, client, one_off, server):
    name, there = repo
    there.token = "hf_secret"
    expected = "no such repository on the hub, unless it is private: then check HF_TOKEN (not set)"
    assert expected in client.refusal(name)
    assert "the hub does not accept HF_TOKEN" in one_off({"HF_TOKEN": "hf_wrong"}).refusal(name)
    path = one_off({"HF_TOKEN": "hf_secret"}).resolve(name)
    assert path.read_bytes() == there.files[path.name]
    assert server.leaked_tokens == []


def test_silent_where_stderr_is_no_terminal(repo, one_off):
    """Progress bars are for people; and a lost connection aside there is nothing to say."""
    client = one_off()
    client.resolve(repo[0])
    assert client.close() == ""


# --- Trouble -----------------------------------------------------------------------------------------------


def test_no_such_repository(client):
    message = client.refusal("owner/nowhere:Q8_0")
    assert message.startswith("owner/nowhere: no such file, and no such repository on the hub")


def test_no_possible_repository(client):
    message = client.refusal("owner/no--where")
    assert message.startswith("owner/no--where: HFValidationError: ")


def test_gated_repository(repo, client):
    name, there = repo
    there.gated = True
    assert "access to this repository must be granted on its page first" in client.refusal(name)


def test_no_such_quant_lists_what_there_is(repo, client):
    expected = f"{repo[0]}: has no Q2_K, expected one of BF16, Q3_K_S, Q4_K_M, Q8_0, Q4_K_XL"
    assert client.refusal(f"{repo[0]}:Q2_K") == expected


def test_file_that_vanished(repo, client, server):
    name, there = repo
    listed = dict(there.files)
    file = "Qwen3.5-2B-Q4_K_M.gguf"

    class Vanishing(dict):
        def __contains__(self, key):
            return key != file and key in listed

    there.files = Vanishing(listed)
    message = client.refusal(name)
    assert message.startswith(f"{name}: {file}: the hub answers 404 Entry not found")


@pytest.mark.parametrize("status", [429, 503])
def test_hub_on_a_bad_day(repo, client, status):
    name, there = repo
    there.status = status
    expected = f"{name}: not in the cache, and no list from the hub: the hub answers {status} a bad day"
    assert client.refusal(name) == expected
    there.status = 200
    path = client.resolve(name)
    there.status = status
    assert client.resolve(name) == path  # out of the cache


def test_repository_that_was_withdrawn_is_not_taken_from_the_cache(repo, client, server):
    name, _ = repo
    client.resolve(name)
    del server.repos[name]
    assert "no such repository on the hub" in client.refusal(name)


def test_no_hub_at_all(repo, client, one_off):
    name, _ = repo
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port: nobody answers
    message = one_off(nowhere).refusal(name)
    assert message.startswith(f"{name}: not in the cache, and no list from the hub: ConnectError: ")
    path = client.resolve(name)
    assert one_off(nowhere).resolve(name) == path


def test_offline_on_purpose(repo, client, one_off):
    name, there = repo
    path = client.resolve(name)
    asked = len(there.log)
    offline = one_off({"HF_HUB_OFFLINE": "1"})
    assert offline.resolve(name) == path
    assert f"{name}: has no Q8_0, expected one of Q4_K_M" in offline.refusal(f"{name}:Q8_0")
    assert "HF_HUB_OFFLINE" in offline.refusal("owner/never-fetched")
    assert len(there.log) == asked


def test_offline_takes_the_newest_copy(repo, client, one_off):
    name, there = repo
    copies = []
    for commit in ("b" * 40, "a" * 40, "c" * 40):  # in no order of theirs
        there.commit = commit
        there.files["Qwen3.5-2B-Q4_K_M.gguf"] = model_file(commit)
        copies.append(client.resolve(name))
        os.utime(copies[-1], times=(1e9 + len(copies), 1e9 + len(copies)))
    os.utime(copies[1], times=(2e9, 2e9))
    assert one_off({"HF_HUB_OFFLINE": "1"}).resolve(name) == copies[1]


def test_offline_without_a_cache(server, tmp_path):
    client = Client(environment(server, tmp_path / "absent", HF_HUB_OFFLINE="1"))
    assert "owner/repo: not in the cache" in client.refusal("owner/repo")
    client.close()


def test_disk_too_small_is_said_before_it_is_full(repo, client):
    name, there = repo
    there.claimed_size = 1 << 60
    assert "Not enough free disk space" in client.refusal(name)
    assert there.fetched() == []


def test_file_of_another_size_than_said(repo, client):
    name, there = repo
    size = len(there.files["Qwen3.5-2B-Q4_K_M.gguf"])
    there.claimed_size = size + 10
    message = client.refusal(name)  # one line, though the library says it in several
    assert f"file should be of size {size + 10} but has size {size}" in message


def test_disk_that_fills_up_leaves_nothing_behind(repo, one_off, home):
    name, there = repo
    there.files["Qwen3.5-2B-Q4_K_M.gguf"] = bytes(300_000)
    limit = 100_000  # bytes that the process may write to one file: the operating system refuses the rest
    full = one_off(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "Qwen3.5-2B-Q4_K_M.gguf: OSError: [Errno 27] File too large" in full.refusal(name)
    blobs = (home / "hub" / f"models--{name.replace('/', '--')}" / "blobs").iterdir()
    assert list(blobs) == []
