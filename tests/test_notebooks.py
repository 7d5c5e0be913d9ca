"Every module notebook runs from top to bottom: its cells are the tests of what it defines."
import pkgutil

import nbdev.test
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

import spikeprompt.methods
from spikeprompt.prompts import METHODS, method_class

config = get_config()
notebooks = [path for path in sorted(nbglob(as_path=True)) if "pipeline" not in path.parts]


@pytest.fixture(autouse=True)
def registry():
    "A method's notebook registers its class anew, in this process: later tests get the package's back."
    before = {module.name: method_class(module.name) for module in pkgutil.iter_modules(spikeprompt.methods.__path__)}
    yield
    METHODS.update(before)


@pytest.mark.parametrize("notebook", notebooks, ids=lambda path: path.stem)
def test_runs(notebook):
    passed, _ = nbdev.test.test_nb(notebook.absolute(), skip_flags=config.tst_flags, basepath=config.config_path)
    assert passed, f"{notebook} failed: its traceback is above"
