"""The older name of scripts/chat_api.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.chat_api import main, parse_args
from trainer import cli

if __name__ == "__main__":
    cli.run(main, parse_args)
