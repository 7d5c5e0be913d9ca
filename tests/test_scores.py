"Scores come back as they were written."
import pytest

from spikeprompt.experiments import check_params
from spikeprompt.scores import read_record, read_tested, write_record
from spikeprompt.settings import read_params


def test_a_record_comes_back_and_has_no_date(tmp_path):
    record = {"pocket_vit": {"digits": {"lorsp": {"0": {"clean": {"0": {"accuracy": 0.123456789, "correct": "3:oA=="}}}}}}}
    write_record(record, tmp_path / "noise-lorsp.json.gz")
    assert read_record(tmp_path / "noise-lorsp.json.gz") == record
    assert (tmp_path / "noise-lorsp.json.gz").read_bytes()[4:8] == bytes(4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="noise-linear_probe.json.gz"):
        read_tested(check_params(read_params()), tmp_path)
