"""Results as JSON lines, written after every measurement, and as tables.

The first line of a file says what was measured on what; every other line is one row: `bench`, what
identifies the shape, `variant`, and its numbers.
"""

import json
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PHASES = ("forward", "backward", "both")
_NUMBERS = ("_ms", "_overhead", "_bytes", "bytes_moved", "launches", "kernels", "variant", "bench")


def append(path: Path | None, row: Row) -> None:
    """Add one line to a file of results, where one is wanted."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Return all lines of a file of results, none where there is no file."""
    if not path.exists():
        return []
    # A measurement that was ended by force may have left half a line.
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def runs_of(folder: Path) -> list[Path]:
    """Return the folders of a device's runs in their order, named as 2026-11-26-3 is.

    A folder with more in its name holds what a run is compared with, and is none.
    """
    numbered = re.compile(r"\d{4}-\d\d-\d\d-(\d+)")
    found = [
        (path.name[:10], int(m[1]), path)
        for path in folder.glob("*")
        if (m := numbered.fullmatch(path.name))
    ]
    return [path for _day, _number, path in sorted(found)]


def write_text(path: Path, text: str) -> None:
    """Write a file beside and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)


def machine(device: torch.device) -> Row:
    """Return what the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print one table: milliseconds and overhead over the first row by phase."""
    print(f"\n{title}")
    print(
        f"{'variant':<20}"
        + "".join(f"{phase:>18}" for phase in PHASES)
        + f"{'saved MB':>10}{'moved MB':>10}"
    )
    for row in rows:
        cells = "".join(
            f"{row[f'{phase}_ms']:>9.3f}{100 * row[f'{phase}_overhead']:>+8.1f}%"
            for phase in PHASES
        )
        moved = f"{row['saved_bytes'] / 1e6:>10.2f}{row['bytes_moved'] / 1e6:>10.1f}"
        print(f"{row['variant']:<20}{cells}{moved}", flush=True)


def overhead_table(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: a line for each shape, the overheads of every variant over the frozen base.

    A line measured twice has its last numbers.
    """
    fixed = [key for key in rows[0] if not key.endswith(_NUMBERS)]
    variants = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] != "frozen"))
    shapes: dict[tuple, dict[str, str]] = {}
    for row in rows:
        cells = shapes.setdefault(tuple(row[key] for key in fixed), {})
        cells[row["variant"]] = f"{row['forward_overhead']:+.1%} / {row['backward_overhead']:+.1%}"
        if row["variant"] == "frozen":
            cells["frozen"] = f"{row['forward_ms']:.3f} / {row['backward_ms']:.3f}"
    head = [*fixed, "frozen, ms", *variants]
    lines = [line(head), line(["---"] * len(head))]
    for shape, cells in shapes.items():
        lines.append(line([*shape, *(cells.get(v, "") for v in ("frozen", *variants))]))
    return ["Overhead over the frozen base, forward / backward.", "", *lines]


def plain_table(rows: Sequence[Row]) -> list[str]:
    """Return Markdown with a column for each key, whose cell is empty in a row without it."""
    keys = [key for key in dict.fromkeys(chain.from_iterable(rows)) if key != "bench"]
    lines = [line(keys), line(["---"] * len(keys))]
    for row in rows:
        values = [row.get(key, "") for key in keys]
        lines.append(line([f"{v:.5g}" if isinstance(v, float) else v for v in values]))
    return lines


def line(cells: Iterable[object]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
