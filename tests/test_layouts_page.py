"""The table of proven layouts is that of the results, and nobody types it."""

import json
import sys

from tests.support.forked import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import parity
from _pages import rewritten


def test_the_page_has_the_table_of_the_last_run() -> None:
    results = json.loads(parity.RESULTS.read_text())
    page = parity.PAGE.read_text()
    table = parity.table(results["cases"], results["date"])
    assert page == rewritten(page, parity.COMMAND, table), "run make parity"


def test_readme_has_the_largest_errors_of_fp32() -> None:
    cases = json.loads(parity.RESULTS.read_text())["cases"]
    errors = [case["errors"] for case in cases if case["dtype"] == "torch.float32"]
    gradient, weights = (
        max(each.get(quantity, 0.0) for each in errors) for quantity in ("gradient", "weights")
    )
    said = f"{gradient:.0e} of gradients, {weights:.0e} of weights"
    assert said in (ROOT / "README.md").read_text()
