"""Where public data sets and teachers come from, and how `neumeta fetch` brings them here.

Checksums are those that upstream projects publish: Keras (`keras/src/datasets`) for CIFAR,
tensorflow-datasets (`url_checksums`) for MNIST and Fashion-MNIST; the files of teachers carry the
first 8 hex digits of their SHA-256 in their names, as those of `torch.hub` do.
"""

import hashlib
import http.client
import os
import pathlib
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

from neumeta_jax.errors import UsageError, check
from neumeta_jax.files import storage

_TIMEOUT = 60  # seconds without a byte


class Source(NamedTuple):
    """Files that are fetched together.

    Attributes:
        address: of their folder.
        files: {name: SHA-256 in hex, or how it begins}.
        megabytes: that all of them have at most.
        terms: whose they are, and under which licence.
    """

    address: str
    files: dict[str, str]
    megabytes: int
    terms: str

    @property
    def is_teacher(self) -> bool:
        return next(iter(self.files)).endswith(".pt")


# As sha256sum writes them.
_CIFAR10 = """
6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce  cifar-10-python.tar.gz
"""
_CIFAR100 = """
85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7  cifar-100-python.tar.gz
"""
_MNIST = """
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609  train-images-idx3-ubyte.gz
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c  train-labels-idx1-ubyte.gz
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6  t10k-images-idx3-ubyte.gz
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6  t10k-labels-idx1-ubyte.gz
"""
_FASHION_MNIST = """
3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84  train-images-idx3-ubyte.gz
a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845  train-labels-idx1-ubyte.gz
346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073  t10k-images-idx3-ubyte.gz
67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5  t10k-labels-idx1-ubyte.gz
"""
_TEACHERS = """
4118986f  cifar10_resnet20-4118986f.pt
ef93fc4d  cifar10_resnet32-ef93fc4d.pt
2a3cabcb  cifar10_resnet44-2a3cabcb.pt
187c023a  cifar10_resnet56-187c023a.pt
23dac2f1  cifar100_resnet20-23dac2f1.pt
84213ce6  cifar100_resnet32-84213ce6.pt
ffe32858  cifar100_resnet44-ffe32858.pt
f2eff4c8  cifar100_resnet56-f2eff4c8.pt
"""
_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_CVDF = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"


def _source(address: str, sums: str, megabytes: int, terms: str) -> Source:
    pairs = (line.split() for line in sums.strip().splitlines())
    return Source(address, {file: digest for digest, file in pairs}, megabytes, terms)


SOURCES = {
    "cifar10": _source(_TORONTO, _CIFAR10, 171, "A. Krizhevsky 2009; no licence stated"),
    "cifar100": _source(_TORONTO, _CIFAR100, 170, "A. Krizhevsky 2009; no licence stated"),
    "mnist": _source(_CVDF, _MNIST, 12, "Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0"),
    "fashion_mnist": _source(_ZALANDO, _FASHION_MNIST, 31, "Zalando Research; MIT"),
}
for _line in _TEACHERS.strip().splitlines():
    _name = _line.split()[1].partition("-")[0].replace("_", "-") + "-teacher"
    SOURCES[_name] = _source(_CHENYAOFO, _line, 4, "chenyaofo/pytorch-cifar-models; BSD-3-Clause")


def data_folder() -> pathlib.Path:
    """Where fetched data sets lie, each in a folder of its own."""
    return storage.cache_folder() / "data"


def folder_of(name: str, folder: str | os.PathLike | None = None) -> pathlib.Path:
    """Where the files of a source are put: in `folder`, by default the user's cache."""
    if SOURCES[name].is_teacher:
        return pathlib.Path(folder) if folder else storage.cache_folder() / "teachers"
    return pathlib.Path(folder or data_folder()) / name


def fetch(name: str, folder: str | os.PathLike | None = None) -> Iterator[tuple[str, pathlib.Path]]:
    """Fetches what is not there yet; yields what is done about each file, and its path.

    Raises:
        UsageError: if a file cannot be fetched or is another one; nothing is left of it.
        StorageError: if it cannot be written.
    """
    check(name in SOURCES, f"There is no {name!r} to fetch, there are {', '.join(SOURCES)}.")
    place = folder_of(name, folder)
    with storage.writing(place):
        place.mkdir(parents=True, exist_ok=True)
    for file, digest in SOURCES[name].files.items():
        path = place / file
        if path.is_file() and _digest(path).startswith(digest):
            yield "is there already", path
        else:
            yield f"from {SOURCES[name].address}{file}", path
            _download(SOURCES[name].address + file, path, digest)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: pathlib.Path, digest: str) -> None:
    by_hand = f"fetch it by hand and put it at {path}."
    with storage.replacing(path) as partial:
        with partial.open("wb") as file:
            for piece in _pieces(url, by_hand):
                file.write(piece)
        found = _digest(partial)
        check(
            found.startswith(digest),
            f"{url} must have a SHA-256 that begins with {digest[:16]}, got {found[:16]}, so that "
            f"it is damaged or another file; try again, or {by_hand}",
        )


def _pieces(url: str, by_hand: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            while piece := response.read(2**20):
                yield piece
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{url} could not be fetched ({reason}); {by_hand}") from error


def local_teacher(file: str) -> str:
    """The path of a teacher: `file` itself, or where fetching put what is called so.

    >>> local_teacher("mine.pt")
    'mine.pt'

    Raises:
        UsageError: for the name of a teacher that has not been fetched.
    """
    for name, source in SOURCES.items():
        if source.is_teacher and file in (name, *source.files) and not os.path.exists(file):
            path = folder_of(name) / next(iter(source.files))
            check(path.is_file(), f"{path} is not there; fetch it with `neumeta fetch {name}`.")
            return str(path)
    return file
