"""What people see: tables, metrics, progress, and a live table of a sweep's trials."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import TaskID

print_now = functools.partial(print, flush=True)
"""Print a line at once, also into a pipe or a file."""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in columns, whole numbers with commas."""
    from rich.console import Console
    from rich.table import Table

    columns = Table(*head, box=None, pad_edge=False)
    for row in rows:
        columns.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    # Elsewhere than in a terminal a row is a line, however long. Brackets in names are no markup
    console = Console(markup=False, width=None if sys.stdout.isatty() else 1000)
    with console.capture() as text:
        console.print(columns)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The metrics of an evaluation, and those of each way of asking."""
    keys = ("mAP", "rank1", "rank5", "rank10", "rank20", "rank50", "mAP_at_R", "mINP")
    lines = [
        table(["", "value", "95% interval"], [[key, _value(metrics[key]), _interval(metrics, key)] for key in keys])
    ]
    parts = {"same variant": metrics["variant"]["same"], "cross variant": metrics["variant"]["cross"]}
    parts |= {"without copies": metrics["without_copies"]}
    parts |= {"text to image": metrics["text_to_image"], "image to text": metrics["image_to_text"]}
    rows = [
        [name, _value(part["mAP"]), _value(part["rank1"]), part["num_query"]] for name, part in parts.items() if part
    ]
    if splits := metrics["random_splits"]:
        spread = [f"{_value(splits[key]['mean'])} ± {_value(splits[key]['std'])}" for key in ("mAP", "rank1")]
        rows.append([f"{len(splits['mAP']['values'])} random splits", *spread, ""])
    lines += ["", table(["", "mAP", "rank1", "queries"], rows), ""]
    if metrics["rerank"]:
        lines.append("re-ranked (k-reciprocal), but for text and random splits")
    if note := _PROMPTS_TELL.get(metrics.get("prompts_tell_apart") or ""):
        lines.append(note)
    unmatched = f", {metrics['num_unmatched']:,} queries left out: no other image of their item"
    left_out = unmatched if metrics["num_unmatched"] else ""
    lines.append(f"{metrics['num_query']:,} queries, {metrics['num_gallery']:,} gallery images{left_out}")
    return "\n".join(lines)


def format_beside(beside: Sequence[Mapping[str, Any]]) -> str:
    """What a model lost or gained on other catalogues, before and after tuning."""
    rows = [[each["catalogue"].rpartition("/")[2], *_change(each)] for each in beside]
    head = ["beside", "mAP before", "after", "change", "95% interval", "text to image before", "after"]
    return f"\n{table(head, rows)}\n"


def _change(each: Mapping[str, Any]) -> list[str]:
    before, after, gain = each["before"], each["after"], each["gain"]
    low, high = gain["interval"] or (math.nan, math.nan)
    texts = [_value((figures["text_to_image"] or {}).get("mAP")) for figures in (before, after)]
    change = ["none" if gain["mAP"] is None else f"{gain['mAP']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
    return [_value(before["mAP"]), _value(after["mAP"]), *change, *texts]


_PROMPTS_TELL = {
    "nothing": "no text figures: all items have the same prompt",
    "kinds": "prompts name no more than category and gender: text figures tell how well these are found, not items",
}


def _value(metric: float | None) -> str:
    return "none" if metric is None else f"{metric:.4f}"


def _interval(metrics: Mapping[str, Any], key: str) -> str:
    ends = metrics["intervals"][key]
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "none"


@contextlib.contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function that takes the numbers of images done and of all, and shows them."""
    with progresses(unit) as (show,):
        yield show


@contextlib.contextmanager
def progresses(*units: str) -> Iterator[list[Callable[[int, int], None]]]:
    """A function for each of some stages, which takes the numbers of images done and of all, and shows them.

    In a terminal as bars, which appear with their first call; elsewhere as a line for every tenth.
    """
    if not sys.stdout.isatty():
        yield [_Tenths(unit) for unit in units]
        return
    from rich.progress import MofNCompleteColumn, Progress

    bars = Progress(*Progress.get_default_columns(), MofNCompleteColumn())

    def show(task: TaskID, done: int, total: int) -> None:
        bars.start()
        bars.update(task, completed=done, total=total, visible=True)

    try:
        yield [functools.partial(show, bars.add_task(unit, total=None, visible=False)) for unit in units]
    finally:
        bars.stop()


class _Tenths:
    """Prints a line whenever another tenth of all images is done."""

    def __init__(self, unit: str) -> None:
        self.unit, self.tenths = unit, 0

    def __call__(self, done: int, total: int) -> None:
        if done * 10 // max(1, total) > self.tenths:
            self.tenths = done * 10 // total
            print_now(f"{done:,} of {total:,} {self.unit}")


@contextlib.contextmanager
def live(out: str) -> Iterator[tuple[Callable[[str], None], bool]]:
    """A function that prints lines of a sweep, and whether each report of a trial should be one.

    In a terminal a table of the sweep's trials stands below the lines, from the first line on, and shows the reports.
    """
    if not sys.stdout.isatty():
        yield print_now, True
        return
    from rich.console import Console
    from rich.live import Live

    from clipfh.report import status
    from clipfh.storage.store import Folder

    console, often = Console(highlight=False), 1 / Folder(out).seconds_between_looks
    display = Live(
        get_renderable=lambda: status.table(out, console.height - 4), console=console, refresh_per_second=often
    )

    def log(line: str) -> None:
        display.start()
        console.print(line, markup=False)

    try:
        yield log, False
    finally:
        display.stop()
