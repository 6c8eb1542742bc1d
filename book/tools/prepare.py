"""Check and prepare the data that the notebooks need, and note the checksums."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from feedforward.embedded import pieces, prepare
from feedforward.files import atomic_write
from steps import StepFailed, step


def main() -> None:
    """Parse the command line and prepare everything in data/registry.toml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    with step("prepare the data"):
        try:
            report = [dataclasses.asdict(prepare(name)) for name in pieces()]
        except ValueError as error:
            raise StepFailed(str(error)) from error
        with atomic_write(options.output, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
