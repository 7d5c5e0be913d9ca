"Scores come back as they were written, and their means are what they are called."

import gzip

import numpy as np
import pandas as pd
import pytest
import torch

from spikeprompt.config import ConfigError
from spikeprompt.evaluation.scores import (
    RUN,
    calibration_error,
    pack,
    per_run,
    read_scores,
    score,
    summary,
    synthetic_scores,
    unpack,
    write_scores,
)


@pytest.fixture(scope="module")
def scores():
    "Synthetic scores with an attack and a fault, which are no corruptions."
    table = synthetic_scores({"better": 3, "equal": 0}, backbones=2, images=203)
    clean = table[table.kind == "clean"]
    harm = lambda kind, name: clean.assign(kind=kind, corruption=name, severity=0.5, accuracy=clean.accuracy / 2)
    table = pd.concat([table, harm("attack", "pgd"), harm("fault", "gaussian")], ignore_index=True)
    return table.assign(epoch=3, prompt_parameters=table.variant.map({"better": 2_812_345.0}), energy_nj=12_345.678901)


def test_calibration_error_of_logits_that_are_calibrated_by_construction():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 3)
    drawn = torch.distributions.Categorical(logits=logits).sample()
    assert calibration_error(logits, drawn) < 0.015 < 0.1 < calibration_error(4 * logits, drawn)


@pytest.mark.parametrize("count", [1, 8, 1003])
def test_bits_come_back(count):
    correct = np.random.default_rng(0).random(count) < 0.8
    assert (unpack(pack(correct)) == correct).all()


def test_score_of_known_logits():
    found = score(torch.eye(4)[[0, 1, 2, 2]], torch.arange(4))
    assert found["accuracy"] == 0.75 and found["correct"].tolist() == [True, True, True, False]


def test_a_table_comes_back_in_the_order_of_the_methods(scores, tmp_path):
    for method, part in scores.groupby("method"):
        write_scores(part, tmp_path / f"{method}.csv.gz")
    again = read_scores(["linear_probe", "equal", "better"], tmp_path)
    assert list(again.method.unique()) == ["linear_probe", "equal", "better"]
    expected = pd.concat([scores[scores.method == method] for method in again.method.unique()], ignore_index=True)
    assert all((a == b).all() for a, b in zip(again.correct, expected.correct))
    pd.testing.assert_frame_equal(again.drop(columns="correct"), expected[again.columns].drop(columns="correct"), rtol=1e-5)
    assert (again.prompt_parameters.dropna() == 2_812_345).all()  # whole numbers are exact


def test_equal_scores_give_equal_bytes(scores, tmp_path):
    part = scores[scores.method == "better"]
    first, second = tmp_path / "better.csv.gz", tmp_path / "again.csv.gz"
    write_scores(part, first)
    write_scores(read_scores(["better"], tmp_path), second)
    assert first.read_bytes() == second.read_bytes() and first.read_bytes()[4:8] == bytes(4)


def test_numbers_are_short(scores, tmp_path):
    write_scores(scores[scores.method == "better"], tmp_path / "better.csv.gz")
    lines = gzip.decompress((tmp_path / "better.csv.gz").read_bytes()).decode().splitlines()
    assert all(line.endswith(",12345.7") for line in lines[1:])


def test_a_file_is_written_whole_or_not_at_all(scores, tmp_path, monkeypatch):
    write_scores(scores[scores.method == "better"], tmp_path / "better.csv.gz")
    before = (tmp_path / "better.csv.gz").read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError):
        write_scores(scores[scores.method == "equal"], tmp_path / "better.csv.gz")
    assert (tmp_path / "better.csv.gz").read_bytes() == before


def test_a_variant_may_be_called_what_pandas_takes_for_missing(scores, tmp_path):
    write_scores(scores[scores.method == "better"].assign(variant="NA", backbone="none"), tmp_path / "better.csv.gz")
    again = read_scores(["better"], tmp_path)
    assert set(again.variant) == {"NA"} and set(again.backbone) == {"none"}


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^.*lorsp\.csv\.gz is missing.*dvc repro.*$"):
        read_scores(["lorsp"], tmp_path)


def test_measures_of_a_run_by_hand(scores):
    run = (scores.backbone == "backbone 1") & (scores.seed == 2)
    at = scores[run].set_index(["variant", "kind", "corruption", "severity"]).accuracy.sort_index()
    own, probe = at["better"], at["linear probe"]
    names = ("gaussian", "shot_noise")
    row = per_run(scores).query("variant == 'better' and backbone == 'backbone 1' and seed == 2").iloc[0]
    assert row.clean == pytest.approx(100 * own["clean"].item())
    assert row.gaussian == pytest.approx(100 * own["noise", "gaussian"].mean())  # not the fault of the same name
    assert row.corrupted == pytest.approx(100 * np.mean([own["noise", name].mean() for name in names]))
    assert row.retention == pytest.approx(100 * row.corrupted / row.clean)
    assert row.mce == pytest.approx(100 * np.mean([(1 - own["noise", n]).sum() / (1 - probe["noise", n]).sum() for n in names]))
    lost = lambda scored, name: (scored["clean"].item() - scored["noise", name]).sum()
    assert row.relative_mce == pytest.approx(100 * np.mean([lost(own, name) / lost(probe, name) for name in names]))


def test_the_reference_has_all_of_its_errors(scores):
    probe = per_run(scores)[lambda runs: runs.variant == "linear probe"]
    np.testing.assert_allclose(probe[["mce", "relative_mce"]], 100)


def test_a_run_keeps_its_properties(scores):
    runs = per_run(scores)
    assert len(runs) == len(scores[RUN].drop_duplicates())
    assert (runs.epoch == 3).all() and runs.prompt_parameters.notna().equals(runs.variant == "better")


def test_runs_without_noise_or_reference_have_gaps_not_errors(scores):
    raw = scores[(scores.kind == "clean") & (scores.variant == "linear probe")].assign(
        method="raw_pixels", variant="raw pixels", backbone="none"
    )
    runs = per_run(pd.concat([scores, raw.head(1)])).set_index("variant").loc[["raw pixels"]]
    assert runs.clean.notna().all() and runs[["corrupted", "mce", "ece_corrupted"]].isna().all(axis=None)
    assert per_run(raw.head(1)).corrupted.isna().all()
    assert per_run(scores[scores.variant == "better"]).mce.isna().all()


def test_summary_has_a_row_for_each_dataset_backbone_and_variant(scores):
    table = summary(scores)
    assert list(table.index.names) == ["dataset", "backbone", "variant"] and len(table) == 6
    row = table.loc["toy", "backbone 0", "better"]
    runs = per_run(scores).query("variant == 'better' and backbone == 'backbone 0'").clean
    assert row["clean %"] == f"{runs.mean():.1f} ± {runs.std():.1f}" and row["prompt parameters"] == "2812345"
    assert table.loc[("toy", "backbone 0", "equal"), "prompt parameters"] == ""
    assert "±" not in summary(scores[scores.seed == 0])["clean %"].iloc[0]
