import hashlib
import io
import os
import pickle
import re
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from metalearn.datasets import archives
from metalearn.datasets.archives import (
    DownloadError,
    cache_dir,
    cached_file,
    content_hash,
    download,
    open_members,
    read_pickle,
    remembered,
)

BODY = bytes(i * i % 251 for i in range(600_000))
SHA256, MD5 = hashlib.sha256(BODY).hexdigest(), hashlib.md5(BODY).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Server(ThreadingHTTPServer):
    """Serves `body` on 127.0.0.1; `requests` are the Range headers it got."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.ranges, self.content_type = BODY, True, "application/zip"
        self.shift = 0  # of the range that it claims to send
        self.cuts: list[int] = []  # the first answers stop after so many bytes
        self.status: list[int] = []  # the first answers are these errors
        self.half = threading.Event()  # set when half the body is out
        self.go_on = threading.Event()  # waited for at that point
        self.go_on.set()
        self.requests: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/file.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.requests.append(asked)
        if server.status:
            return self.send_error(server.status.pop(0))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(server.body) - 1}/*")
        self.send_header("Content-Type", server.content_type)
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        sent = server.body[start:][: server.cuts.pop(0) if server.cuts else None]
        self.wfile.write(sent[: len(sent) // 2])
        server.half.set()
        server.go_on.wait(10)
        self.wfile.write(sent[len(sent) // 2 :])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, folder, **options):
    given = {"size": len(BODY), "sha256": SHA256} | options
    return download(server.url, folder / "data" / "file.zip", **given)


def files(folder):
    return sorted(p.name for p in (folder / "data").iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("digest", [{"sha256": SHA256}, {"sha256": None, "md5": MD5}, {"md5": MD5}])
def test_download_gives_the_file_and_nothing_else(server, tmp_path, digest):
    assert fetch(server, tmp_path, **digest).read_bytes() == BODY
    assert files(tmp_path) == ["file.zip"]


def test_a_file_that_is_there_is_not_fetched_again(server, tmp_path):
    fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert server.requests == [None]


def test_another_file_in_its_place_is_left_alone(server, tmp_path):
    fetch(server, tmp_path).write_bytes(b"mine")
    with pytest.raises(DownloadError, match="move it away"):
        fetch(server, tmp_path)
    assert (tmp_path / "data" / "file.zip").read_bytes() == b"mine"


def test_a_cut_transfer_is_taken_up_in_the_same_call(server, tmp_path):
    server.cuts = [1000, 200_000]
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests == [None, "bytes=1000-", "bytes=201000-"]


def test_a_cut_transfer_is_taken_up_by_the_next_call(server, tmp_path):
    server.cuts = [1000]
    with pytest.raises(DownloadError, match="cut after 1000 of 600000 bytes"):
        fetch(server, tmp_path, attempts=1)
    assert files(tmp_path) == ["file.zip.part"]
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests == [None, "bytes=1000-"]
    assert files(tmp_path) == ["file.zip"]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.cuts, server.ranges = [1000], False
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests == [None, "bytes=1000-"]


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(BODY), b"x" * (len(BODY) + 1)], ids=["short", "full", "long"])
def test_a_wrong_part_is_thrown_away(server, tmp_path, part):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.zip.part").write_bytes(part)
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests[-1] is None


def test_an_unsatisfiable_range_starts_over(server, tmp_path):
    server.status = [416]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.zip.part").write_bytes(BODY[:10])
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests == ["bytes=10-", None]


def test_another_range_than_asked_for_starts_over(server, tmp_path):
    server.cuts, server.shift = [1000], 7
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests == [None, "bytes=1000-", None]


def test_a_wrong_checksum_leaves_nothing_and_says_what_to_do(server, tmp_path):
    server.body = BODY[::-1]
    with pytest.raises(DownloadError, match="checksum is wrong") as error:
        fetch(server, tmp_path)
    assert files(tmp_path) == []
    assert len(server.requests) == 1
    for said in (server.url, str(tmp_path / "data" / "file.zip"), "600000 bytes", SHA256, "By hand"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(BODY, "text/html; charset=utf-8"), (b"\n<!DOCTYPE html><p>quota", "application/zip"), (b"<html>", "x/y")],
)
def test_a_page_is_refused(server, tmp_path, body, content_type):
    server.body, server.content_type = body, content_type
    with pytest.raises(DownloadError, match="HTML page"):
        fetch(server, tmp_path, size=len(body))
    assert files(tmp_path) == []


def test_a_page_does_not_spoil_the_part(server, tmp_path):
    server.cuts = [1000]
    with pytest.raises(DownloadError):
        fetch(server, tmp_path, attempts=1)
    server.body, server.ranges = b"<html>log in</html>", False
    with pytest.raises(DownloadError, match="HTML page"):
        fetch(server, tmp_path)
    server.body, server.ranges = BODY, True
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.requests[-1] == "bytes=1000-"


def test_a_file_of_another_size_is_refused(server, tmp_path):
    server.body = BODY[:-1]
    with pytest.raises(DownloadError, match="offers 599999 bytes instead of 600000"):
        fetch(server, tmp_path)


def test_server_errors_are_tried_again_but_not_refusals(server, tmp_path):
    server.status = [404, 503]
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 3


def test_no_connection_is_a_download_error(tmp_path):
    with Server() as server:  # never answers, and its port is closed below
        pass
    with pytest.raises(DownloadError, match=re.escape(server.url)):
        fetch(server, tmp_path)


def test_two_runs_at_once_fetch_once(server, tmp_path):
    server.go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(fetch, server, tmp_path) for _ in range(2)]
        assert server.half.wait(10)
        time.sleep(0.1)  # for the second to arrive
        server.go_on.set()
        assert [run.result(10).read_bytes() for run in runs] == [BODY, BODY]
    assert server.requests == [None]


def test_the_file_appears_only_when_complete(server, tmp_path):
    server.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(fetch, server, tmp_path)
        assert server.half.wait(10)
        assert "file.zip" not in files(tmp_path)
        server.go_on.set()
        assert run.result(10).read_bytes() == BODY


def test_no_checksum_or_another_scheme_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checksum"):
        download("http://127.0.0.1/x", tmp_path / "x", size=1)
    with pytest.raises(ValueError, match="not an http"):
        download("file:///etc/hostname", tmp_path / "x", size=1, md5=MD5)


CONTENTS = {"top/b.txt": b"bee", "top/a/1.txt": b"one", "top/a/2.txt": b"two" * 50_000}
TEXT = re.compile(r"(?:^|/)(\w+\.txt)$")


def make_zip(path: Path, contents=CONTENTS, compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def make_tree(path: Path, contents=CONTENTS) -> Path:
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_tar(path: Path, contents=CONTENTS, mode="w:gz", prefix="./") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tree, make_tar])
def test_members_of_archive_and_tree_are_the_same(tmp_path, make):
    with open_members(make(tmp_path / "source")) as source:
        members = {m.name: m.size for m in source.members()}
        assert members == {name: len(data) for name, data in CONTENTS.items()}
        assert {name: source.read(name) for name in members} == CONTENTS
        assert source.crc32("top/b.txt") == archives.zlib.crc32(b"bee")


@pytest.mark.parametrize(
    "name", ["../x.txt", "a/../../x.txt", "/x.txt", "\\x.txt", "..\\x.txt", "C:\\x.txt", "C:/x.txt"]
)
def test_members_outside_of_the_archive_are_refused(tmp_path, name):
    with open_members(make_zip(tmp_path / "source.zip", {"good.txt": b"", name: b"bad"})) as source:
        with pytest.raises(ValueError, match="leads out of the archive"):
            source.members()
        with pytest.raises(ValueError, match="leads out of the archive"):
            source.read(name)
    with open_members(make_tar(tmp_path / "source.tar", {name: b"bad"}, prefix="")) as source:
        with pytest.raises(ValueError, match="leads out of the archive"):
            source.members()
    with open_members(make_tree(tmp_path / "tree")) as source, pytest.raises(ValueError, match="leads out"):
        source.read(name)


def test_a_damaged_tar_archive_is_refused(tmp_path):
    """Cut anywhere after its first header, or with another checksum at the gzip's end."""
    whole = make_tar(tmp_path / "whole.tgz", CONTENTS | {"big.bin": os.urandom(20_000)}).read_bytes()
    for damaged in (whole[:10_000], whole[:-9], whole[:-8] + bytes(4) + whole[-4:]):
        (tmp_path / "damaged.tgz").write_bytes(damaged)
        with open_members(tmp_path / "damaged.tgz") as source, pytest.raises(ValueError, match="not a complete tar"):
            source.members()


def test_only_some_entries_of_a_tree(tmp_path):
    tree = make_tree(tmp_path / "tree", {"a/x.txt": b"1", "b/x.txt": b"2", "x.txt": b"3", "ax": b"4"})
    with open_members(tree, r"a|x\.txt") as source:
        assert [m.name for m in source.members()] == ["a/x.txt", "x.txt"]
        stamp = source.stamp()
        (tree / "b" / "y.txt").write_bytes(b"5")
        assert source.stamp() == stamp


def test_links_in_an_archive_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    make_zip(tmp_path / "source.zip", {link: b"/etc/passwd"})
    with open_members(tmp_path / "source.zip") as source, pytest.raises(ValueError, match=r"link 'link\.txt'"):
        source.members()


@pytest.mark.parametrize(
    ("kind", "message"), [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "link"), (tarfile.FIFOTYPE, "special file")]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind, message):
    info = tarfile.TarInfo("x.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "source.tar", "w") as archive:
        archive.addfile(info)
    with open_members(tmp_path / "source.tar") as source, pytest.raises(ValueError, match=rf"{message} 'x\.txt'"):
        source.members()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_cut_tar_is_refused(tmp_path, mode):
    noise = {f"{i}.txt": hashlib.sha256(bytes([i])).digest() * 1000 for i in range(9)}
    whole = make_tar(tmp_path / "whole.tar", noise, mode).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) * 2 // 3])
    try:
        source = open_members(tmp_path / "cut.tar")
    except ValueError as error:  # cut within the only block
        assert "nor a complete zip or tar" in str(error)
        return
    with source, pytest.raises(ValueError, match="not a complete tar archive"):
        source.members()


@pytest.mark.parametrize("linked", ["file.txt", "folder"])
def test_links_in_a_tree_are_refused(tmp_path, linked):
    tree, outside = (
        make_tree(tmp_path / "tree"),
        make_tree(tmp_path / "outside", {"file.txt": b"", "folder/x.txt": b""}),
    )
    (tree / "top" / linked).symlink_to(outside / linked)
    with open_members(tree) as source:
        with pytest.raises(ValueError, match="link"):
            source.members()
        with pytest.raises(ValueError, match="link"):
            source.read("top/file.txt" if linked == "file.txt" else "top/folder/x.txt")


def test_a_linked_tree_is_fine(tmp_path):
    make_tree(tmp_path / "tree")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    with open_members(tmp_path / "link") as source:
        assert source.read("top/b.txt") == b"bee"


def test_neither_archive_nor_folder(tmp_path):
    (tmp_path / "cut.zip").write_bytes(make_zip(tmp_path / "whole.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match="neither a folder nor a complete zip or tar"):
        open_members(tmp_path / "cut.zip")
    with pytest.raises(FileNotFoundError):
        open_members(tmp_path / "none.zip")


def test_hash_is_that_of_the_contents(tmp_path):
    """Equal for other packing, compression, depth, place, order and times; 16 hex digits."""
    value = content_hash([make_zip(tmp_path / "a.zip")], TEXT)
    assert re.fullmatch("[0-9a-f]{16}", value)
    assert content_hash([make_zip(tmp_path / "b.zip", compression=zipfile.ZIP_STORED)], TEXT) == value
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        assert content_hash([make_tar(tmp_path / mode.replace(":", "."), mode=mode)], TEXT) == value
    assert content_hash([make_tree(tmp_path / "tree")], TEXT) == value
    assert content_hash([tmp_path / "tree" / "top"], TEXT) == value
    deeper = {f"x/{name}": data for name, data in reversed(CONTENTS.items())} | {"x/readme.md": b"not a text"}
    assert content_hash([make_zip(tmp_path / "c.zip", deeper)], TEXT) == value
    split = [make_zip(tmp_path / f"{i}.zip", {name: CONTENTS[name]}) for i, name in enumerate(CONTENTS)]
    assert content_hash(split, TEXT) == value


@pytest.mark.parametrize(
    "change",
    [
        {"top/b.txt": b"bea"},
        {"top/b.txt": b"beee"},
        {"top/c.txt": b""},
    ],
)
def test_hash_changes_with_the_contents(tmp_path, change):
    tree = make_tree(tmp_path / "tree")
    before = content_hash([tree], TEXT)
    make_tree(tree, change)
    os.utime(tree / next(iter(change)), ns=(1, 1))  # a clock may be coarser than this test
    assert content_hash([tree], TEXT) != before
    assert content_hash([make_zip(tmp_path / "a.zip", CONTENTS | change)], TEXT) == content_hash([tree], TEXT)


@pytest.mark.parametrize("make", [make_zip, make_tar, make_tree])
def test_second_hash_reads_no_contents(tmp_path, make, monkeypatch):
    source = make(tmp_path / "source")
    value = content_hash([source], TEXT)
    for kind in (archives.ZipMembers, archives.TarMembers, archives.TreeMembers):
        monkeypatch.setattr(kind, "read", None)
        monkeypatch.setattr(kind, "crc32", None)
    assert content_hash([source], TEXT) == value


def test_hash_needs_no_cache(tmp_path, monkeypatch):
    source = make_zip(tmp_path / "source.zip")
    value = content_hash([source], TEXT)
    (tmp_path / "file").touch()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "file"))  # cannot be made a folder
    assert content_hash([source], TEXT) == value


def test_refused_contents_are_not_remembered(tmp_path):
    def refuse(found):
        assert [sorted(names) for names in found.values()] == [["1.txt", "2.txt", "b.txt"]]
        raise ValueError("no")

    source = make_zip(tmp_path / "source.zip")
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            content_hash([source], TEXT, refuse)


def test_the_same_path_twice_is_refused(tmp_path):
    source = make_zip(tmp_path / "source.zip", {"x/a.txt": b"1", "y/a.txt": b"2"})
    with pytest.raises(ValueError, match=r"a\.txt twice: x/a\.txt and y/a\.txt"):
        content_hash([source], TEXT)


def test_remembered_is_computed_once_for_what_it_depends_on():
    calls = []

    def compute():
        calls.append(1)
        return f"{len(calls):032x}"

    assert remembered(["a", 1], compute) == remembered(["a", 1], compute) == f"{1:032x}"
    assert remembered(["a", 2], compute) == f"{2:032x}"
    assert len(calls) == 2


ARRAYS = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, np.int64(2)], "names": {"é": {3}, 4: 1.5}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays(protocol):
    found = read_pickle(pickle.dumps(ARRAYS, protocol=protocol), "x.pickle")
    assert found.keys() == ARRAYS.keys() and found["labels"] == [1, 2] and found["names"] == ARRAYS["names"]
    np.testing.assert_array_equal(found["data"], ARRAYS["data"])
    assert found["data"].dtype == np.uint8


def test_pickled_names_in_bytes_are_texts():
    assert read_pickle(pickle.dumps({b"data": b"x"}), "x") == {"data": b"x"}


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ((os.mkdir, ("evil",)), r"(posix|nt)\.mkdir"),
        ((eval, ("1",)), r"(builtins|__builtin__)\.eval"),
        ((getattr, ("", "join")), r"(builtins|__builtin__)\.getattr"),
        ((np.load, ("x.npy",)), r"numpy.*\.load"),
        ((np.frompyfunc, (len, 1, 1)), r"numpy.*\.frompyfunc"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_by_name(call, said, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^x.pickle refers to {said}; refusing to read it, because pickles can run"):
        read_pickle(pickle.dumps({"data": [Calls(*call)]}, protocol=protocol), "x.pickle")
    assert not list(tmp_path.glob("evil"))


def test_a_dotted_name_does_not_lead_out_of_an_allowed_module():
    data = b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93."
    with pytest.raises(ValueError, match=r"refers to numpy\.ndarray\.dumps"):
        read_pickle(data, "x.pickle")


def test_bytes_in_another_encoding_are_refused():
    data = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(ValueError, match="bytes in the encoding 'rot13'"):
        read_pickle(data, "x.pickle")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps(ARRAYS)[:-20], "x.pickle is not a complete pickle"),
        (b"", "x.pickle is not a complete pickle"),
        (b"<html>", "x.pickle is not a complete pickle"),
        (pickle.dumps([1]), "x.pickle holds a list; expected a dictionary"),
    ],
)
def test_a_damaged_or_other_pickle_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        read_pickle(data, "x.pickle")


def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("METALEARN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "metalearn"


def test_cached_file_is_built_once_beside_the_data(tmp_path):
    built = []

    def build(file):
        time.sleep(0.05)
        built.append(file.write(b"derived"))

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: cached_file("x.npy", tmp_path, build), range(4)))
    assert paths == {tmp_path / "x.npy"}
    assert (tmp_path / "x.npy").read_bytes() == b"derived"
    assert len(built) == 1


def test_cached_file_goes_elsewhere_if_the_folder_is_read_only(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o555)  # keeps the superuser away, too
    assert cached_file("x.npy", data, lambda file: file.write(b"derived")) == tmp_path / "cache" / "x.npy"
    assert list(data.iterdir()) == []
    data.chmod(0o755)
    (data / "y.npy").touch()
    data.chmod(0o555)
    assert cached_file("y.npy", data, lambda file: file.write(b"again")) == data / "y.npy"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_file("x.npy", tmp_path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy.lock"]


def test_no_torch_is_imported():
    names = "archives, omniglot_files, cifar_files"
    code = f"import sys; from metalearn.datasets import {names}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
