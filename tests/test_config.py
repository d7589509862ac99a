"""Settings: where they come from, how their values are written, and what errors say."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker import config
from jobworker.config import Settings, load, options, parse_address, parse_bytes, parse_seconds
from jobworker.errors import SettingError

# One value of each that is not the default, as text and as what it means.
VALUES: dict[str, tuple[str, Any]] = {
    "addr": ("127.0.0.1:1", "127.0.0.1:1"),
    "cert_path": ("/c", Path("/c")),
    "clients": ("/clients.toml", Path("/clients.toml")),
    "state_dir": ("/s", Path("/s")),
    "cgroup_base": ("/g", Path("/g")),
    "default_cpu": ("50", 50),
    "default_memory": ("64", 64),
    "default_io": ("1000", 1000),
    "default_pids": ("64", 64),
    "linger": ("500ms", 0.5),
    "stop_grace": ("1m", 60.0),
    "stop_jobs": ("yes", True),
    "profile": ("none", "none"),
    "profiles_allowed": ("none, default", ("none", "default")),
    "job_user": ("daemon", "daemon"),
    "users_allowed": ("daemon,www-data", ("daemon", "www-data")),
    "strict_uids": ("3000000-3065535", range(3000000, 3065536)),
    "hidden": ("/srv/secret, /opt//own/", (Path("/srv/secret"), Path("/opt/own"))),
    "roots_allowed": ("/srv/r, /srv/q/", (Path("/srv/r"), Path("/srv/q"))),
    "binds_allowed": ("/srv/a,/srv/b:ro", ("/srv/a", "/srv/b:ro")),
    "tmp_size": ("1GiB", 1 << 30),
    "tmp_files": ("1000", 1000),
    "log_max_bytes": ("10M", 10 << 20),
    "log_policy": ("head", "head"),
    "keep_jobs": ("1000", 1000),
    "keep_time": ("30d", 30 * 86400.0),
    "keep_bytes": ("5GiB", 5 << 30),
    "disk_reserve": ("64KiB", "65536"),
    "disk_full": ("drop", "drop"),
    "ring_memory": ("1MiB", 1 << 20),
    "revoked": ("/r", Path("/r")),
    "audit_log": ("/a", Path("/a")),
    "client_calls": ("7", 7),
    "client_streams": ("8", 8),
    "connections": ("900", "900"),
    "log_level": ("DEBUG", "debug"),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "jobworker.toml"
    path.write_text(text)
    return path


def refusal(flags: dict[str, str], environ: dict[str, str], file: Path | None) -> SettingError:
    with pytest.raises(SettingError) as caught:
        load(flags, environ, file)
    return caught.value


# Where they come from


def test_the_defaults_that_existing_users_have() -> None:
    settings = load({}, {}, None)
    assert settings == Settings()
    assert settings.address == "0.0.0.0:50051"
    assert settings.cert_path == Path.cwd() / "certs"
    assert settings.cgroup_base == Path("/sys/fs/cgroup")
    assert (settings.default_cpu, settings.default_memory, settings.default_io) == (100, 512, 0)


@pytest.mark.parametrize("name", [option.name for _, option in options()])
def test_each_setting_is_set_in_each_place(name: str, tmp_path: Path) -> None:
    (field, option) = next(pair for pair in options() if pair[1].name == name)
    text, value = VALUES[name]
    assert getattr(Settings(), field.name) != value
    file = write(tmp_path, f'{name} = "{text}"\n')
    for settings in (
        load({name: text}, {}, None),
        load({}, {option.variable: text}, None),
        load({}, {}, file),
        load({}, {config.FILE_VARIABLE: str(file)}, None),
    ):
        assert settings == dataclasses.replace(Settings(), **{field.name: value})


def test_the_names_are_one_name() -> None:
    names = {(option.name, option.variable, option.flag) for _, option in options()}
    assert ("addr", "JOB_WORKER_ADDR", "--addr") in names
    assert ("default_cpu", "JOB_WORKER_DEFAULT_CPU", "--default-cpu") in names
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", name) for name, _, _ in names)


def test_flags_then_the_environment_then_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "default_cpu = 1\ndefault_memory = 1\ndefault_io = 1\n")
    environ = {"JOB_WORKER_DEFAULT_CPU": "2", "JOB_WORKER_DEFAULT_MEMORY": "2"}
    settings = load({"default_cpu": "3"}, environ, file)
    assert (settings.default_cpu, settings.default_memory, settings.default_io) == (3, 2, 1)


def test_a_file_that_is_given_is_stronger_than_the_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "default_cpu = 1\n")
    assert load({}, {config.FILE_VARIABLE: "/no/such/file"}, file).default_cpu == 1


def test_other_variables_are_not_ours() -> None:
    assert load({}, {"JOB_WORKER_UNKNOWN": "x", "PATH": "y"}, None) == Settings()


def test_lists_in_the_file(tmp_path: Path) -> None:
    text = 'profiles_allowed = ["strict", "none"]\nusers_allowed = []\nhidden = ["/srv", "/mnt"]'
    settings = load({}, {}, write(tmp_path, text))
    assert settings.profiles_allowed == ("strict", "none")
    assert settings.users_allowed == ()
    assert settings.hidden == (Path("/srv"), Path("/mnt"))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('linger = ["2s"]', "give one value"),
        ('users_allowed = ["a,b"]', '["one", "two"]'),
        ("users_allowed = [1]", '["one", "two"]'),
    ],
)
def test_lists_in_the_file_that_cannot_be(tmp_path: Path, text: str, remedy: str) -> None:
    assert remedy in refusal({}, {}, write(tmp_path, text)).remedy


def test_values_in_the_file_need_no_quotes(tmp_path: Path) -> None:
    file = write(
        tmp_path, "linger = 0.5\nstop_grace = 3\nstop_jobs = true\nring_memory = 1_000_000\n"
    )
    settings = load({}, {}, file)
    assert (settings.linger_seconds, settings.stop_grace_seconds) == (0.5, 3.0)
    assert settings.stop_jobs is True
    assert settings.ring_memory_bytes == 1_000_000


# What errors say


def test_an_error_names_the_place_the_value_and_the_remedy(tmp_path: Path) -> None:
    file = write(tmp_path, 'default_cpu = "much"\n')
    for error, place in (
        (refusal({"default_cpu": "much"}, {}, None), "--default-cpu"),
        (refusal({}, {"JOB_WORKER_DEFAULT_CPU": "much"}, None), "JOB_WORKER_DEFAULT_CPU"),
        (refusal({}, {}, file), f"default_cpu in {file}"),
    ):
        assert error.setting == place
        assert error.value == "much"
        assert str(error).startswith(f"{place} = 'much': cannot be used; use a whole number from 0")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("addr", text) for text in ("", "localhost", "localhost:", "h:x", "h:65536", "::1:80")],
        *[("addr", text) for text in ("h:-1", "h:٥٠", "[::1:80", "http://h:80", "h:080808")],
        *[
            (name, text)
            for name in ("cert_path", "state_dir", "cgroup_base")
            for text in ("", "\0")
        ],
        ("state_dir", "~no-such-user/x"),
        *[("default_cpu", text) for text in ("", "-1", "1.5", "x", "50%", "1_0", "٥", "9" * 20)],
        *[("default_memory", text) for text in ("2147483648", "512MiB")],
        *[("linger", text) for text in ("", "x", "-1", "1w", "1 2", "inf", "nan", "1e3", "٥s")],
        *[("stop_grace", text) for text in ("9" * 400, "36501d")],
        *[("ring_memory", text) for text in ("", "x", "-1", "1PiB", "1.5.2", "9" * 400, "٥k")],
        *[("stop_jobs", text) for text in ("", "maybe", "2")],
        *[("log_level", text) for text in ("", "loud", "warn")],
    ],
)
def test_what_cannot_be_used(name: str, text: str) -> None:
    error = refusal({name: text}, {}, None)
    assert error.setting == "--" + name.replace("_", "-")
    assert str(error).endswith(error.remedy)
    assert error.remedy.startswith(("use ", "give ", "put "))


def test_a_misspelt_setting_in_the_file(tmp_path: Path) -> None:
    error = refusal({}, {}, write(tmp_path, "default_mem = 5\n"))
    assert error.remedy == "did you mean default_memory?"
    error = refusal({}, {}, write(tmp_path, "zzz = 5\n"))
    assert all(option.name in error.remedy for _, option in options())


@pytest.mark.parametrize(
    "text", ["linger = [1]", "linger = {a = 1}", "[linger]", "linger = 2020-01-01", "linger = true"]
)
def test_a_value_in_the_file_that_is_none(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    assert refusal({}, {}, file).setting == f"linger in {file}"


@pytest.mark.parametrize(
    "content",
    [b"linger = ", b"linger 2", b"\xff\xfe", b"a = 1\na = 2", b"a = " + 3000 * b"["],
)
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "jobworker.toml"
    path.write_bytes(content)
    error = refusal({}, {}, path)
    assert str(path) in str(error)
    assert "is not TOML" in error.problem


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        for error in (
            refusal({}, {}, path),
            refusal({}, {config.FILE_VARIABLE: str(path)}, None),
        ):
            assert str(path) in str(error)
            assert error.problem.startswith("cannot be read: ")


def test_a_pipe_is_read_where_a_shell_hands_it_on(tmp_path: Path) -> None:
    """As in --config <(...); one with a name would be waited for."""
    ours, theirs = os.pipe()
    os.write(theirs, b"linger = 7")
    os.close(theirs)
    with contextlib.closing(os.fdopen(ours)):
        assert load({}, {}, Path(f"/dev/fd/{ours}")).linger_seconds == 7
    os.mkfifo(tmp_path / "pipe")
    assert refusal({}, {}, tmp_path / "pipe").problem == "is no ordinary file"


def test_a_user_without_a_home_folder_must_give_the_state_folder() -> None:
    """Such as a container's arbitrary one."""
    if os.getuid() != 0:
        pytest.skip("only root can become a user that does not exist")
    program = """if True:
        import os
        from jobworker.config import load
        from jobworker.errors import SettingError
        os.chdir("/")
        os.setuid(54321)
        assert str(load({"state_dir": "/s"}, {}, None).state_dir) == "/s"
        try:
            load({}, {}, None)
        except SettingError as error:
            print(error)
    """
    answer = subprocess.run(
        [sys.executable, "-c", program], env={}, capture_output=True, text=True, check=False
    )
    assert answer.stderr == ""
    assert answer.stdout.startswith("JOB_WORKER_STATE_DIR = ''")


def test_the_state_folder_of_root_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert Settings().state_dir == Path("/var/lib/jobworker")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert Settings().state_dir == Path("/home/x/.local/state/jobworker")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the standard says to ignore
    assert Settings().state_dir == Path("/home/x/.local/state/jobworker")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert Settings().state_dir == Path("/xdg/jobworker")


# How values are written


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("localhost:0", "localhost:0"),
        ("[::1]:50051", "[::1]:50051"),
        ("[fe80::1%eth0]:65535", "[fe80::1%eth0]:65535"),
        (":50051", "0.0.0.0:50051"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0), ("2", 2.0), ("0.5", 0.5), ("2.", 2.0), ("500ms", 0.5), ("2s", 2.0),
        ("5m", 300.0), ("1.5 h", 5400.0), (" 7d ", 604800.0),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("1048576", 1 << 20), ("10B", 10), ("64KiB", 64 << 10), ("10M", 10 << 20),
        ("10mb", 10 << 20), ("1.5 GiB", 3 << 29), ("2T", 2 << 40), ("0.1k", 102),
        ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@given(st.text())
def test_any_text_is_a_value_or_an_error_that_says_so(text: str) -> None:
    for _, option in options():
        with contextlib.suppress(ValueError):
            option.parse(text)


# Documentation


def test_the_table_has_every_setting() -> None:
    lines = config.table().splitlines()
    assert len(lines) == 2 + len(VALUES)
    for _, option in options():
        (line,) = [line for line in lines if f"`{option.variable}`" in line]
        assert f"`{option.flag}`" in line
        assert option.help in line
        assert line.count(" | ") == 3


def test_the_default_that_is_shown_is_the_default() -> None:
    for field, option in options():
        # Those depend on the user, and on this one `none` is no value.
        no_value = {"clients", "state_dir", "profile", "users_allowed", "strict_uids"}
        no_value |= {"revoked", "audit_log", "roots_allowed", "binds_allowed"}
        if option.name not in no_value:
            assert option.parse(option.shown_default) == getattr(Settings(), field.name)


def test_readme_has_the_table_of_all_settings() -> None:
    """To renew it: python -c 'from jobworker import config; print(config.table())'"""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert config.table() in readme
