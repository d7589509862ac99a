"""A script that mounts, where nobody else sees what it mounts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def answer_of(script: str, folder: Path) -> Any:
    """Of a script that may mount, in a mount namespace of its own; its argument is the folder."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    alone = ["unshare", "--mount", "--propagation=private"]
    answer = subprocess.run(
        [*alone, sys.executable, "-c", script, folder],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
    )
    return json.loads(answer.stdout)
