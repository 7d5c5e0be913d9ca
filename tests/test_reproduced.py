"A run beside the committed results."

import subprocess

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from spikeprompt.cli import app
from spikeprompt.evaluation.reproduced import answer, changes, flipped, tables
from spikeprompt.evaluation.scores import synthetic_scores, write_scores


@pytest.fixture
def scores():
    return synthetic_scores({"A": 3.0, "B": 1.0}, seeds=3, backbones=2, images=200)


def shifted(scores, seed, points):
    "The scores with one run's clean accuracy moved."
    moved = scores.copy()
    chosen = (moved.variant == "A") & (moved.backbone == "backbone 0") & (moved.seed == seed) & (moved.kind == "clean")
    assert chosen.sum() == 1
    moved.loc[chosen, "accuracy"] += points / 100
    return moved


def compared(verdict="not significant", difference=1.0):
    keys = {"mapping": "label", "dataset": "toy", "variant": "A", "placement": "pixels", "reference": "no prompt", "images": "clean"}
    return pd.DataFrame([{**keys, "verdict": verdict, "difference": difference}])


def test_change_and_spread_by_hand(scores):
    found = changes(shifted(scores, 1, 1.5), scores).set_index(["variant", "backbone", "images"])
    assert found.change["A", "backbone 0", "clean"] == pytest.approx(0.5) and (found.change.abs() > 1e-9).sum() == 1
    clean = 100 * scores[scores.kind == "clean"].set_index(["backbone", "variant", "seed"]).accuracy
    spread = np.sqrt(clean.groupby(["backbone", "variant"]).var().mean())
    assert found.xs("clean", level="images").spread.to_numpy() == pytest.approx(spread)


def test_answers(scores):
    same = answer(scores, scores, compared(), compared())
    assert same[0] and same[1][-1] == "reproduced exactly" and "0 of 1 changed" in same[1][-2]
    spread = changes(scores, scores).query("images == 'clean'").spread.iloc[0]
    held, lines = answer(shifted(scores, 0, 2.9 * spread), scores, compared("equivalent", 1.1), compared())
    assert held and lines[-1] == "reproduced within the spread of seeds" and "too sharp" in lines[-2]
    held, lines = answer(shifted(scores, 0, 3.1 * spread), scores, compared("equivalent", 99), compared())
    assert not held and lines[-1].startswith("not reproduced: 1 means") and "A, backbone 0" in lines[-1] and "too sharp" not in lines[-2]


def test_one_seed_has_no_spread(scores):
    one = scores[scores.seed == 0]
    assert answer(one, one, compared(), compared())[0]
    assert not answer(shifted(one, 0, 0.5), one, compared(), compared())[0]


def test_another_experiment_is_refused(scores):
    with pytest.raises(ValueError, match="rows are in one score table alone, e.g. .*B.*the experiment is not the committed one"):
        changes(scores[scores.variant != "B"], scores)


def test_only_verdicts_that_changed_are_told():
    before = pd.concat([compared(), compared().assign(reference="B")])
    now = pd.concat([compared("equivalent", 1.5), compared().assign(reference="B")])
    (row,) = flipped(now, before).itertuples()
    assert (row.reference, row.before, row.now, row.moved) == ("no prompt", "not significant", "equivalent", 0.5)


def test_from_a_commit_and_on_the_command_line(scores, tmp_path, monkeypatch):
    for module in "evaluation.reproduced", "stages":
        monkeypatch.setattr(f"spikeprompt.{module}.project_root", lambda: tmp_path)
    git = lambda *command: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=tmp_path, check=True)
    git("init", "-q")
    folder = tmp_path / "results/scores"
    folder.mkdir(parents=True)
    call = lambda *options: CliRunner().invoke(app, ["reproduced", *options])
    done = call()
    assert done.exit_code == 2 and "results: it has no scores and verdicts" in done.stderr
    for method, part in scores.groupby("method"):
        write_scores(part, folder / f"{method}.csv.gz")
    compared().to_csv(tmp_path / "results/verdicts.csv", index=False)
    assert "a commit of this repository is needed" in call().stderr and call().exit_code == 2
    told = call("--tell")
    assert told.exit_code == 0 and told.stdout.startswith("not compared with HEAD")
    git("add", "-A")
    git("commit", "-qm", "results")
    pd.testing.assert_frame_equal(tables("results")[0], tables("results", "HEAD")[0])
    assert call().exit_code == 0 and call().stdout.endswith("reproduced exactly\n")
    part = scores[scores.method == scores[scores.variant == "A"].method.iloc[0]]
    write_scores(shifted(part, 0, 60), folder / f"{part.method.iloc[0]}.csv.gz")
    done = call()
    assert done.exit_code == 1 and "not reproduced" in done.stdout and call("--tell").exit_code == 0
