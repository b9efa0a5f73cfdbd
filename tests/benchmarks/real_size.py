"""Prints the table of `docs/real-size.md`: `python tests/benchmarks/real_size.py [llava] [qwen]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.real_size import HEADER, NAMES, true_counts


def main() -> None:
    """One table a model, its rows as they come."""
    for kind in sys.argv[1:] or NAMES:
        print(f"\n### {NAMES[kind]}\n\n{HEADER}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for usage in true_counts(kind, Path(folder)):
                print(usage.row(), flush=True)


if __name__ == "__main__":
    main()
