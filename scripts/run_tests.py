"""Set up what the tests need and run them: the project's one test command.

    python scripts/run_tests.py              the default suite (minutes on two cores)
    python scripts/run_tests.py --slow       everything
    python scripts/run_tests.py -k resume    any pytest argument is passed on (-n 0: one process)

Needs only Python 3.10+; packages go to .venv in the repo, unless the running environment already has them.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bootstrap


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return 0
    bootstrap.ensure("requirements-dev.txt")
    args = [a for a in argv if a != "--slow"]
    if "--slow" in argv:
        args += ["-m", "slow or not slow"]
    if "-n" not in args and "--pdb" not in args:  # a file's tests stay together: they share what they start
        args += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    # Small models run fastest on one thread each; two-process tests would fight over the cores otherwise.
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    checks = [
        ("style", [sys.executable, "-m", "ruff", "check", "."]),
        ("tests", [sys.executable, "-m", "pytest", "--durations=10", *args]),
    ]
    for name, command in checks:
        print(f"== {name}: {' '.join(command[2:])}", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
