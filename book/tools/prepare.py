"""Prepare and verify the data sets that the notebooks need, and note their checksums."""

import argparse
import json
import sys
from pathlib import Path

from feedforward.files import atomic_write
from feedforward.lm.data import prepare
from steps import StepFailed, step


def main() -> None:
    """Parse the command line and prepare everything in data/registry.toml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    with step("prepare the data"):
        try:
            report = prepare()
        except ValueError as error:
            raise StepFailed(str(error)) from error
        with atomic_write(options.output, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
