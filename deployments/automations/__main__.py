"""Creates the automations on the server of `PREFECT_API_URL`, or brings them up to date.

    python -m prefect_huggingface.deployments.automations [--only zombie-runs] [--notify slack-webhook/alerts]

Whether an automation is switched on is left as it is. The exit status is 1 if a deployment or a block is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect_huggingface.deployments.automations.creation import FOLDER, create_automations
from prefect_huggingface.tasks.errors import PlanError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="automations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder with YAML files, those of the package")
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="one file, without its ending")
    parser.add_argument("--notify", metavar="TYPE/NAME", help="notification block for messages about failed runs")
    chosen = parser.parse_args(arguments)
    try:
        outcomes = create_automations(chosen.folder, chosen.notify, tuple(chosen.only))
    except PlanError as exc:
        print(exc, file=sys.stderr)
        return 2
    for each in outcomes:
        print(f"{each.result}: {each.name}{f' ({each.reason})' if each.reason else ''}")
    return int(any(each.result == "missing" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
