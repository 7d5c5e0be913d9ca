"Render an executed notebook without its code: NAME.ipynb to a self-contained NAME.html and NAME.pdf beside it."

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

KINDS = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/html", "text/plain"]
FENCE = "`" * 12
LIVE = re.compile(r"<(script|iframe|object|embed|canvas|video|audio|form)\b", re.I)

HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$pagetitle$</title>
<style>
body { max-width: 52rem; margin: 3rem auto; padding: 0 1rem; font: 1rem/1.5 Georgia, "Times New Roman", serif; color: #1a1a1a; }
h1, h2, h3, h4 { line-height: 1.2; margin: 2em 0 .6em; }
h1 { text-align: center; margin-top: 0; }
a { color: #1f4e8c; overflow-wrap: anywhere; }
blockquote { margin: 1em 2em; font-style: italic; }
figure { margin: 1.8em 0; }
figure > img { display: block; max-width: 100%; height: auto; margin: auto; }
figcaption, caption { font-size: .9rem; text-align: left; margin: .6em 0; }
table { display: block; width: max-content; max-width: 100%; overflow-x: auto; margin: 1.8em auto; border-collapse: collapse;
  font-size: .78rem; line-height: 1.3; }
caption { white-space: normal; }
th, td { padding: .3em .5em; text-align: left; vertical-align: top; font-weight: normal; }
thead tr:first-child th { border-top: 1.5px solid; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 1.5px solid; }
thead tr:last-child th { border-bottom: 1px solid; }
code { font: .88em "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { overflow-x: auto; padding: .6em 1em; background: #f5f5f5; }
math[display="block"] { margin: 1em 0; overflow-x: auto; overflow-y: hidden; }
hr { width: 30%; border: 0; border-top: 1px solid #999; margin: 2em auto; }
.footnotes { font-size: .9rem; }
</style>
</head>
<body>
<h1>$title$</h1>
$body$
</body>
</html>
"""

TYPST = """#set document(title: [$title$], date: none)
#set page(paper: "a4", margin: (x: 23mm, top: 22mm, bottom: 24mm), numbering: "1")
#set text(font: "Libertinus Serif", size: 10pt, lang: "en")
#set par(justify: true, leading: .62em, spacing: .95em)
#set smartquote(enabled: false)
#show math.equation.where(block: true): set block(above: 1.1em, below: 1.1em)
#show heading: set block(above: 1.5em, below: .8em)
#show heading: set text(size: 10pt)
#show heading.where(level: 2): set text(size: 12.5pt)
#show heading.where(level: 3): set text(size: 10.5pt)
#show link: set text(fill: rgb("#1f4e8c"))
#show raw: set text(font: "DejaVu Sans Mono", size: 1.02em)
#show raw.where(block: true): it => block(fill: luma(245), inset: 7pt, width: 100%, it)
#show quote.where(block: true): set text(style: "italic")
#set list(indent: .6em)
#set enum(indent: .6em)
#let horizontalrule = align(center, line(length: 30%, stroke: .5pt + luma(120)))
#show figure: set block(above: 1.5em, below: 1.5em)
#show figure.caption: it => block(width: 100%, align(left, text(size: 9pt, it.body)))
#show figure.where(kind: table): set figure.caption(position: top)
#show figure.where(kind: table): set block(breakable: true)
#show image: it => layout(size => {
  let (width, height) = measure(it)
  let zoom = if width > .6 * size.width { size.width / width } else { 1 }
  scale(calc.min(zoom, 110mm / height) * 100%, reflow: true, box(width: width, height: height, it))
})
#set table(inset: (x: .6em, y: .38em), stroke: none)
#set table.hline(stroke: .5pt)
#show table: set text(size: 8.5pt, hyphenate: false)
#show table: set par(justify: false, leading: .5em)
#show table: it => layout(size => {
  let zoom = size.width / measure(it).width
  set text(size: if zoom < .8 { .9em } else { calc.min(zoom, 1) * 1em })
  block(stroke: (y: .8pt), align(left, it))
})

#align(center, block(below: 2em, par(justify: false, text(size: 17pt, weight: "bold")[$title$])))

$body$
"""


class RenderError(Exception):
    "Why a notebook cannot be rendered, in one line."


def pandoc(text: str, *options: str, folder: Path | None = None) -> str:
    "What pandoc makes of a text; a warning is an error."
    import pypandoc

    program = os.environ.get("PYPANDOC_PANDOC") or Path(pypandoc.__file__).parent / "files/pandoc"
    command = [program, "--fail-if-warnings", "--wrap=none", *options]
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RenderError(" ".join(done.stderr.split()))
    return done.stdout


def shown(output: dict, name: str, folder: Path) -> str:
    "One output as Markdown; an image goes to a file of that name in the folder."
    if output.output_type == "stream":
        return f"{FENCE}\n{output.text.rstrip()}\n{FENCE}" if output.name == "stdout" else ""
    if output.output_type == "error":
        raise RenderError(f"it stopped with {output.ename}: {output.evalue}")
    kind = next((kind for kind in KINDS if kind in output.data), None)
    if kind is None or (kind == "text/plain" and any(other.startswith("application/") for other in output.data)):
        raise RenderError(f"an output of kind {', '.join(output.data)}: allowed are {', '.join(KINDS)}")
    content = output.data[kind]
    if kind.startswith("image/"):
        file = name + {"image/svg+xml": ".svg", "image/png": ".png", "image/jpeg": ".jpg"}[kind]
        (folder / file).write_bytes(content.encode() if file.endswith("svg") else base64.b64decode(content))
        return f"![]({file})"
    if kind == "text/html":
        return f"{FENCE}{{=html}}\n{content}\n{FENCE}"
    if kind == "text/plain":
        return "" if re.fullmatch(r"<.*>|\[<.*>\]", content, re.S) else f"{FENCE}\n{content}\n{FENCE}"
    return content


def markdown(notebook: nbformat.NotebookNode, folder: Path) -> str:
    "Prose and outputs of a notebook as one Markdown text."
    parts = []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        for place, output in enumerate(cell.get("outputs", [])):
            try:
                parts.append(shown(output, f"cell{number}-{place}", folder))
            except RenderError as error:
                raise RenderError(f"cell {number}: {error}") from None
    return "\n\n".join(filter(None, parts))


def html_blocks(html: str) -> list:
    "The blocks of a piece of HTML, a data frame's for instance."
    html = re.sub(r"<!--.*?-->|<style\b.*?</style>", "", html, flags=re.S)
    blocks = json.loads(pandoc(html, "-f", "html-native_divs-native_spans", "-t", "json"))["blocks"] if html.strip() else []
    if html.strip() and (not blocks or LIVE.search(html)):
        raise RenderError(f"HTML that has no place on paper: {' '.join(html.split())[:60]}")
    return blocks


def without_html(node):
    "A part of pandoc's tree with its raw HTML turned into blocks."
    if isinstance(node, dict):
        return {key: without_html(value) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    kept = []
    for item in node:
        kind, content = (item.get("t"), item.get("c")) if isinstance(item, dict) else (None, None)
        if kind == "RawBlock":
            kept += html_blocks(content[1])
        elif kind == "RawInline" and re.fullmatch(r"<br\s*/?>", content[1]):
            kept.append({"t": "LineBreak"})
        elif kind == "RawInline":
            if not content[1].startswith("<!--"):
                raise RenderError(f"{content[1]} within a paragraph: write Markdown or a formula instead")
        else:
            kept.append(without_html(item))
    return kept


def caption(block: dict, label: str) -> list | None:
    "The inlines of a paragraph `*Figure. Words.*` or `*Figure 1. Words.*`, its label in bold."
    inlines = block["c"] if block["t"] == "Para" else []
    words = inlines[0]["c"] if len(inlines) == 1 and inlines[0]["t"] == "Emph" else []
    if not words or words[0]["t"] != "Str" or words[0]["c"].rstrip(".:") != label:
        return None
    end = 1 if words[0]["c"] != label else 3
    return [{"t": "Strong", "c": words[:end]}, *words[end:]]


def with_captions(blocks: list) -> list:
    "Lone images become figures; `*Figure. …*` or `*Table. …*` below one becomes its caption."
    kept = []
    for block in blocks:
        if block["t"] == "Para" and [inline["t"] for inline in block["c"]] == ["Image"]:
            block = {"t": "Figure", "c": [["", [], []], [None, []], [{"t": "Plain", "c": block["c"]}]]}
        if kept and kept[-1]["t"] in ("Figure", "Table") and (words := caption(block, kept[-1]["t"])):
            kept[-1]["c"][1] = [None, [{"t": "Plain", "c": words}]]
        else:
            kept.append(block)
    return kept


def titled(tree: dict, default: str) -> dict:
    "The tree with its first H1 as the title."
    first = next((block for block in tree["blocks"] if block["t"] == "Header" and block["c"][0] == 1), None)
    words = first["c"][2] if first else [{"t": "Str", "c": default}]
    blocks = [block for block in tree["blocks"] if block is not first]
    return {**tree, "meta": {"title": {"t": "MetaInlines", "c": words}}, "blocks": blocks}


def render(path: Path) -> list[Path]:
    "Write the notebook's .html and .pdf."
    try:
        import pypandoc  # noqa: F401
        import typst
    except ImportError as error:
        raise RenderError(f"no {error.name}: use `uv run --group render python tools/render.py`") from None
    try:
        notebook = nbformat.read(path, 4)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        raise RenderError(getattr(error, "strerror", None) or "not a notebook") from None
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if code and not any(cell.outputs for cell in code):
        raise RenderError("no cell has an output: execute the notebook first")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as name:
        folder = Path(name)
        (folder / "page.html").write_text(HTML, encoding="utf-8")
        (folder / "page.typ").write_text(TYPST, encoding="utf-8")
        reader = ["-f", "gfm+raw_attribute+smart", "--resource-path", f".{os.pathsep}{path.parent.resolve()}", "--extract-media", "media"]
        tree = json.loads(pandoc(markdown(notebook, folder), *reader, "-t", "json", folder=folder))
        tree = titled({**tree, "blocks": with_captions(without_html(tree["blocks"]))}, path.stem)
        text = json.dumps(tree)
        page = pandoc(
            text,
            "-f",
            "json",
            "-t",
            "html",
            "--template",
            "page.html",
            "--mathml",
            "--embed-resources",
            "--standalone",
            "--syntax-highlighting=none",
            folder=folder,
        )
        paper = pandoc(
            text, "-f", "json", "-t", "typst-smart", "--template", "page.typ", "--standalone", "--syntax-highlighting=none", folder=folder
        )
        paper = paper.replace("#h(-1em)", "#h(-.167em)").replace("#h(0em)", "#h(.278em)")  # pandoc rounds the widths of \! and \;
        (folder / "report.html").write_text(page, encoding="utf-8")
        (folder / "report.typ").write_text(paper, encoding="utf-8")
        try:
            typst.compile(folder / "report.typ", folder / "report.pdf", ignore_system_fonts=True)
        except typst.TypstError as error:
            raise RenderError(" ".join(str(error).split())) from None
        written = [path.with_suffix(suffix) for suffix in (".html", ".pdf")]
        for target in written:
            os.replace(folder / f"report{target.suffix}", target)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: uv run --group render python tools/render.py NOTEBOOK")
    try:
        print(*render(Path(sys.argv[1])), sep="\n")
    except (RenderError, OSError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
