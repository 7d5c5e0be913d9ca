"The engine stores no noise; a checksum of code sees every change of meaning and no other."

import importlib
import re
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spikeprompt.engine import INPUTS, X86, PlainEngine, code_checksum, import_closure, normalise_notebook, shrink_png


def png(image, **metadata):
    "A PNG in base64."
    file, info = BytesIO(), PngInfo()
    for name, value in metadata.items():
        info.add_text(name, value)
    image.save(file, "PNG", pnginfo=info)
    return b64encode(file.getvalue()).decode() + "\n"


def opened(text):
    return Image.open(BytesIO(b64decode(text)))


PLOT = Image.effect_noise((64, 64), 80).convert("RGB")
PLOT.paste((10, 200, 30), (0, 0, 64, 60))
TRANSPARENT = Image.new("RGBA", (8, 8), (10, 20, 30, 0))


@pytest.mark.parametrize(
    "image", [PLOT, PLOT.convert("RGBA"), PLOT.quantize(16), TRANSPARENT, PLOT.convert("L")], ids=lambda image: image.mode
)
def test_a_png_keeps_its_look_and_loses_its_metadata(image):
    small = shrink_png(png(image, Software="Matplotlib 3.11"))
    assert small == shrink_png(png(image)) == shrink_png(small)
    assert len(small) <= len(png(image))
    assert set(opened(small).info) <= {"transparency"}
    difference = np.int64(opened(small).convert("RGBA")) - np.int64(image.convert("RGBA"))
    assert np.abs(difference).max() <= 20
    assert opened(small).convert("RGBA").getpixel((5, 5)) == image.convert("RGBA").getpixel((5, 5))


def test_a_notebook_is_normalised_once_and_for_all():
    outputs = [
        new_output("stream", name="stdout", text="one\n"),
        new_output("stream", name="stderr", text="/tmp/ipykernel_17/3.py:1: PerformanceWarning: slow\n"),
        new_output("stream", name="stdout", text="two\n"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "ab12"}, "text/plain": "0/10"}),
        new_output("execute_result", {"text/plain": "<Thing at 0x7f2b5c0d1e80>", "image/png": png(PLOT)}, execution_count=9),
    ]
    cell = new_code_cell("x", outputs=outputs, execution_count=9, metadata={"tags": ["kept"], "papermill": {"duration": 0.1}})
    injected = new_code_cell("x = 1", metadata={"tags": ["injected-parameters"]})
    nb = new_notebook(
        cells=[cell, injected], metadata={"kernelspec": {"name": "python3", "display_name": "P"}, "widgets": {}, "papermill": {}}
    )
    once = nbformat.writes(normalise_notebook(nb))
    assert [output.get("text") for output in nb.cells[0].outputs] == ["one\ntwo\n", None]
    assert nb.cells[0].metadata == {"tags": ["kept"]} and set(nb.metadata) == {"kernelspec"}
    assert not re.search(r"0x7f|/tmp|ab12|papermill|: 9", once)
    assert nb.cells[1].id == "injected-parameters"
    assert nbformat.writes(normalise_notebook(nbformat.reads(once, 4))) == once


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(tmp_path, capsys):
    from papermill import execute_notebook

    source = """import os, sys, time, warnings
for i in range(3):
    print(i, flush=True)
    time.sleep(0.1)
print(os.getpid(), file=sys.stderr)
warnings.warn(f"took {time.time()} s", RuntimeWarning)
n, object()"""
    nb = new_notebook(cells=[new_code_cell("n = 1", metadata={"tags": ["parameters"]}), new_code_cell(source)])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, tmp_path / "in.ipynb")
    for name in "one", "two":
        execute_notebook(tmp_path / "in.ipynb", tmp_path / f"{name}.ipynb", {"n": 2}, engine_name="plain", progress_bar=False, cwd=tmp_path)
    one, two = ((tmp_path / f"{name}.ipynb").read_text() for name in ("one", "two"))
    assert one == two and "ipykernel_" not in one
    assert "(2, <object>)" in one and [o.output_type for o in nbformat.reads(one, 4).cells[2].outputs] == ["stream", "execute_result"]
    assert capsys.readouterr().err.count("RuntimeWarning: took") == 2


def test_the_engine_is_found_whoever_imports_first():
    assert PlainEngine.nb_kernel_name(new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python"}})) == "python3"
    from papermill.engines import papermill_engines

    assert papermill_engines.get_engine("plain").__name__ == "PlainEngine"


FILES = {
    "pack/__init__.py": '"A package."\nfrom .public import shown\n__version__ = "1"\n',
    "pack/public.py": "def shown():\n    return 1\n",
    "pack/base.py": '"Base."\nfrom .config import VALUE\n\n\nclass Base:\n    "A class."\n\n    value = VALUE  # of config\n',
    "pack/config.py": "VALUE = 3\n",
    "pack/unused.py": "X = 1\n",
    "pack/deep/__init__.py": "",
    "pack/deep/method.py": "import json\nfrom pack.base import Base\n\n\nclass Method(Base):\n    pass\n",
    "pack/deep/lazy.py": "L = 1\n",
    "pack/deep/helper.py": "H = 1\n",
    "own_extension.py": "from pack.deep import method\nimport own_helper\n\n\nclass Own(method.Method):\n    pass\n",
    "own_helper.py": "Y = 1\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A small package with an extension beside it; edits files and takes checksums."
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if name.split(".")[0] in ("pack", "own_extension", "own_helper"):
            del sys.modules[name]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def checksum(*sources):
    return code_checksum(*sources, package="pack")


def closure(source):
    return import_closure(source, package="pack")


def notebook(path, *sources):
    cells = [new_markdown_cell("# Prose")] + [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells), path)
    return path


METHOD_CLOSURE = ["pack.base", "pack.config", "pack.deep.method"]


def test_a_closure_follows_imports_without_importing(project):
    assert closure("pack.deep.method") == METHOD_CLOSURE
    assert not {name for name in sys.modules if name.split(".")[0] == "pack"}


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("base.py", '"A class."', '"Another sentence."'),
        ("base.py", '    "A class."\n\n', ""),
        ("base.py", "# of config", "# a new comment"),
        ("base.py", "value = VALUE", "value = (\n        VALUE\n    )"),
        ("deep/method.py", "    pass\n", '    "Now with a docstring."\n'),
        ("unused.py", "X = 1", "X = 2"),
        ("public.py", "return 1", "return 2"),
    ],
    ids=["docstring", "no docstring", "comment", "layout", "pass", "outside the closure", "re-export"],
)
def test_prose_layout_and_other_modules_change_nothing(project, file, old, new):
    before = checksum("pack.deep.method")
    edit(project / "pack" / file, old, new)
    assert checksum("pack.deep.method") == before


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("config.py", "3", "4"),
        ("config.py", "3", '"3"'),
        ("base.py", "class Base", "class Base(dict)"),
        ("deep/method.py", "Method(Base):\n    pass", "Method(Base):\n    keep = None"),
        ("__init__.py", '__version__ = "1"\n', "import os\n\nos.environ['A'] = '1'\n"),
    ],
    ids=["constant", "type of a constant", "base class", "None", "package with an effect"],
)
def test_meaning_changes_the_checksum(project, file, old, new):
    before = checksum("pack.deep.method")
    edit(project / "pack" / file, old, new)
    assert checksum("pack.deep.method") != before


def test_a_field_description_is_prose_and_its_default_is_not(project):
    path = project / "pack/config.py"
    path.write_text('VALUE = Field(3, description="three")\n')
    before = checksum("pack.base")
    edit(path, "three", "3 of them")
    assert checksum("pack.base") == before
    edit(path, "Field(3", "Field(4")
    assert checksum("pack.base") != before


@pytest.mark.parametrize(
    "line",
    [
        "from . import helper",
        "from .helper import H",
        "import pack.deep.helper",
        "from pack import deep\nh = deep.helper.H",
        "def later():\n    from pack.deep.helper import H",
        "def later():\n    import importlib\n    return importlib.import_module('pack.deep.helper')",
    ],
)
def test_a_new_helper_is_seen_however_it_is_imported(project, line):
    edit(project / "pack/deep/method.py", "import json\n", f"import json\n{line}\n")
    assert closure("pack.deep.method") == sorted([*METHOD_CLOSURE, "pack.deep.helper"])
    before = checksum("pack.deep.method")
    edit(project / "pack/deep/helper.py", "1", "2")
    assert checksum("pack.deep.method") != before


def test_a_name_of_the_package_leads_to_its_module(project):
    first = notebook(project / "one.ipynb", "from pack import shown")
    assert closure(first) == ["pack.public"]
    second = notebook(project / "two.ipynb", "import pack as p\np.shown(), p.__version__, p.deep.method.Method")
    assert closure(second) == sorted([*METHOD_CLOSURE, "pack.public"])
    edit(project / "pack/__init__.py", "__version__", 'TABLE = {"L": "deep.lazy"}\n__version__'.replace("TABLE", "_TABLE"))
    assert closure(notebook(project / "three.ipynb", "from pack import L")) == ["pack.deep.lazy"]
    assert closure(notebook(project / "four.ipynb", "from pack import unknown")) == ["pack.deep.lazy", "pack.public"]


def test_an_extension_brings_its_neighbours(project):
    extension = importlib.import_module("own_extension")
    names = sorted([*METHOD_CLOSURE, "own_extension", "own_helper"])
    assert closure(extension) == closure("own_extension") == names
    before = checksum(extension)
    edit(project / "own_helper.py", "1", "2")
    assert checksum(extension) != before
    assert not {"json", "torch"} & set(names)


def test_a_notebook_is_its_code_cells(project):
    path = notebook(project / "nb.ipynb", "%matplotlib inline\nfrom pack.base import Base", "%%time\nfrom pack.deep.lazy import L", "x = 1")
    assert closure(path) == ["pack.base", "pack.config", "pack.deep.lazy"]
    before = checksum(path)
    assert checksum("nb.ipynb") == before
    nb = nbformat.read(path, 4)
    nb.cells[0].source, nb.cells[3].source, nb.cells[1].outputs = (
        "# Other prose",
        "x = 1  # a comment",
        [new_output("stream", text="hello")],
    )
    nbformat.write(nb, path)
    assert checksum(path) == before
    nb.cells[3].source = "x = 2"
    nbformat.write(nb, path)
    assert checksum(path) != before


@pytest.mark.parametrize("magic", ["!ls", "%time x = 1", "%%bash\nls -l | wc", "await f()", "x = !ls", "?len"])
def test_ipythons_syntax_is_read(project, magic):
    path = notebook(project / "nb.ipynb", magic)
    before = checksum(path)
    assert before != checksum(notebook(path, magic.replace("l", "k").replace("1", "2").replace("f()", "g()")))


def test_sources_count_in_any_order_and_all(project):
    assert checksum("pack.base", "pack.public") == checksum("pack.public", "pack.base")
    assert checksum("pack.base") != checksum("pack.base", "pack.public")


def test_a_source_that_is_not_found_is_refused(project):
    with pytest.raises(ValueError, match="module 'pack.nothing': no source file is found"):
        checksum("pack.nothing")


def test_closures_of_this_package_keep_to_the_reading_order():
    assert import_closure("spikeprompt.config") == ["spikeprompt.config"]
    modules = [f"spikeprompt.{name}" for name in ("config", "datasets.base", "datasets.splits")]
    assert import_closure("spikeprompt.datasets.splits") == modules
    assert "spikeprompt.config" in import_closure(Path("nbs/datasets/04_splits.ipynb"))


def test_kernels_get_the_threads_and_the_instruction_set_that_decide_over_the_last_digits(tmp_path, monkeypatch):
    for variable in (*INPUTS, *X86):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")  # one's own choice stays
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    code = f"import os\n{{name: os.environ.get(name) for name in {[*INPUTS, *X86]}}}"
    notebook = new_notebook(cells=[new_code_cell(code)])
    notebook.metadata.papermill = {}
    for cell in notebook.cells:
        cell.metadata.papermill = {}
    done = PlainEngine.execute_notebook(notebook, "python3")
    assert eval(done.cells[0].outputs[0].data["text/plain"]) == INPUTS | X86 | {"MKL_CBWR": "COMPATIBLE"}
