"""Files of data sets: fetching them, reading their members, naming their contents, keeping what was made from them.

Nothing here imports torch, so that launch code can name the data of a run at once.
"""

import hashlib
import http.client
import io
import json
import lzma
import os
import pickle
import re
import stat
import tarfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module, resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from filelock import FileLock

from metalearn.paths import cache_dir

_BLOCK = 1 << 18

Checksum = Literal["warn", "error", "off"]
"""What it means if files are not byte for byte the published ones."""


def class_lists(name: str) -> dict[str, Any]:
    """A list of classes that ships with the package, `splits/<name>.json` (source and commit in the file)."""
    file = resources.files("metalearn.datasets") / "splits" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def checksum(path: Path, algorithm: str) -> str:
    """Hex digest of a file by `md5` or `sha256`."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends, and vanishes if the block raises.

    Two writers at once need a lock (the unfinished file is `<path>.part`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def writable(folder: Path) -> bool:
    """Whether files may be made in `folder`; a folder without any write bit says no to the superuser too."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def cached_file(name: str, beside: Path, build: Callable[[BinaryIO], None]) -> Path:
    """A derived file, made once: in the folder `beside`, or in `cache_dir()` if that one is not writable.

    Args:
        name: of the file; everything that its bytes depend on belongs into it.
        beside: folder of the data.
        build: writes the file; called by one process at a time, and only if the file is in neither folder.

    Returns:
        Where the file is.
    """
    for folder in (beside, cache_dir()):
        if (folder / name).exists():
            return folder / name
    target = (beside if writable(beside) else cache_dir()) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with atomic(target) as file:
                build(file)
    return target


def file_stamp(path: Path) -> str:
    """Changes when a file changes: its place, size and time of modification."""
    info = path.stat()
    return f"{path.resolve()}:{info.st_size}:{info.st_mtime_ns}"


class Member(NamedTuple):
    """A file in an archive: `/`-separated name below the archive's root, and size in bytes."""

    name: str
    size: int


def _refuse_outside(name: str, source: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"{source} has the member {name!r}, which leads out of the archive; refusing to read it")


class Members(ABC):
    """The files of an archive, read in place; use it as a context manager.

    Members that lead out of the archive (absolute names, `..`, links) are refused with a ValueError.
    """

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def members(self) -> list[Member]:
        """All files, in no particular order."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file."""

    @abstractmethod
    def crc32(self, name: str) -> int:
        """CRC-32 of the bytes of a file."""

    @abstractmethod
    def stamp(self) -> str:
        """Changes when the contents change: place, sizes and times of modification, without reading any file."""

    @abstractmethod
    def close(self) -> None:
        """Let go of open files."""

    def __enter__(self) -> "Members":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ZipMembers(Members):
    """The files of a zip archive; opened at the first need."""

    _zip: zipfile.ZipFile | None = None

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            opened = zipfile.ZipFile(self.path)
            for info in opened.infolist():
                _refuse_outside(info.filename, self.path)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise ValueError(f"{self.path} has the link {info.filename!r}; refusing to read it")
            self._zip = opened
        return self._zip

    def members(self) -> list[Member]:
        """All files, in the order of the archive's directory."""
        return [Member(i.filename, i.file_size) for i in self._open().infolist() if not i.is_dir()]

    def read(self, name: str) -> bytes:
        """The bytes of a file, compared with its CRC-32."""
        return self._open().read(name)

    def crc32(self, name: str) -> int:
        """CRC-32 from the archive's directory."""
        return self._open().getinfo(name).CRC

    def stamp(self) -> str:
        """Place, size and time of the archive."""
        return file_stamp(self.path)

    def close(self) -> None:
        """Close the archive."""
        if self._zip is not None:
            self._zip.close()
            self._zip = None


class TreeMembers(Members):
    """The files below a folder; of its own entries only those whose names match `only`."""

    def __init__(self, path: Path, only: str = ".*"):
        super().__init__(path)
        self._real, self._only = os.path.realpath(path), re.compile(only)

    def _walk(self, folder: str, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if not prefix and not self._only.fullmatch(entry.name):
                    continue
                if entry.is_symlink():
                    raise ValueError(f"{self.path} has the link {prefix + entry.name!r}; refusing to read it")
                if entry.is_dir():
                    yield from self._walk(entry.path, f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name, entry.stat()

    def members(self) -> list[Member]:
        """All files, by name."""
        return [Member(name, info.st_size) for name, info in self._walk(str(self.path))]

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        _refuse_outside(name, self.path)
        file = os.path.join(self._real, name)
        if os.path.realpath(file) != os.path.normpath(file):
            raise ValueError(f"{self.path} has the link {name!r}; refusing to read it")
        with open(file, "rb") as opened:
            return opened.read()

    def crc32(self, name: str) -> int:
        """CRC-32, computed."""
        return zlib.crc32(self.read(name))

    def stamp(self) -> str:
        """Place of the tree, names, sizes and times of its files."""
        files = [(name, info.st_size, info.st_mtime_ns) for name, info in self._walk(str(self.path))]
        return json.dumps([self._real, files])

    def close(self) -> None:
        """Nothing is open between calls."""


class TarMembers(Members):
    """The files of a tar archive, compressed or not; opened at the first need.

    A compressed archive can only be read forwards: read its members in the order of `members()`.
    """

    _tar: tarfile.TarFile | None = None

    def __init__(self, path: Path):
        super().__init__(path)
        self._files: dict[str, tarfile.TarInfo] = {}

    def _open(self) -> dict[str, tarfile.TarInfo]:
        if self._tar is None:
            try:
                self._tar = tarfile.open(self.path)
                for info in self._tar:
                    self._note(info)
                while self._tar.fileobj is not None and self._tar.fileobj.read(_BLOCK):  # to a gzip's checksum
                    pass
            except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                self.close()
                raise self._broken(error) from None
        return self._files

    def _note(self, info: tarfile.TarInfo) -> None:
        _refuse_outside(info.name, self.path)
        if info.isdir():
            return
        if not info.isfile():
            kind = "link" if info.issym() or info.islnk() else "special file"
            raise ValueError(f"{self.path} has the {kind} {info.name!r}; refusing to read it")
        self._files[str(PurePosixPath(info.name))] = info  # a later member of the same name takes its place

    def _broken(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} ({self.path.stat().st_size} bytes) is not a complete tar archive: {error}")

    def members(self) -> list[Member]:
        """All files, in the order of the archive."""
        return sorted(
            (Member(name, info.size) for name, info in self._open().items()),
            key=lambda member: self._files[member.name].offset,
        )

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        _refuse_outside(name, self.path)
        info = self._open()[name]
        assert self._tar is not None
        opened = self._tar.extractfile(info)
        assert opened is not None
        try:
            data = opened.read()
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise self._broken(error) from None
        return data

    def crc32(self, name: str) -> int:
        """CRC-32, computed."""
        return zlib.crc32(self.read(name))

    def stamp(self) -> str:
        """Place, size and time of the archive."""
        return file_stamp(self.path)

    def close(self) -> None:
        """Close the archive."""
        if self._tar is not None:
            self._tar.close()
        self._tar, self._files = None, {}


def open_members(path: Path, only: str = ".*") -> Members:
    """The files of a zip or tar archive, or of a folder.

    Args:
        path: of the archive or folder.
        only: which entries of a folder count, as a regular expression for their whole names.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if `path` is none of these.
    """
    if path.is_dir():
        return TreeMembers(path, only)
    if not path.exists():
        raise FileNotFoundError(f"no archive or folder at {path}")
    if zipfile.is_zipfile(path):
        return ZipMembers(path)
    if is_tar(path):
        return TarMembers(path)
    raise ValueError(f"{path} ({path.stat().st_size} bytes) is neither a folder nor a complete zip or tar archive")


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar archive, compressed or not."""
    try:
        return path.is_file() and tarfile.is_tarfile(path)
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return False


def select(source: Members, pattern: re.Pattern[str]) -> dict[str, Member]:
    """The members that `pattern` finds, by its first group: the path that does not depend on packing.

    Raises:
        ValueError: if two members have the same path.
    """
    found: dict[str, Member] = {}
    for member in source.members():
        match = pattern.search(member.name)
        if match is None:
            continue
        if match[1] in found:
            raise ValueError(f"{source.path} holds {match[1]} twice: {found[match[1]].name} and {member.name}")
        found[match[1]] = member
    return found


def digest(value: object) -> str:
    """Sixteen hex digits that name plain data."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def combined_hash(*parts: str) -> str:
    """Sixteen hex digits that name several contents, in their order."""
    return digest(parts)


def content_hash(
    sources: Sequence[Path],
    pattern: re.Pattern[str],
    verify: Callable[[dict[Path, list[str]]], None] | None = None,
) -> str:
    """Sixteen hex digits that name the contents of archives or trees: equal for an archive and its unpacked tree.

    The hash goes over the sorted (path, size, CRC-32) of the files. It is kept in `cache_dir()` under the places,
    sizes and times of modification of the sources, so that the next call need not list or read them.

    Args:
        sources: zip or tar archives, or folders.
        pattern: which members count; its first group is the path that enters the hash (see `select`).
        verify: called with the paths in each source before a new hash is made; raises if they are not as they should.

    Raises:
        ValueError: if a path occurs twice in a source.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_members(path)) for path in sources]

        def compute() -> str:
            found = [(source, select(source, pattern)) for source in opened]
            if verify is not None:
                verify({source.path: list(files) for source, files in found})
            return digest(sorted((path, m.size, s.crc32(m.name)) for s, files in found for path, m in files.items()))

        return remembered([pattern.pattern, *(m.stamp() for m in opened)], compute)


def remembered(what: object, compute: Callable[[], str]) -> str:
    """Hex digits that take long to compute, kept in `cache_dir()` under everything that they depend on.

    Args:
        what: plain data that changes when the digits do: a purpose, and places, sizes and times of files.
        compute: gives at least 16 hex digits.
    """
    kept = cache_dir() / "content_hash" / digest(what)
    if (value := _read_kept(kept)) is None:
        value = compute()
        _keep(kept, value)
    return value


def _read_kept(path: Path) -> str | None:
    try:
        value = path.read_text()
    except OSError:
        return None
    return value if re.fullmatch("[0-9a-f]{16,64}", value) else None


def _keep(path: Path, value: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path.parent}.lock"), atomic(path) as file:
            file.write(value.encode())
    except OSError:  # a cache that cannot be written costs time, nothing else
        pass


def verify_counts(
    path: Path, found: Mapping[str, int], expected: Collection[str], count: int, *, classes: str, items: str
) -> None:
    """Check that all classes are there with their number of pictures.

    Args:
        path: where they are.
        found: pictures of each class.
        expected: names of the classes.
        count: pictures that each should have.
        classes: what the message calls the expected classes, as `characters of images_background`.
        items: what it calls the pictures, as `drawings`.

    Raises:
        ValueError: names what is missing, incomplete or not expected.
    """
    problems = {
        "missing": [c for c in expected if c not in found],
        f"without exactly {count} {items}": [f"{c} ({found[c]})" for c in expected if found.get(c, count) != count],
        "not expected": sorted(set(found) - set(expected)),
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_shortened(which)}" for what, which in problems.items() if which)
        raise ValueError(f"{path} holds {len(found)} of the {len(expected)} {classes}; {listed}")


def _shortened(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def verify_md5(what: str, official: Mapping[Path, str], policy: Checksum) -> None:
    """Compare files with the published ones; a file that did not change is read only once.

    Args:
        what: their name in the message, as `the official Omniglot archives`.
        official: published md5 of each file.
        policy: see `differs`.

    Raises:
        ValueError: if `policy` is `error` and a file is another one.
    """
    if policy == "off":
        return
    found = {path: remembered(["md5", file_stamp(path)], partial(checksum, path, "md5")) for path in official}
    other = [f"{path} (md5 {found[path]}, official {md5})" for path, md5 in official.items() if found[path] != md5]
    if other:
        differs(f"not {what}, perhaps packed anew: {', '.join(other)}", policy)


def differs(message: str, policy: Checksum) -> None:
    """Say that data are not the published ones: one warning, or, if `policy` is `error`, a ValueError."""
    if policy == "error":
        raise ValueError(f"{message}; replace them, or set dataset.checksum=warn (contents are counted anyway)")
    if policy == "warn":
        warnings.warn(f"{message}; using them, since contents are counted (dataset.checksum)", stacklevel=2)


ARRAYS = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        *(("builtins", name) for name in ("bytearray", "complex", "frozenset", "set")),
    }
)
"""What a pickle of arrays in lists and dictionaries may refer to, by its name in numpy 1."""


class _Refused(Exception):
    """What a pickle holds must not be read."""


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses everything that is not in `ARRAYS`, by name, before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _from_latin1
        known = {"__builtin__": "builtins"}.get(module, module.replace("numpy._core.", "numpy.core."))
        if (known, name) not in ARRAYS:
            raise _Refused(f"refers to {module}.{name}; refusing to read it, because pickles can run any code")
        if name == "dtype":
            return _dtype
        if known.startswith("numpy.core."):  # moved in numpy 2, which warns of the old name
            current = known.replace("numpy.core.", "numpy._core.")
            known = current if hasattr(import_module("numpy"), "_core") else known
        return getattr(import_module(known), name)


def _from_latin1(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them at protocol 2."""
    if encoding != "latin1":
        raise _Refused(f"has bytes in the encoding {encoding!r}; expected 'latin1'")
    return text.encode("latin1")


def _dtype(name: str, align: int = 0, copy: int = 1) -> Any:
    """numpy's type; old pickles have numbers for its two switches, of which numpy 2.4.0 warns."""
    return import_module("numpy").dtype(name, bool(align), bool(copy))


def read_pickle(data: bytes, name: str) -> dict[str, Any]:
    """A pickled dictionary of arrays, lists, texts and numbers; nothing else can be in it, so no code runs.

    Args:
        data: the pickle; texts of Python 2 are read as Latin-1.
        name: of the file, for messages.

    Raises:
        ValueError: if it refers to anything but numpy's arrays and some built-in containers, or is no such dictionary.
    """
    try:
        value = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _Refused as error:
        raise ValueError(f"{name} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{name} is not a complete pickle: {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}; expected a dictionary")
    return {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in value.items()}


class DownloadError(OSError):
    """A download that failed; the message says what to do by hand."""


class _Interrupted(OSError):
    """A transfer that may be taken up again."""


class Remote(NamedTuple):
    """A file on the network: address, size in bytes, and one or both checksums in hex digits."""

    url: str
    size: int
    sha256: str | None = None
    md5: str | None = None

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this size and these checksums."""
        wanted = {"sha256": self.sha256, "md5": self.md5}
        return path.stat().st_size == self.size and all(checksum(path, k) == v for k, v in wanted.items() if v)


def download(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str | None = None,
    md5: str | None = None,
    attempts: int = 3,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file of known size and checksum, unless it is there already.

    The bytes go to `<target>.part`, which takes the target's place when its checksum is right. A cut transfer is
    taken up where it stopped, in the same call or the next one; if the result is wrong, it starts over. Runs at the
    same time wait for each other (`<target>.lock`).

    Args:
        url: http or https address.
        target: path of the file.
        size: in bytes.
        sha256: hex digits, or None if only the other checksum is known.
        md5: the same; at least one of the two.
        attempts: transfers tried before giving up.
        timeout: seconds without an answer after which a transfer counts as cut.

    Returns:
        `target`.

    Raises:
        ValueError: if there is no checksum, or the address is not http(s).
        DownloadError: if the file cannot be had, or another file is at `target` (it is left alone).
    """
    remote = Remote(url, size, sha256, md5)
    if not (sha256 or md5):
        raise ValueError(f"no checksum for {url}")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"not an http(s) address: {url}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            if not remote.matches(target):
                raise _failure(remote, target, "another file is in its place; move it away to fetch this one")
            return target
        part = target.with_name(target.name + ".part")
        _fetch(remote, target, part, attempts, timeout)
        os.replace(part, target)
    return target


def _failure(remote: Remote, target: Path, problem: object) -> DownloadError:
    digest = f"sha256 {remote.sha256}" if remote.sha256 else f"md5 {remote.md5}"
    return DownloadError(
        f"cannot download {remote.url} to {target}: {problem}. By hand: fetch that address ({remote.size} bytes, "
        f"{digest}) on a machine with network access and put the file at {target}"
    )


def _fetch(remote: Remote, target: Path, part: Path, attempts: int, timeout: float) -> None:
    """Leave the right bytes at `part`, or raise."""
    problem: object = None
    for _ in range(attempts):
        resumed = part.exists()
        try:
            _transfer(remote, part, timeout)
        except DownloadError as error:
            raise _failure(remote, target, error) from None
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the server's file ends before ours
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise _failure(remote, target, error) from error
            problem = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
        else:
            if remote.matches(part):
                return
            part.unlink()
            problem = "its checksum is wrong"
            if not resumed:
                break
    raise _failure(remote, target, problem)


def _transfer(remote: Remote, part: Path, timeout: float) -> None:
    """One request: complete `part`, or raise `_Interrupted` and keep what came."""
    start = part.stat().st_size if part.exists() else 0
    if start == remote.size:
        return
    if start > remote.size:
        part.unlink()
        start = 0
    headers = {"User-Agent": "metalearn"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=timeout) as response:
        block = response.read(_BLOCK)
        resumes = _resumes(response, start, part)
        _refuse_other(response, block, remote.size, whole=not resumes)
        with open(part, "ab" if resumes else "wb") as file:
            while block:
                file.write(block)
                if file.tell() > remote.size:
                    break
                block = response.read(_BLOCK)
            file.flush()
            os.fsync(file.fileno())
    if part.stat().st_size < remote.size:
        raise _Interrupted(f"the connection was cut after {part.stat().st_size} of {remote.size} bytes")


def _resumes(response: http.client.HTTPResponse, start: int, part: Path) -> bool:
    """Whether the answer goes on at byte `start`; a server that ignores Range sends the whole file."""
    if response.status != 206:
        return False
    offered = response.headers.get("Content-Range", "")
    if start and offered.startswith(f"bytes {start}-"):
        return True
    part.unlink(missing_ok=True)
    raise _Interrupted(f"the server answered with the range {offered!r} instead of bytes {start}-")


def _refuse_other(response: http.client.HTTPResponse, block: bytes, size: int, *, whole: bool) -> None:
    """Raise if this is a page instead of the file (a login, a quota), or a file of another size."""
    page = response.headers.get_content_type() in ("text/html", "application/xhtml+xml")
    if page or (whole and block.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))):
        raise DownloadError("the server sent an HTML page instead of the file")
    length = response.headers.get("Content-Length")
    if whole and length is not None and int(length) != size:
        raise DownloadError(f"the server offers {length} bytes instead of {size}")
