"""Run every benchmark, print one table, write bench.json: a list of {name, value, target, ok}.

Run: python tests/benchmarks/run.py [NAME ...], the name of a bench_*.py beside this file without its bench_. Each has
`rows()`, the ratios it measured in one run. What else the machine did, its load just before, is told with its time.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main(names: list[str]) -> int:
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "resilience")]
    names = names or sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    rows = [row for name in names for row in measured(name)]
    table = Table("benchmark", "measured", "target", "", box=None)
    for row in rows:
        table.add_row(row["name"], f"{row['value']:.3g}", str(row["target"]), "ok" if row["ok"] else "MISSED")
    Console().print(table)
    Path("bench.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def measured(name: str) -> list[dict]:
    """The rows of one benchmark; its time and the load it found go to standard error."""
    load, begun = os.getloadavg()[0], time.monotonic()
    rows: list[dict] = importlib.import_module(f"bench_{name}").rows()
    took = time.monotonic() - begun
    print(f"{name}: {took:.0f} s; load before {load:.1f} on {os.cpu_count()} cores", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
