"""`neumeta fetch` against a server on this machine."""

import hashlib
import http.server
import pathlib
import threading

import pytest
import test_data as data_files
from networks import assert_refuses, run

from neumeta_jax.commands import fetch
from neumeta_jax.data import datasets, sources

ARRAYS = data_files.random_arrays(num_classes=100, num_train=100)
TEACHER = "cifar100-resnet56-teacher"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/cut/x.pt":  # claims more than it sends
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x")
            return
        super().do_GET()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """{name: source} as in `sources`, of files that a server here has; the cache is empty."""
    root = tmp_path / "served"
    root.mkdir()
    factory = lambda *args: Handler(*args, directory=root)  # noqa: E731
    data_files.write_tar(
        root / "cifar-100-python.tar.gz", data_files.cifar_files("cifar100", "python", ARRAYS)
    )
    (root / "x.pt").write_bytes(b"teacher")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), factory) as server:
        found = {}
        for name, path in {"cifar100": "cifar-100-python.tar.gz", TEACHER: "x.pt"}.items():
            digest = hashlib.sha256((root / path).read_bytes()).hexdigest()
            address = f"http://127.0.0.1:{server.server_port}/"
            found[name] = sources.Source(address, {path: digest}, 1, "ours")
        monkeypatch.setattr(sources, "SOURCES", found)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_what_was_fetched_is_found_without_a_path_and_not_fetched_again(served, tmp_path):
    with pytest.raises(FileNotFoundError, match="neumeta fetch cifar100"):
        datasets.load_dataset("cifar100")
    with pytest.raises(ValueError, match=f"x.pt is not there; .*neumeta fetch {TEACHER}"):
        sources.local_teacher(TEACHER)
    assert "from http://127" in run(fetch, "cifar100", TEACHER)
    data_files.assert_holds(datasets.load_dataset("cifar100"), ARRAYS)
    for name in (TEACHER, "x.pt"):
        assert pathlib.Path(sources.local_teacher(name)).read_bytes() == b"teacher"
    assert run(fetch, "cifar100", TEACHER).count("is there already") == 2
    run(fetch, "cifar100", TEACHER, f"--dir={tmp_path}/other")
    assert files_below(tmp_path / "other") == ["cifar100/cifar-100-python.tar.gz", "x.pt"]
    assert datasets.load_dataset("cifar100", data_dir=tmp_path / "other").num_classes == 100
    (tmp_path / "other/x.pt").write_bytes(b"damaged")
    run(fetch, TEACHER, f"--dir={tmp_path}/other")
    assert (tmp_path / "other/x.pt").read_bytes() == b"teacher"


@pytest.mark.parametrize(
    ("address", "file", "words"),
    [
        (None, None, "must have a SHA-256 that begins with 0000"),
        (None, "gone.pt", "could not be fetched (HTTP Error 404"),
        ("cut/", None, "x.pt"),
        ("http://127.0.0.1:1/", None, "Connection refused"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_no_file(served, tmp_path, address, file, words):
    source = served[TEACHER]
    address = source.address + address if address == "cut/" else address or source.address
    file = file or "x.pt"
    served[TEACHER] = source._replace(address=address, files={file: "0" * 64})
    for word in (words, f"{address}{file}", f"by hand and put it at {tmp_path}/other/{file}"):
        assert_refuses(word, fetch, TEACHER, f"--dir={tmp_path}/other")
    assert files_below(tmp_path / "other") == []


def test_names_and_folders_that_there_are_not_are_refused(served, tmp_path):
    assert_refuses(f"no 'cifar' to fetch, there are cifar100, {TEACHER}", fetch, "cifar")
    (tmp_path / "file").write_text("")
    assert_refuses("could not be written (", fetch, TEACHER, f"--dir={tmp_path}/file/x")


def test_a_list_says_what_there_is_and_whose_it_is():
    lines = run(fetch).splitlines()
    assert len(lines) == len(sources.SOURCES) == 12
    for line in lines:
        assert " MB  " in line and ("licence" in line or ";" in line)
    for name, source in sources.SOURCES.items():
        for file, digest in source.files.items():
            # The teachers' names carry the digits; other checksums are whole.
            assert digest in file if name.endswith("-teacher") else len(digest) == 64
    assert sources.local_teacher("mine.pt") == "mine.pt"
