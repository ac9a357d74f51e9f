"""Run every benchmark, print one table, write bench.json: a list of {name, value, target, ok}.

Each bench_*.py beside this file has `rows()`, the ratios it measured in one run.
"""

import importlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main() -> int:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    modules = sorted(path.stem for path in HERE.glob("bench_*.py"))
    rows = [row for module in modules for row in importlib.import_module(module).rows()]
    table = Table("benchmark", "measured", "target", "", box=None)
    for row in rows:
        table.add_row(row["name"], f"{row['value']:.3g}", str(row["target"]), "ok" if row["ok"] else "MISSED")
    Console().print(table)
    Path("bench.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
