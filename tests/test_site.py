"The site: built without a warning, complete, every link alive, nothing asked of another host."

import subprocess
import sys
from urllib.parse import unquote, urldefrag

import pytest

from spikeprompt.config import project_root

pytest.importorskip("myst_nb", reason="uv sync --group docs")
from bs4 import BeautifulSoup

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]
ROOT = project_root()
PAGES = ROOT / "build/site/html"
GENERATED = {"genindex.html", "py-modindex.html", "search.html"}


@pytest.fixture(scope="module")
def pages():
    "Every page, built anew: path -> parsed HTML."
    done = subprocess.run([sys.executable, ROOT / "tools/docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.relative_to(PAGES).as_posix(): BeautifulSoup(path.read_text(), "html.parser") for path in PAGES.rglob("*.html")}


def test_every_notebook_and_the_report_have_a_page(pages):
    notebooks = [path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("[!.]*.ipynb")]
    wanted = {path.with_suffix(".html").as_posix() for path in notebooks} | {"results/report.html", "index.html", "bibliography.html"}
    assert len(notebooks) > 30 and wanted <= set(pages)


def test_every_page_has_text_and_headings_in_order(pages):
    for name in set(pages) - GENERATED:
        article = pages[name].find("article")
        levels = [int(heading.name[1]) for heading in article.find_all(["h1", "h2", "h3", "h4", "h5"])]
        assert levels[0] == 1 and levels.count(1) == 1, f"{name}: {levels}"
        assert all(after - before <= 1 for before, after in zip(levels, levels[1:])), f"{name}: {levels}"
        assert len(article.get_text()) > 150, name


def test_no_link_is_dead(pages):
    anchors = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    dead = []
    for name, page in pages.items():
        for link in {tag["href"] for tag in page.find_all("a", href=True)}:
            target, anchor = urldefrag(unquote(link))
            if "://" in target or target.startswith("mailto:"):
                continue
            path = (PAGES / name).parent.joinpath(target).resolve() if target else PAGES / name
            place = path.relative_to(PAGES).as_posix()
            if not path.is_file() or (anchor and place in anchors and anchor not in anchors[place]):
                dead.append(f"{name}: {link}")
    assert not dead


def test_no_other_host_is_asked_for_anything(pages):
    for name, page in pages.items():
        sources = [tag.get("src") or "" for tag in page.find_all(["img", "script", "iframe", "source", "video"])]
        sources += [tag.get("href") or "" for tag in page.find_all("link")]
        assert not [source for source in sources if "//" in source.removeprefix("data:")[:8]], name
    for sheet in PAGES.rglob("*.css"):
        assert "url(http" not in sheet.read_text() and "@import" not in sheet.read_text(), sheet


def test_figures_have_an_alternative_text_and_equations_no_script(pages):
    for name in set(pages) - GENERATED:
        images = pages[name].find("article").find_all("img")
        texts = [image.get("alt", "") for image in images if not image.find_parent(id="spikeprompt-play")]  # whose script writes them
        least = 40 if name in ("index.html", "results/report.html") else 20
        assert all(len(text) > least and not text.endswith((".png", ".svg")) for text in texts), f"{name}: {texts}"
        assert images or name not in ("index.html", "results/report.html", "nbs/methods/30_lorsp.html"), name
    assert len(pages["nbs/methods/30_lorsp.html"].find_all("math")) > 20
    assert not any("$" in str(math) for page in pages.values() for math in page.find_all("math"))


def test_what_scrolls_is_reached_by_the_keyboard(pages):
    for name, page in pages.items():
        scrolling = page.find_all("pre") + page.find_all("div", class_=["equation", "table-wrapper"])
        assert all(tag.has_attr("tabindex") for tag in scrolling), name
        assert all(tag.has_attr("aria-level") for tag in page.find_all(role="heading")), name


def test_every_public_symbol_is_described(pages):
    sys.path.insert(0, str(ROOT / "docs"))
    from api import public_modules, symbols

    for module in public_modules():
        page = pages[f"reference/{module.__name__}.html"]
        described = {tag["id"] for tag in page.find_all("dt", id=True)}
        assert {f"{module.__name__}.{name}" for name in symbols(module)} <= described
    settings = pages["reference/spikeprompt.methods.lorsp.html"].get_text()
    assert "peak learning rate of the prompt" in settings and "[B, 3, H, W] in [0, 1]" in settings


def test_mentions_are_links(pages):
    page = pages["start.html"].find("article")
    assert page.find("a", href="reference/spikeprompt.methods.lorsp.html#spikeprompt.methods.lorsp.LoRSPConfig")
    papers = {
        link["href"] for page in pages.values() for link in page.find_all("a", href=True) if "bibliography.html#arxiv" in link["href"]
    }
    assert len({link.rpartition("#")[2] for link in papers}) > 12
