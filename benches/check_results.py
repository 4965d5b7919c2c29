"""Compares the last two results of `gpu_check.py`: `python benches/check_results.py [DIRECTORY]`.

Results are `benches/results/<date>-<gpu>.json`, so their names are in order of time. Ends with 1 if
the last one has failed checks, or a time that grew by more than a tenth on the same device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: A time that grew by more than this share is worse.
TOLERANCE = 0.10


def load(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings of a file by stage and name."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return {(record["stage"], record["name"]): record for record in document["records"]}


def failures(records: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Checks that failed, and stages that did not end well."""
    return [
        f"{stage}: {name} failed: {str(record.get('error', record.get('status', '')))[:80]}"
        for (stage, name), record in records.items()
        if not record.get("ok", True)
    ]


def changes(
    before: dict[tuple[str, str], dict[str, Any]], after: dict[tuple[str, str], dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """(times that are worse, times that are better), the largest change first."""
    ratios = {
        name: (after[key]["us"] / before[key]["us"], before[key]["us"], after[key]["us"])
        for key in after
        if key[0] == "timing" and "us" in after[key] and before.get(key, {}).get("us")
        for name in [key[1]]
    }
    worse, better = [], []
    for name, (ratio, old, new) in sorted(ratios.items(), key=lambda item: -item[1][0]):
        line = f"{name}: {old:.2f} us to {new:.2f} us ({ratio:.2f}x)"
        if ratio > 1 + TOLERANCE:
            worse.append(line)
        elif ratio < 1 - TOLERANCE:
            better.append(line)
    return worse, better[::-1]


def main(directory: Path = RESULTS) -> int:
    files = sorted(directory.glob("*.json"))
    if not files:
        print(f"no results in {directory}: nothing has run on a CUDA machine yet")
        return 0
    last = load(files[-1])
    failed = failures(last)
    worse: list[str] = []
    for line in failed:
        print(line)
    if len(files) == 1:
        print(f"only {files[-1].name}: there is nothing to compare with")
    else:
        before = load(files[-2])
        devices = [r.get(("env", "device"), {}).get("device") for r in (before, last)]
        print(f"{files[-2].name} ({devices[0]}), then {files[-1].name} ({devices[1]})")
        if devices[0] != devices[1]:
            print("another device: times are not compared")
        else:
            worse, better = changes(before, last)
            lost = [
                name for stage, name in before if stage == "timing" and (stage, name) not in last
            ]
            print(f"{len(worse)} worse, {len(better)} better, {len(lost)} not measured again")
            for line in worse[:20] + better[:20]:
                print(line)
    return 1 if failed or worse else 0


if __name__ == "__main__":
    sys.exit(main(*[Path(argument) for argument in sys.argv[1:2]]))
