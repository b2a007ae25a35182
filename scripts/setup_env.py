"""Make or refresh the virtual environment; the Makefile calls it.

    python3 scripts/setup_env.py .venv            what `serve` needs
    python3 scripts/setup_env.py .venv --dev      what tests and checks need too

Runs on the machine's own Python, which may be any: no syntax newer than 3.6 here, so that an old
one is told what is missing instead of a SyntaxError.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

NEEDED = (3, 11)
CUDA_EXTRAS = ((580, "cuda13"), (550, "cuda12"))
"""The oldest NVIDIA driver that each of MLX's CUDA builds runs with."""


def pick_extra(system, driver):
    """The MLX backend to install: an extra's name, or "" for Metal, which comes with mlx itself.

    Args:
        system: as `platform.system()` says.
        driver: NVIDIA's driver version ("580.65.06"), or None where there is no GPU.
    """
    if system == "Darwin":
        return ""
    major = (driver or "").split(".")[0]
    if major.isdigit():
        for oldest, extra in CUDA_EXTRAS:
            if int(major) >= oldest:
                return extra
    return "cpu"


def nvidia_driver():
    """The driver's version where nvidia-smi sees a GPU, else None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    job = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = job.stdout.decode("utf-8", "replace").split()
    return lines[0] if job.returncode == 0 and lines else None


def complaint(version):
    """Why this Python will not do, or None."""
    if tuple(version[:2]) >= NEEDED:
        return None
    have = ".".join(str(part) for part in version[:3])
    need = ".".join(str(part) for part in NEEDED)
    return (
        f"mlx-serving needs Python {need} or newer; {sys.executable} is {have}.\n"
        f"Install one and name it: make serve PYTHON=python{need}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv")
    parser.add_argument("--dev", action="store_true")
    args = parser.parse_args()
    wrong = complaint(sys.version_info)
    if wrong:
        say(wrong)
        return 3
    venv = Path(args.venv)
    python = str(venv / "bin" / "python")
    if not Path(python).exists():
        say(f"Creating {venv} with {sys.executable}")
        if subprocess.call([sys.executable, "-m", "venv", str(venv)]) != 0:
            shutil.rmtree(str(venv), ignore_errors=True)  # half of one would pass for whole
            say("No virtual environment: is the venv module installed?")
            say("(Debian, Ubuntu: apt install python3-venv)")
            return 1
    backend = os.environ.get("MLX_EXTRA", pick_extra(platform.system(), nvidia_driver()))
    extras = ",".join(filter(None, [backend, "dev" if args.dev else ""]))
    target = f".[{extras}]" if extras else "."
    say(f"Installing {target}: a few hundred MB, and the CPU kernels are compiled; some minutes")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stderr.isatty():
        pip.append("--quiet")
    return subprocess.call([*pip, "--editable", target])


def say(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
