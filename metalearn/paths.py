"""Where the configuration lies: beside the package in a wheel, at the top of the repository in a checkout."""

from pathlib import Path


def conf_dir() -> str:
    """The folder of config.yaml.

    Raises:
        FileNotFoundError: if there is none.
    """
    here = Path(__file__).resolve().parent
    checkout = (here.parent / "pyproject.toml").is_file()  # an editable install leaves a stale copy in the package
    for folder in (here.parent / "conf", here / "conf") if checkout else (here / "conf",):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise FileNotFoundError("no conf/ in the package or at the repository root")
