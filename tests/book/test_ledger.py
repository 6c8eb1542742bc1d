"""The ledger page shows every claim with the verdict that the records give now."""

from pathlib import Path
from urllib.parse import quote

import pytest
from browser import CHROMIUM, Browser
from bs4 import BeautifulSoup

from feedforward import claims

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "_build" / "html" / "ledger.html"

CLAIMS = {
    *(f"qa-{n}" for n in range(1, 10)),
    *(f"qa-defect-{n}" for n in range(1, 8)),
    *(f"ffn-{n}" for n in range(1, 11)),
    *(f"vla-{n}" for n in range(1, 10)),
}

needs_page = pytest.mark.skipif(not PAGE.exists(), reason="no rendered book: run `make html`")


@pytest.fixture(scope="module")
def verdicts():
    return {verdict.claim.id: verdict for verdict in claims.current_verdicts()}


@pytest.fixture(scope="module")
def rows():
    page = BeautifulSoup(PAGE.read_text(encoding="utf-8"), "html.parser")
    table = page.select_one("table.ledger")
    return [row.find_all("td") for row in table.find_all("tr") if row.find("td")]


def test_every_claim_of_the_three_papers_is_entered(verdicts):
    assert set(verdicts) >= CLAIMS


def test_every_claim_names_a_chapter_that_exists(verdicts):
    for verdict in verdicts.values():
        chapter = ROOT / "book" / verdict.claim.chapter
        assert chapter.with_suffix(".md").exists(), verdict.claim.id


def test_nothing_is_decided_without_records(verdicts):
    for verdict in verdicts.values():
        assert verdict.records or verdict.verdict in ("not run", "exact"), verdict.claim.id


@needs_page
def test_the_page_has_a_row_a_claim_with_its_verdict_and_a_link(rows, verdicts):
    shown = {}
    for cells in rows:
        name = cells[0].get_text(" ", strip=True).split()[0]
        shown[name] = cells[-1].get_text(" ", strip=True)
        target = cells[0].find("a")["href"]
        assert (PAGE.parent / target.split("#")[0]).exists()
    assert set(shown) == set(verdicts)
    for name, verdict in verdicts.items():
        assert shown[name].startswith(verdict.verdict), name


@needs_page
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium (Debian package chromium)")
def test_the_filters_leave_what_they_say(verdicts):
    visible = (
        "[...document.querySelectorAll('table.ledger tbody tr')]"
        ".filter(row => row.offsetParent !== null).length"
    )
    with Browser() as browser:
        browser.open(PAGE, width=1440)
        assert browser.run(visible) == len(verdicts)
        browser.open(PAGE, width=1440, fragment="?verdict=exact")
        exact = [v for v in verdicts.values() if v.verdict == "exact"]
        assert browser.run(visible) == len(exact) > 0
        paper = quote(claims.PAPERS["adamoe"])
        browser.open(PAGE, width=1440, fragment=f"?paper={paper}")
        assert browser.run(visible) == sum(v.claim.paper == "adamoe" for v in verdicts.values())
