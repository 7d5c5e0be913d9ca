"Scores are read alike from files of either kind."
import json

import pandas as pd
import pytest

from spikeprompt.experiments import check_params
from spikeprompt.scores import read_tested, write_record
from spikeprompt.settings import read_params, root


@pytest.fixture
def gzipped(tmp_path):
    "The pipeline's scores, written as the study writes its own."
    for path in (root / "results/scores").glob("noise-*.json"):
        write_record(json.loads(path.read_text()), tmp_path / f"{path.name}.gz")
    return tmp_path


def test_both_kinds_read_alike(gzipped):
    params = check_params(read_params())
    pd.testing.assert_frame_equal(read_tested(params, gzipped), read_tested(params), check_exact=True)


def test_a_gzipped_file_has_no_date(gzipped):
    for path in gzipped.iterdir():
        assert path.read_bytes()[4:8] == bytes(4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="noise-linear_probe.json"):
        read_tested(check_params(read_params()), tmp_path)
