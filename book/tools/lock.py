"""Write requirements.lock from requirements.in: exact, hashed, without torch or addresses."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lock() -> str:
    """Resolve requirements.in for every platform and leave out what pyproject.toml overrides."""
    compiled = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        + ["--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        + ["requirements.in"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    pins = re.split(r"\n(?=\S)", compiled.strip())
    return "\n".join(pin for pin in pins if "sys_platform == 'never'" not in pin) + "\n"


if __name__ == "__main__":
    (ROOT / "requirements.lock").write_text(lock())
