"""Records the terminal picture of ``corral run``: types every line into a real shell and draws what it printed.

    .venv/bin/python docs/pictures/run.py [docs/pictures/run.svg]

It needs the micro image (or builds it) and takes under a minute; the daemon is one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

LINES = (
    "corral run micro -- uname -sr",
    "echo some words | corral run -i micro -- tr a-z A-Z",
    "corral run micro -- sh -c 'exit 7'; echo $?",
    "corral run --timeout 2s micro -- sleep 100; echo $?",
    "corral run --max-output 1K micro -- yes | wc -c",
    "corral run --mount .:/work --cwd /work micro -- sh -c 'wc -l < names > count'; cat count",
    "corral run --each names micro -- sh -c 'echo {} | sha256sum | cut -c1-16'",
    "corral run --timings micro -- true",
    "corral list",
)
WIDTH = 100
TIMEOUT_S = 120


def main(target: Path) -> None:
    console = Console(record=True, width=WIDTH, file=Path(os.devnull).open("w"), force_terminal=True)  # noqa: SIM115
    with tempfile.TemporaryDirectory(prefix="corral-picture-") as place:
        state, here = Path(place) / "state", Path(place) / "here"
        Path(place).chmod(0o711)  # QEMU runs as another user and must pass through
        here.mkdir()
        (here / "names").write_text("ada\ngrace\nbarbara\n")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "CORRAL_STATE": str(state), "PATH": path, "PS1": "$ "}
        try:
            for line in ("corral up", "corral image build micro"):
                subprocess.run(line, shell=True, env=env, cwd=here, check=True, capture_output=True, timeout=600)
            for line in LINES:
                done = subprocess.run(
                    ["bash", "-c", line], env=env, cwd=here, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, timeout=TIMEOUT_S, check=False,
                )  # fmt: skip
                console.print(Text("$ ", style="bold green") + Text(line, style="bold"), soft_wrap=True)
                console.print(Text.from_ansi(done.stdout.decode().rstrip("\n")), soft_wrap=True)
        finally:
            subprocess.run("corral down --all --yes", shell=True, env=env, capture_output=True, timeout=60, check=False)
    target.write_text(console.export_svg(title="corral run"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")))
