"""Build the site: README, notebooks as they were executed, report, and a reference of every public symbol.

    uv run --group docs python tools/docs.py            build/site/html
    uv run --group docs python tools/docs.py --serve    open it, and build again what changes

Nothing is executed and nothing is fetched."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SOURCE, DOCTREES, PAGES = [ROOT / "build/site" / name for name in ("source", "doctrees", "html")]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

README = {  # page -> title, sections of the README
    "start": ("Get started", ["Use it", "Reproduce it"]),
    "how_to": ("How to", ["Change an experiment", "When something stops, and on other machines", "Add a method"]),
    "interpretation": ("What is ours", ["Our interpretation", "Where the backbones come from", "Real backbones"]),
}
NOTEBOOKS = {  # page -> title, notebooks in reading order
    "tutorials": ("Tutorials", ["nbs/98_*", "nbs/tutorials/*", "nbs/template_*"]),
    "foundations": ("Foundations", ["nbs/0*", "nbs/datasets/*", "nbs/backbones/*"]),
    "prompts": ("Prompts", ["nbs/prompts/*", "nbs/methods/*", "nbs/baselines/*", "nbs/controls/*", "nbs/60_*"]),
    "experiments": ("Experiments", ["nbs/61_*", "nbs/training/*", "nbs/robustness/*", "nbs/evaluation/*", "nbs/plots/*", "nbs/9[4-79]*"]),
    "pipeline": ("Pipeline", ["nbs/pipeline/*"]),
    "executed": ("As it ran", ["results/notebooks/*"]),
}
REPORT = Path("results/report.ipynb")
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
IMPORTS = re.compile(r"(from|import|\)|    )")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)|(!)\[([^\]]*)\]\((?!https?:)([^)]+)\)")


def relink(text: str, folder: Path) -> str:
    "Point links to the project's files at their pages; a file that has none keeps its name alone."

    def place(link):
        path = (folder / link.partition("#")[0]).resolve()
        return path.relative_to(ROOT) if path.is_relative_to(ROOT) else None

    def replace(found):
        name, link, image, alt, source = found.groups()
        path = place(source if image else link)
        if image:
            return f"![{alt}](/{path})"
        if path and path.suffix == ".md" and path.parts[0] in ("docs", "CONTRIBUTING.md"):
            return f"[{name}](/{path.name.lower()})"
        return f"[{name}](/{path})" if path and path.suffix == ".ipynb" and path.parts[0] in ("nbs", "results", "experiments") else name

    return LINK.sub(replace, text)


def plain(markdown: str) -> str:
    "The last paragraph of a text that has words, without marks: what the figure below it shows."
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", markdown) if not part.lstrip().startswith(("$$", "```", "|"))]
    last = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraphs[-1] if paragraphs else "")
    return re.sub(r"^#+ |[$`*\\]", "", last).rstrip(":")


def as_page(path: Path, code: str) -> nbformat.NotebookNode:
    "A notebook as its reader sees it: no directives, no plumbing; code `shown` but for imports, `folded`, or `left out`."
    nb, cells, said, figures = nbformat.read(path, 4), [], "", 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, path.parent)
            said, figures = plain(cell.source) or said, 0
            if cell.source.startswith("#") and "\n" not in cell.source.strip():  # a heading alone says little
                said = f"{said}, in {plain(nb.cells[0].source.splitlines()[0])}"
        elif HIDDEN.search(cell.source) or not cell.source.strip() or (code == "left out" and not cell.outputs):
            continue
        else:
            cell.source = DIRECTIVE.sub("", cell.source)
            imports = all(IMPORTS.match(line) for line in cell.source.splitlines() if line) and not cell.outputs
            tag = "remove-input" if code == "left out" else "hide-input" if code == "folded" or imports else ""
            cell.metadata = {"tags": [tag] if tag else []}
            if any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
                figures += 1
                cell.metadata["mystnb"] = {"image": {"alt": f"Figure{f' {figures}' if figures > 1 else ''}: {said}"}}
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output.data["text/markdown"] = relink("".join(output.data["text/markdown"]), path.parent)
        cells.append(cell)
    nb.cells = cells
    return nb


def write(name: str | Path, text: str):
    "Write one source of the site."
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(title: str, pages: dict[str, tuple[str, str]], said: str = "") -> str:
    "A page that lists others: page -> its title and what it is about; `said` stands above."
    from api import table

    rows = table([("", ""), *((f"[{name}](/{page})", about) for page, (name, about) in pages.items())])
    listed = "\n".join(f"/{page.rpartition('.')[0]}" for page in pages)
    return f"# {title}\n\n{said}\n\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def number(path: Path) -> tuple[int, str]:
    "What sorts notebooks by their number."
    return len(path.stem.partition("_")[0]), path.stem


def add_report(place: Path, title: str = "") -> nbformat.NotebookNode:
    "A report and its figures; an experiment's has a title of its own."
    report = as_page(ROOT / place, "left out")
    if title:
        report.cells[0].source = re.sub(r"^# .*", lambda found: f"# {title}", report.cells[0].source)
    write(place, nbformat.writes(report))
    shutil.copytree((ROOT / place).parent / "figures", SOURCE / place.parent / "figures")
    return report


def gather():
    "Write all sources of the site anew."
    from api import page, public_modules, targets

    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE, ignore=shutil.ignore_patterns("__pycache__"))
    parts = re.split(r"^## (.+)\n", (ROOT / "README.md").read_text(), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2]))
    for name, (title, wanted) in README.items():
        text = "\n\n".join(f"## {section}\n\n{sections[section].strip()}" for section in wanted)
        write(f"{name}.md", f"# {title}\n\n{relink(text, ROOT)}\n")

    write("contributing.md", relink((ROOT / "CONTRIBUTING.md").read_text(), ROOT))

    links = {}
    for name, (title, patterns) in NOTEBOOKS.items():
        listed = {}
        for path in [path for pattern in patterns for path in sorted(ROOT.glob(f"{pattern}.ipynb"), key=number)]:
            place = path.relative_to(ROOT)
            shown = as_page(path, "folded" if name in ("pipeline", "executed") or path.stem == "98_play" else "shown")
            heading, *rest = [line for line in shown.cells[0].source.splitlines() if line]
            if name == "executed" and "-" in path.stem:  # a stage that ran once for each method
                method = path.stem.partition("-")[2].replace("_", " ")
                shown.cells[0].source = shown.cells[0].source.replace(heading, f"{heading}: {method}", 1)
                heading = f"{heading}: {method}"
            write(place, nbformat.writes(shown))
            listed[place.as_posix()] = heading.removeprefix("# "), rest[0].removeprefix("> ").partition(". ")[0].rstrip(".")
            for mention in place.as_posix(), place.with_suffix("").as_posix(), path.stem:
                links[mention] = ("std", "doc", f"/{place.with_suffix('').as_posix()}")
        write(f"{name}.md", contents(title, listed))

    listed = {"leads.md": ("What was tried", "Trials on the way to the defaults, and what was dropped")}
    for path in sorted(ROOT.glob("experiments/*/results/report.ipynb")):
        place, params = path.relative_to(ROOT), path.parents[1] / "params.yaml"
        title, _, about = params.read_text().partition("\n")[0].removeprefix("# ").partition(": ")
        add_report(place, title)
        listed[place.as_posix()] = title, about.partition(". ")[0].rstrip(".")
    said = (
        "Pipelines beside the main one, each with a question, a params file and a report of its own. "
        "`uv run dvc repro experiments/NAME/dvc.yaml` runs one; its report stands here once its results are committed."
    )
    write("reports.md", contents("Experiments' reports", listed, said))

    add_report(REPORT)
    found = re.search(r"^\*\*What was found.*?^!\[.*?\n\n.*?\n\n", parts[0], re.M | re.S)[0]  # up to its figure, with the caption
    write("finding.md", relink(found, ROOT))

    modules = public_modules()
    for module in modules:
        write(f"reference/{module.__name__}.md", page(module))
    described = {f"reference/{module.__name__}.md": (module.__name__, module.__doc__) for module in modules}
    write("reference/index.md", contents("Reference", described))
    write("targets.json", json.dumps(links | targets(modules)))


def main():
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--serve", action="store_true", help="open the site, and build again what changes")
    parser.add_argument("--gather", action="store_true", help="write Sphinx's sources alone")
    chosen = parser.parse_args()
    gather()
    if chosen.gather:
        return
    places = ["-d", DOCTREES, SOURCE, PAGES]
    if chosen.serve:
        watched = [option for name in ("docs", "nbs", "results", "README.md", "CONTRIBUTING.md") for option in ("--watch", ROOT / name)]
        again = ["--pre-build", f"{sys.executable} {__file__} --gather", "--ignore", SOURCE]
        raise SystemExit(subprocess.run([sys.executable, "-m", "sphinx_autobuild", *watched, *again, "--open-browser", *places]).returncode)
    strict = ["-q", "-W", "--keep-going", "-j", "auto", "-b", "html"]
    raise SystemExit(subprocess.run([sys.executable, "-m", "sphinx", *strict, *places]).returncode)


if __name__ == "__main__":
    main()
