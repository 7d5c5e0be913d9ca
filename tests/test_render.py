"The report without its code: a page and a paper from an executed notebook, or one line that says why not."

import base64
import subprocess
import sys
from pathlib import Path

import nbformat.v4 as v4
import pytest
from nbformat import write

pytest.importorskip("pypandoc")
pytest.importorskip("typst")

TOOL = Path(__file__).parent.parent / "tools/render.py"
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="360pt" height="90pt"><circle cx="180" cy="45" r="30"/></svg>'
SENTENCE = "The highest accuracy, 81.7 %, is that of `lorsp_k4`."
TABLE = "| method | clean |\n|:--|--:|\n| `spike_nvpt` | 73.25 |"
FRAME = "<div><style scoped>td { color: red }</style><table><tr><th>rank</th></tr><tr><td>4096</td></tr></table></div>"


def code(*outputs):
    "A code cell and what it displayed."
    return v4.new_code_cell("secret = 1", outputs=[v4.new_output("display_data", data) for data in outputs])


def render(folder, *cells):
    "Write a notebook of these cells and render it."
    write(v4.new_notebook(cells=cells), folder / "report.ipynb")
    command = [sys.executable, TOOL, folder / "report.ipynb"]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def report():
    "Cells with one output of every kind."
    return [
        v4.new_markdown_cell("# A small report\n\nA prompt $P = \\alpha B A$:\n\n$$\\hat{x} = x \\odot \\sum_t s_t$$"),
        code({"text/markdown": SENTENCE, "text/plain": "<IPython.core.display.Markdown object>"}),
        code({"text/markdown": TABLE}),
        code({"text/html": FRAME, "text/plain": "      rank"}),
        code({"image/svg+xml": DOT, "image/png": base64.b64encode(b"not read").decode(), "text/plain": "<Figure size 360x90>"}),
        v4.new_markdown_cell("*Figure. One dot.*"),
    ]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "A folder with the report, its page and its paper."
    folder = tmp_path_factory.mktemp("rendered")
    return folder, render(folder, *report())


def test_page_and_paper(rendered):
    folder, done = rendered
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert {path.name for path in folder.iterdir()} == {"report.ipynb", "report.html", "report.pdf"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in ("<title>A small report</title>", "81.7 %", "<code>lorsp_k4</code>", "73.25", "4096", "<math", "One dot.</figcaption>"):
        assert text in page
    for text in ("secret", "<div", "object&gt;", "Figure size", "<script", 'src="http', "cell5-0.svg"):
        assert text not in page
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_paper_says_what_the_notebook_says(rendered):
    pdfium = pytest.importorskip("pypdfium2")
    with pdfium.PdfDocument(rendered[0] / "report.pdf") as paper:
        text = paper[0].get_textpage().get_text_range()
    for words in ("A small report", "81.7 %, is that of lorsp_k4", "73.25", "4096", "Figure. One dot."):
        assert words in text
    assert "secret" not in text and "object" not in text


def test_the_same_notebook_gives_the_same_bytes(rendered, tmp_path):
    render(tmp_path, *report())
    for name in ("report.html", "report.pdf"):
        assert (tmp_path / name).read_bytes() == (rendered[0] / name).read_bytes()


@pytest.mark.parametrize(
    "cells, said",
    [
        ([v4.new_code_cell("1 + 1")], "no cell has an output: execute the notebook first"),
        ([code({"text/html": "<script>draw()</script>"})], "HTML that has no place on paper: <script>draw()</script>"),
        (
            [code({"application/x-plot": "{}", "text/plain": "Plot()"})],
            "cell 1: an output of kind application/x-plot, text/plain: allowed are",
        ),
        ([v4.new_code_cell("x", outputs=[v4.new_output("error", ename="NameError", evalue="x")])], "cell 1: it stopped with NameError: x"),
        ([v4.new_markdown_cell("$\\nonsense x$")], "Could not convert TeX math"),
        ([v4.new_markdown_cell("![](missing.svg)")], "missing.svg"),
        ([v4.new_markdown_cell("[see](#nowhere)")], "nowhere"),
    ],
    ids=["not executed", "script", "widget", "error", "formula", "image", "link"],
)
def test_what_cannot_be_rendered_is_one_line_and_no_file(tmp_path, cells, said):
    done = render(tmp_path, *cells)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.ipynb"]


def test_a_missing_notebook_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, TOOL, tmp_path / "none.ipynb"], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr == f"{tmp_path / 'none.ipynb'}: No such file or directory\n"
