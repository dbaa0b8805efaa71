"""`modicum report DIR`: one page from a folder of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Report:
    """Make one self-contained HTML page, and CSV tables, of a folder of runs.

    Runs are compared by what differs between them; results are means and standard deviations over seeds.
    """

    folder: tyro.conf.Positional[Path]
    """A run, or a folder with runs in it at any depth."""
    out: Path | None = None
    """Where the page goes; by default report.html in the folder. Tables go beside it."""

    def run(self) -> int:
        """Write the page and print where it is."""
        from ...research.study.collect import collect, report_from_runs, result_tables

        page = report_from_runs(self.folder)
        path = self.out or self.folder / "report.html"
        print(page.write(path))
        for index, table in enumerate(result_tables(collect(self.folder)), 1):
            table.write(path.parent, f"results-{index}")
            print(path.parent / f"results-{index}.csv")
        return 0
