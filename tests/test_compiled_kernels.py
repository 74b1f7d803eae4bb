"""The process that compiles a kernel computes to the same bits as those that find it in numba's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

from killing import path_for_children


def test_first_run_after_an_install_gives_the_numbers_of_every_later_one(tmp_path):
    first, later = digests(tmp_path), digests(tmp_path)
    assert list(tmp_path.rglob("*.nbi"))
    assert [name for name in first if first[name] != later[name]] == []


def digests(cache: Path) -> dict[str, str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": path_for_children()}
    program = Path(__file__).with_name("kernel_bits.py")
    return json.loads(
        subprocess.run([sys.executable, program], env=environment, check=True, capture_output=True).stdout
    )
