"""Make sure that a script runs where its packages are: here if they are all installed, else in `.venv` of the
repo.

Needs nothing but Python 3.10 or newer. Used by quickstart.py and run_tests.py:

    bootstrap.ensure("requirements.txt")       # returns when the packages are there; may restart in .venv
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"


def read_pins(requirements: Path) -> dict[str, str]:
    """{"torch": "2.13.0", ...} from lines `name==version  # comment`; follows `-r other.txt`."""
    pins: dict[str, str] = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            pins |= read_pins(requirements.parent / line[2:].strip())
        elif match := re.fullmatch(r"([\w.-]+)==([\w.+]+)", line):
            pins[match[1]] = match[2]
        elif line:
            raise SystemExit(f"{requirements}: cannot read {line!r}; write name==version")
    return pins


def missing(pins: dict[str, str]) -> list[str]:
    """The packages that this interpreter lacks. Another version than the pinned one counts as there if its
    first number is the same: a user's own environment (another torch build, say) is respected."""
    absent = []
    for name, version in pins.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if installed.split(".")[0] != version.split(".")[0]:
            absent.append(name)
    return absent


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has_pip(python: Path) -> bool:
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def pip_install(python: Path, *args: str):
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *args]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(
            f"installing failed: {' '.join(args)}\nCheck the network (a mirror: set PIP_INDEX_URL), then run "
            "the same command again: it goes on where it stopped."
        )


def ensure(requirements: str):
    """Return when every package of the file is importable by the running interpreter.

    Otherwise: create .venv if needed, install what is missing there (torch first, pinned for the rest, so
    that no other package brings another build of it), and run the same command again with .venv's Python.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - the user may start this with any Python
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    pins = read_pins(ROOT / requirements)
    if not missing(pins):
        return
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if not inside:
        python = venv_python()
        if not (python.exists() and has_pip(python)):  # or its making was interrupted
            print(f"making {VENV.name} in {ROOT.name}", flush=True)
            venv.EnvBuilder(with_pip=True, clear=VENV.exists()).create(VENV)
    else:
        python = Path(sys.executable)
        started = time.time()
        absent = missing(pins)
        print(f"installing {', '.join(absent)} (once; minutes)", flush=True)
        if "torch" in absent:
            pip_install(python, f"torch=={pins['torch']}")
        constraint = VENV / "constraint.txt"
        constraint.write_text(f"torch=={pins['torch']}\n", encoding="utf-8")
        pip_install(python, "-r", str(ROOT / requirements), "-c", str(constraint))
        importlib.invalidate_caches()
        still = missing(pins)
        if still:
            raise SystemExit(f"still missing: {', '.join(still)}; delete .venv and run the command again")
        print(f"installed in {time.time() - started:.0f} s", flush=True)
    rerun(python)


def rerun(python: Path):
    """Run the same command with another interpreter, and end with its exit code."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
    env["PYTHONUTF8"] = "1"  # Chinese into a file, whatever the locale says
    child = subprocess.Popen([str(python), *sys.argv], env=env)
    while True:
        try:
            raise SystemExit(child.wait())
        except KeyboardInterrupt:  # the child got it too, and decides
            pass
