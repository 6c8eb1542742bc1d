"""The rendered pages open from a file, without a network, on a phone and in the dark."""

import functools
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import CHROMIUM, Browser
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
#: every page but the first, which only leads on to the introduction
PAGES = sorted(
    page
    for page in HTML.rglob("*.html")
    if "_static" not in page.parts and page != HTML / "index.html"
)
#: where a rendered page is looked at: (width in CSS pixels, dark)
SCREENS = [(1440, False), (1440, True), (390, False), (390, True)]

pytestmark = pytest.mark.skipif(not PAGES, reason="no rendered book: run `make html` first")


@functools.cache
def soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def name(page: Path) -> str:
    return str(page.relative_to(HTML))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


@every_page
def test_loads_nothing_from_a_network(page):
    loads = [tag.get("src") for tag in soup(page).find_all(["script", "img", "iframe", "source"])]
    loads += [tag.get("href") for tag in soup(page).find_all("link") if loads_its_target(tag)]
    assert [url for url in loads if url and re.match(r"(https?:)?//", url)] == []
    inline = "".join(tag.get_text() for tag in soup(page).find_all(["script", "style"]))
    assert not re.search(r"@import|url\(\s*['\"]?https?:|import\(['\"]https?:", inline)


def loads_its_target(link) -> bool:
    return not {"canonical", "next", "prev", "search", "index", "author"} & set(link.get("rel", []))


def test_style_sheets_load_nothing_from_a_network():
    sheets = list(HTML.rglob("*.css"))
    assert sheets
    outside = re.compile(r"(?:@import\s+|url\()\s*['\"]?(?:https?:)?//")
    assert [name(s) for s in sheets if outside.search(s.read_text(encoding="utf-8"))] == []


@every_page
def test_every_link_and_file_is_there(page):
    missing = []
    for tag in soup(page).find_all(True):
        url = tag.get("href") or tag.get("src")
        if not url or tag.name == "use" or re.match(r"[a-z]+:|//", url):
            continue
        parts = urlsplit(url)
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            missing.append(url)
        elif parts.fragment and target.suffix == ".html" and target in PAGES:
            fragment = unquote(parts.fragment)
            if not soup(target).find(id=fragment) and not soup(target).find(
                attrs={"name": fragment}
            ):
                missing.append(url)
    assert missing == []


@every_page
def test_every_figure_has_alt_text(page):
    article = soup(page).find("article") or soup(page)
    without = [
        image.get("src", "")[:80]
        for image in article.find_all("img")
        if len(image.get("alt", "").strip()) < 15 or "/" in image["alt"].split()[0]
    ]
    drawn = [
        svg
        for svg in article.find_all("svg")
        if svg.get("role") == "img" and not (svg.get("aria-label") or svg.find("title"))
    ]
    assert without == []
    assert drawn == []


@every_page
def test_nothing_generated_is_missing(page):
    text = page.read_text(encoding="utf-8")
    assert "generated:" not in text
    assert "{{" not in soup(page).find("body").get_text() or "code" in text
    assert not soup(page).find_all(class_="problematic")


@every_page
def test_one_header_and_one_search_form(page):
    searches = page.name == "search.html"
    assert len(soup(page).select("article h1")) == (not searches)
    # the theme's navbar would be a second header, with a second search box
    assert [header.get_text(strip=True) for header in soup(page).select("header.bd-header")] == [""]
    assert len(soup(page).select("form.bd-search")) == 1 + searches


def test_search_knows_the_chapters():
    index = (HTML / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    assert "foundations/02-mixture-of-experts" in index
    assert '"rout' in index


def test_formulas_come_from_a_bundled_file():
    assert (HTML / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
    with_formulas = [page for page in PAGES if soup(page).select("div.math, span.math")]
    assert len(with_formulas) >= 3
    for page in with_formulas:
        scripts = [tag.get("src", "") for tag in soup(page).find_all("script")]
        assert any("mathjax/tex-svg.js" in script for script in scripts)


# -- in a browser ----------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium (Debian package chromium)")

CONTRAST = """
(() => {
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length && (c.length < 4 || c[3] > 0.9)) return c;
    }
    return [255, 255, 255];
  };
  const faint = [];
  const texts = ['p', 'li', 'td', 'th', 'figcaption', 'h1', 'h2'].map(t => 'article ' + t);
  for (const e of document.querySelectorAll(texts.join())) {
    const text = e.textContent.trim();
    if (!text || !e.offsetParent) continue;
    const a = light(numbers(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(ratio.toFixed(1) + ' ' + text.slice(0, 40));
  }
  return faint.slice(0, 5);
})()
"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@needs_browser
@every_page
def test_a_phone_never_scrolls_sideways(browser, page):
    browser.open(page, width=390)
    widths = browser.run("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= 390, f"{widths[0]} px wide"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_text_is_readable_in_light_and_dark(browser, width, dark):
    for page in PAGES:
        browser.open(page, width=width, dark=dark)
        assert browser.run(CONTRAST) == [], name(page)


@needs_browser
def test_formulas_are_drawn(browser):
    browser.open(HTML / "foundations" / "03-structured-matrices.html", width=1440)
    assert browser.run("document.querySelectorAll('mjx-container svg').length") > 3


@needs_browser
def test_search_finds_a_term(browser):
    browser.open(HTML / "search.html", width=1440, fragment="?q=capacity")
    import time

    end = time.monotonic() + 20
    found = 0
    while not found and time.monotonic() < end:
        found = browser.run("document.querySelectorAll('#search-results li').length")
        time.sleep(0.2)
    assert found > 0
