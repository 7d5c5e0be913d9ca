"Every module notebook runs from top to bottom: its cells are the tests of what it defines."
import nbdev.test
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

config = get_config()
notebooks = [path for path in sorted(nbglob(as_path=True)) if "pipeline" not in path.parts]


@pytest.mark.parametrize("notebook", notebooks, ids=lambda path: path.stem)
def test_runs(notebook):
    passed, _ = nbdev.test.test_nb(notebook.absolute(), skip_flags=config.tst_flags, basepath=config.config_path)
    assert passed, f"{notebook} failed: its traceback is above"
