"""``python -m verideq.checker PATH...``: check certificates, without torch."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from verideq.checker import check


def main(arguments: list[str] | None = None) -> int:
    """Print a line a record (or JSON); 0 only if every claim holds."""
    about = "Check certificates with a small program of its own."
    parser = argparse.ArgumentParser(prog="verideq check", description=about)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a certificates folder, a run's folder, or one above")
    parser.add_argument("--exact", action="store_true", help="rational arithmetic: slow, for audits of small models")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(arguments)
    absent = [path for path in options.paths if not Path(path).exists()]
    if absent:
        print(f"error: there is no file or folder {absent[0]}", file=sys.stderr)
        return 2
    outcomes = [outcome for path in options.paths for outcome in check(path, exact=options.exact)]
    accepted = sum(outcome.accepted for outcome in outcomes)
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        for outcome in outcomes:
            place = f"{outcome.path}:{outcome.record}" if outcome.record >= 0 else outcome.path
            said = f"{outcome.claim}, margin {outcome.margin:.6g}" if outcome.accepted else outcome.reason
            print(f"{'ACCEPTED' if outcome.accepted else 'REJECTED'} {place}: {said}")
        print(f"{accepted} accepted, {len(outcomes) - accepted} rejected")
    return 0 if accepted == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
