"""What `jobworker serve --dev` leaves, by which commands and clients of the same user find it.

It is in ~/.local/share/jobworker/dev, or below XDG_DATA_HOME: `certs`, `state`, and the file
`server` with the address and the folder of certificates of the server that was started last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jobworker.errors import SettingError


def dev_folder(environ: Mapping[str, str]) -> Path:
    return xdg_folder(environ, "XDG_DATA_HOME", ".local/share") / "jobworker" / "dev"


def make_dev_folder(environ: Mapping[str, str]) -> Path:
    """Raises SettingError."""
    folder = dev_folder(environ)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _problem_with(folder, f"cannot be made: {error.strerror}") from error
    return folder


def write_dev_record(environ: Mapping[str, str], address: str, certs: Path) -> None:
    """Raises SettingError."""
    folder = dev_folder(environ)
    try:
        (folder / "server").write_text(f"{address}\n{certs}\n", "utf-8")
    except OSError as error:
        raise _problem_with(folder, f"cannot be written to: {error.strerror}") from error


def _problem_with(folder: Path, problem: str) -> SettingError:
    remedy = "set XDG_DATA_HOME, or HOME, to a folder where you may write"
    return SettingError("the folder of --dev", folder, problem, remedy)


def dev_record(environ: Mapping[str, str]) -> dict[str, str]:
    """Address and certificates of this user's newest development server; {}: there was none."""
    try:
        address, certs = (dev_folder(environ) / "server").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    return {"address": address, "certs": certs}


def xdg_folder(environ: Mapping[str, str], variable: str, default: str) -> Path:
    # The specification: a relative path is to be ignored.
    base = environ.get(variable, "")
    if base.startswith("/"):
        return Path(base)
    try:
        return Path.home() / default
    except RuntimeError:  # neither HOME nor an entry in passwd, as in many containers
        return Path("/") / default
