"The notebooks of the lorsp study run on a few digits, and write what the findings read."
import json
import subprocess

import pytest

from spikeprompt.scores import read_record, unpack
from spikeprompt.settings import root


def papermill(notebook, folder, *parameters):
    subprocess.run(["papermill", "--engine", "plain", "--no-progress-bar", "--log-level", "ERROR", "-k", "python3",
                    f"studies/lorsp/{notebook}.ipynb", str(folder / "executed.ipynb"), *parameters],
                   cwd=root, check=True, capture_output=True, text=True)


def test_choices_are_recorded_for_every_change_and_rate(tmp_path):
    papermill("choose", tmp_path, "-p", "part", "options", "-p", "scores", str(tmp_path / "options.json"))
    tried = json.loads((tmp_path / "options.json").read_text())["tried"]
    assert set(tried) == {"base", "surrogate sigmoid"} and set(tried["base"]) == {"0.1"}
    found = tried["base"]["0.1"]["pocket_resnet"]
    assert 0 < found["density"] < 1 and 0 < found["flips"] < 0.5 and 0 < found["support_iou"] < 1
    assert 0.5 < found["val_accuracy"] <= 1 and 0.1 < found["noisy_accuracy"] <= 1


def test_what_is_chosen_is_compared(tmp_path):
    chosen = tmp_path / "chosen.json"
    papermill("choose", tmp_path, "-p", "scores", str(chosen))
    found = json.loads(chosen.read_text())
    judged = {float(lr): by["pocket_resnet"]["val_accuracy"] + by["pocket_resnet"]["noisy_accuracy"]
              for lr, by in found["tried"]["lorsp"].items()}
    assert set(judged) > {0.1} and found["best"] == {"lorsp": max(judged, key=judged.get), "random_mask": found["best"]["random_mask"]}

    papermill("compare", tmp_path, "-p", "chosen", str(chosen), "-p", "scores", str(tmp_path))
    trained = read_record(tmp_path / "trained.json.gz")
    lorsp, mask = (trained[name]["pocket_resnet"]["0"] for name in ("lorsp", "random_mask"))
    assert mask["firing_rate"] == pytest.approx(lorsp["firing_rate"], abs=0.02)
    assert mask["density"] == pytest.approx(lorsp["density"], abs=0.02)
    assert lorsp["rank"] <= 2 and lorsp["largest_where_nothing_fired"] == 0
    assert len(lorsp["over_training"]["density"]) == 2 and set(lorsp["flips"]) == {"0.05", "0.1"}
    tested = read_record(tmp_path / "compared-lorsp.json.gz")["pocket_resnet"]["digits"]["lorsp"]["0"]
    assert set(tested) == {"clean", "gaussian"} and len(unpack(tested["clean"]["0.0"]["correct"])) == 20
    assert read_record(tmp_path / "compared-linear_probe.json.gz")["pocket_resnet"]["digits"]["linear_probe"]
