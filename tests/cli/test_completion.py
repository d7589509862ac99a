"""The scripts for shells, in the shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.program import Program


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_both_names_of_the_program_are_completed(unconnected: Program, shell: str) -> None:
    script = unconnected("completion", shell).stdout
    assert "_JOBWORKER_COMPLETE" in script
    assert "_JOB_WORKER_CLI_COMPLETE" in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_accepts_it(unconnected: Program, shell: str) -> None:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"NOT TESTED: completion in {shell}; install {shell}")
    file = unconnected.folder / "script"
    file.write_text(unconnected("completion", shell).stdout)
    check = subprocess.run([path, "-n", file], capture_output=True, text=True, check=False)
    assert (check.returncode, check.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("jobworker st", {"stream", "stop"}),
        ("job-worker-cli st", {"stream", "stop"}),
        ("jobworker certs i", {"init"}),
        ("jobworker create --max-m", {"--max-memory"}),
        ("jobworker list --status r", {"running"}),
    ],
)
def test_bash_completes(unconnected: Program, line: str, offered: set[str]) -> None:
    """As bash calls it when the tabulator is pressed."""
    words = line.split()
    script = (
        'eval "$(jobworker completion bash)"\n'
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n"
        f"_{words[0].replace('-', '_')}_completion {words[0]}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    programs = Path(sys.executable).parent
    environ = unconnected.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    answer = subprocess.run(
        ["bash", "--norc", "-c", script], env=environ, capture_output=True, text=True, check=True
    )
    assert set(answer.stdout.split()) == offered
