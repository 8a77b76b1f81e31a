"""Runs the vastai command with arguments from standard input, JSON, so that no process list shows them.

    echo '["create", "env-var", "HF_TOKEN", "…"]' | python -I private_argv.py

vastai 1.9.1 takes the value of a secret variable, and the login of a registry, as arguments only; those of a
process are readable by every user of the computer.
"""

import json
import sys

if __name__ == "__main__":
    sys.argv = ["vastai", *json.load(sys.stdin)]
    from vastai.cli.main import main  # type: ignore[import-untyped]

    sys.exit(main())
