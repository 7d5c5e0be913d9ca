"A trial of the whole pipeline in one process."

import re

import pytest
import yaml
from typer.testing import CliRunner

from spikeprompt.cli import app
from spikeprompt.config import project_root, read_params
from spikeprompt.stages import parse_experiment
from spikeprompt.trial import FEW, pipeline, shrink, try_pipeline

SMALL = {"datasets": {"sprites_position": {}}, "backbones": {"names": ["pocket_resnet"]}, "methods": {"no_prompt": None, "lorsp": None}}


def test_the_stages_are_those_of_dvc_yaml_with_other_places():
    stages = yaml.safe_load((project_root() / "dvc.yaml").read_text())["stages"]
    places = {"${runs}": "top/runs", "${results}": "top/results", "${key}": "vpt"}

    def command(name):
        text = stages[name].get("do", stages[name])["cmd"]
        for variable, place in places.items():
            text = text.replace(variable, place)
        notebook, executed = re.search(r"nbs/pipeline/(\S+)\.ipynb (\S+)", text).groups()
        return notebook, executed, dict(re.findall(r"-p (\S+) (\S+)", text))

    expected = [command(name) for name in ("prepare", "train", "evaluate", "figures", "report")]
    assert [tuple(stage[1:]) for stage in pipeline(["vpt"], "top")] == expected


def test_what_is_left_out():
    config = parse_experiment(read_params())
    small = shrink(config)
    assert small.methods == config.methods and small.train.mappings == config.train.mappings
    assert small.backbones.names == config.backbones.names[:1] and small.train.seeds == config.train.seeds[:1] and small.train.epochs == 1
    ((name, data),) = small.datasets.items()
    assert name == next(iter(config.datasets)) and all(getattr(data, key) <= most for key, most in FEW.items())
    assert small.robustness.sigmas == config.robustness.sigmas and small.robustness.corruptions == config.robustness.corruptions


def test_what_belongs_to_what_is_left_out_goes_with_it():
    first, second = [*read_params()["datasets"]]
    options = {"pocket_resnet": {"img_size": 48}, "pocket_vit": {"img_size": 48}}
    named = {"backbones": {"names": [*options], "options": options}, "robustness": {"files": {second: "somewhere", first: "else"}}}
    small = shrink(parse_experiment(read_params() | named))
    assert [*small.backbones.options] == ["pocket_resnet"] and small.robustness.files == {first: "else"}


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.mark.slow
def test_a_trial_writes_its_report_and_nothing_else(params, tmp_path):
    watched = [path for name in ("results", "nbs", "experiments") for path in (project_root() / name).rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in [*watched, project_root() / "params.yaml", project_root() / "dvc.lock"]}
    for _ in range(2):  # the second replaces the first
        done = CliRunner().invoke(app, ["try", str(params), "--out", str(tmp_path / "trial")])
        assert done.exit_code == 0, done.output
    assert "[7/7] report" in done.stderr and "left" in done.stderr
    report = tmp_path / "trial/results/report.ipynb"
    assert done.stdout.strip() == str(report) and "LoRSP" in report.read_text()
    assert len((tmp_path / "trial/results/verdicts.csv").read_text().splitlines()) > 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_that_is_no_trial_is_left_alone(params, tmp_path):
    (tmp_path / "precious/runs/stages").mkdir(parents=True)  # as a checkout has them
    (tmp_path / "precious/file").write_text("1")
    done = CliRunner().invoke(app, ["try", str(params), "--out", str(tmp_path / "precious")])
    assert done.exit_code == 2 and "is not an earlier trial" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "precious/file").read_text() == "1"


def test_a_failing_stage_is_one_line(params, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("spikeprompt.datasets.splits.test_images", broken)
    monkeypatch.setattr("spikeprompt.trial.check_experiment", lambda config: {})
    with pytest.raises(ValueError, match=r"^prepare: \w+ in cell \d+ of 100_prepare.ipynb: [^\n]+$"):
        try_pipeline(parse_experiment(SMALL), tmp_path / "trial", report=lambda line: None)
    assert (tmp_path / "trial/results/notebooks/prepare.ipynb").exists()  # with the traceback, to read
