import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg", ".pdf"}
ARRAYS = {".npy", ".npz", ".pt", ".ckpt", ".h5", ".hdf5", ".parquet", ".zip", ".gz"}
COMMON = {"/", "/home", "/mnt", "/opt", "/srv", "/tmp", "/usr", "/var"}  # on every machine


def run(*command, cwd, **env) -> str:
    """The standard output; on failure both streams are in the message."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def normal(name: str) -> str:
    """A distribution's name as the packaging rules compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name -> version of constraints.txt; fails on a line that is no exact pin."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)(; python_version >= \"3\.\d+\")?", line)
            assert match, f"not an exact pin: {line}"
            assert match[1] not in found, f"pinned twice: {match[1]}"
            found[match[1]] = match[2]
    return found


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["build-system"]["requires"])
    wanted += project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    wanted += re.search(r"--no-deps (.+)", (ROOT / "Makefile").read_text())[1].split()  # torchmeta and its needs
    names = {normal(re.match(r"[A-Za-z0-9._-]+", w)[0]) for w in wanted}
    assert not names - pins().keys()


def test_no_pin_names_a_gpu_build():
    assert not [name for name in pins() if "nvidia" in name or "cuda" in name]


def machine_paths() -> set[str]:
    """The repository, what holds it, and the home directory."""
    return {str(ROOT), str(ROOT.parent), str(Path.home())} - COMMON


def occurrences(path: str, text: bytes) -> list[bytes]:
    """Lines that hold an absolute path: `/a` in `=/a/b` and `file:///a`, but neither in `x/a` nor in `/ab`."""
    pattern = re.compile(rb"^.*(?<![\w.>)}*-])" + re.escape(path.encode()) + rb"(?![\w-]).*$", re.MULTILINE)
    return pattern.findall(text)


@pytest.mark.parametrize(
    "text, found",
    [
        (b"root: /a/b", 1),
        (b"file:///a/b/c", 1),
        (b"x /a/bc", 0),
        (b"data/a/b", 0),
        (b"<root>/a/b", 0),
        (b"/a/b\n/a/b", 2),
    ],
)
def test_occurrences(text, found):
    assert len(occurrences("/a/b", text)) == found


def test_no_tracked_file_names_this_machine():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    tracked = [ROOT / f for f in run("git", "-c", "safe.directory=*", "ls-files", "-z", cwd=ROOT).split("\0") if f]
    contents = {f: f.read_bytes() for f in tracked if f.is_file()}
    found = [
        f"{file.relative_to(ROOT)}: {line[:120]!r}"
        for file, text in contents.items()
        for path in machine_paths()
        for line in occurrences(path, text)
    ]
    assert not found


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the working tree, so that a build leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("tree") / "metalearn"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "outputs", "build", "dist"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheels(tree, tmp_path_factory) -> dict[str, Path]:
    """One wheel built from the tree, one from the source distribution."""
    found = {}
    for origin, options in {"tree": ["--wheel"], "sdist": []}.items():
        out = tmp_path_factory.mktemp(origin)
        run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, cwd=tree)
        (found[origin],) = out.glob("*.whl")
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("origin", ["tree", "sdist"])
def test_wheel_holds_code_conf_and_splits_only(origin, wheels, tree):
    with zipfile.ZipFile(wheels[origin]) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    yaml = {f"metalearn/{path.relative_to(tree)}" for path in (tree / "conf").rglob("*.yaml")}
    code = {str(path.relative_to(tree)) for path in (tree / "metalearn").rglob("*.py")}
    splits = {str(path.relative_to(tree)) for path in (tree / "metalearn/datasets/splits").glob("*.json")}
    assert "metalearn/conf/config.yaml" in files
    assert not (yaml | code | splits) - files.keys()
    assert splits
    assert any(re.fullmatch(r"metalearn-[^/]+\.dist-info/licenses/LICENSE", name) for name in files)
    assert not [name for name in files if Path(name).suffix.lower() in PICTURES | ARRAYS]
    for content in files.values():
        content.decode()  # text throughout, so no picture under another name either
    assert {name.split("/")[0].split("-")[0] for name in files} == {"metalearn"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_wheels_are_the_same(wheels):
    contents = {}
    for origin, path in wheels.items():
        with zipfile.ZipFile(path) as wheel:
            contents[origin] = {info.filename: info.CRC for info in wheel.infolist()}
    assert contents["tree"] == contents["sdist"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_holds_the_licence(wheels):
    (sdist,) = wheels["sdist"].parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "pyproject.toml", "conf/config.yaml"} <= names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_from_an_installed_wheel(wheels, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run(*pip, "--no-deps", "--no-index", "--target", site, wheels["sdist"], cwd=elsewhere)
    python = {"cwd": elsewhere, "PYTHONPATH": str(site)}
    origin = run(sys.executable, "-c", "import metalearn; print(metalearn.__file__)", **python)
    assert Path(origin.strip()).is_relative_to(site)  # the wheel's, not the checkout's
    assert "algorithm:" in run(sys.executable, "-m", "metalearn", "--cfg", "job", **python)
