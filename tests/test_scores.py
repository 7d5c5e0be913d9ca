"Scores come back as they were written, and their means are what they are called."

import gzip

import numpy as np
import pandas as pd
import pytest
import torch

from spikeprompt.config import ConfigError
from spikeprompt.evaluation.scores import (
    accuracy_table,
    calibration_error,
    headroom,
    pack,
    per_run,
    read_scores,
    score,
    synthetic_scores,
    unpack,
    write_scores,
)
from spikeprompt.stages import RUN


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
    again = read_scores(["no_prompt", "equal", "better"], tmp_path)
    assert list(again.method.unique()) == ["no_prompt", "equal", "better"]
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
    write_scores(scores[scores.method == "better"].assign(variant="NA", backbone="none", placement="none"), tmp_path / "better.csv.gz")
    again = read_scores(["better"], tmp_path)
    assert set(again.variant) == {"NA"} and set(again.backbone) == set(again.placement) == {"none"}


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^.*lorsp\.csv\.gz is missing.*dvc repro.*$"):
        read_scores(["lorsp"], tmp_path)


def test_measures_of_a_run_by_hand(scores):
    run = (scores.backbone == "backbone 1") & (scores.seed == 2)
    at = scores[run].set_index(["variant", "kind", "corruption", "severity"]).accuracy.sort_index()
    own, none = at["better"], at["no prompt"]
    names = ("gaussian", "shot_noise")
    row = per_run(scores).query("variant == 'better' and backbone == 'backbone 1' and seed == 2").iloc[0]
    assert row.clean == pytest.approx(100 * own["clean"].item())
    assert row.gaussian == pytest.approx(100 * own["noise", "gaussian"].mean())  # not the fault of the same name
    assert row.corrupted == pytest.approx(100 * np.mean([own["noise", name].mean() for name in names]))
    assert row.mce == pytest.approx(100 * np.mean([(1 - own["noise", n]).sum() / (1 - none["noise", n]).sum() for n in names]))


def test_the_reference_has_all_of_its_errors(scores):
    none = per_run(scores)[lambda runs: runs.variant == "no prompt"]
    np.testing.assert_allclose(none.mce, 100)


def test_the_reference_is_of_the_same_mapping_and_dataset(scores):
    "Doubled errors of no prompt with another mapping and on another dataset halve the error ratios there, and nowhere else."
    halved = scores.assign(accuracy=np.where(scores.variant == "no prompt", 1 - (1 - scores.accuracy) * 2, scores.accuracy))
    three = pd.concat([scores, halved.assign(mapping="linear"), halved.assign(dataset="other")])
    alone, parts = per_run(scores), per_run(three).groupby(["mapping", "dataset"], sort=False)
    own = alone.variant == "better"
    for name, factor in {("label", "toy"): 1, ("linear", "toy"): 0.5, ("label", "other"): 0.5}.items():
        np.testing.assert_allclose(parts.get_group(name).mce.to_numpy()[own], factor * alone.mce[own])


def test_a_run_keeps_its_properties(scores):
    runs = per_run(scores)
    assert len(runs) == len(scores[RUN].drop_duplicates())
    assert (runs.epoch == 3).all() and set(runs.placement[runs.variant == "better"]) == {"tokens"}
    assert runs.prompt_parameters.notna().equals(runs.variant == "better")


def test_runs_without_noise_or_reference_have_gaps_not_errors(scores):
    raw = scores[(scores.kind == "clean") & (scores.variant == "no prompt")].assign(
        mapping="linear", method="raw_pixels", variant="raw pixels", backbone="none"
    )
    runs = per_run(pd.concat([scores, raw.head(1)])).set_index("variant").loc[["raw pixels"]]
    assert runs.clean.notna().all() and runs[["corrupted", "mce", "ece_corrupted"]].isna().all(axis=None)
    assert per_run(raw.head(1)).corrupted.isna().all()
    assert per_run(scores[scores.variant == "better"]).mce.isna().all()


def cells(gains, **settings):
    "Synthetic scores of two backbones with exact validation accuracies: `gains` points over 70 %, the method in place of the name."
    table = synthetic_scores(dict.fromkeys(gains, 0), backbones=2, images=100, seeds=2, **settings)
    own = table.variant.map({"no prompt": 0.0, "full fine-tuning": 2.5} | {name: gain for name, (_, gain) in gains.items()})
    methods = table.method.replace({name: method for name, (method, _) in gains.items()})
    return table.assign(val_accuracy=0.7 + own / 100 + 0.01 * table.seed, method=methods)


def test_headroom_is_over_no_prompt_to_the_better_of_dense_prompts_and_fine_tuning():
    gains = {"LoR-VP": ("lor_vp", 1.0), "VPT-deep": ("vpt", 4.0), "VPT-shallow": ("vpt", 3.5), "LoRSP": ("lorsp", 9.0)}
    table = cells(gains)
    table.loc[(table.backbone == "backbone 1") & (table.method == "vpt"), "val_accuracy"] -= 0.05
    table["accuracy"] = 0.0  # the test images play no role
    found = headroom(table).set_index("backbone")
    assert found.dense_variant.to_dict() == {"backbone 0": "VPT-deep", "backbone 1": "LoR-VP"}
    np.testing.assert_allclose(found[["no_prompt", "dense", "full_finetuning", "headroom"]], [[70.5, 74.5, 73, 4], [70.5, 71.5, 73, 2.5]])
    assert found.counts.to_dict() == {"backbone 0": True, "backbone 1": False}
    assert headroom(table, least=2.5).counts.all() and not headroom(table, least=4.1).counts.any()


def test_an_untrained_prompt_is_no_dense_one():
    table = cells({"VPT": ("vpt", 5.0), "VPT, untrained": ("vpt", 9.0)})
    table.loc[table.variant == "VPT, untrained", "prompt_parameters"] = 0
    assert set(headroom(table).dense_variant) == {"VPT"} and headroom(table).headroom.tolist() == [5, 5]


def test_headroom_is_of_each_mapping_and_dataset():
    low, high = cells({}), cells({"VPT": ("vpt", 5.0)})
    found = headroom(pd.concat([low, high.assign(mapping="linear"), high.assign(dataset="other")]))
    assert found[["mapping", "dataset", "backbone"]].drop_duplicates().shape == (6, 3)
    assert found.groupby(["mapping", "dataset"]).counts.sum().to_dict() == {
        ("label", "toy"): 0,
        ("linear", "toy"): 2,
        ("label", "other"): 2,
    }


def test_missing_methods_are_gaps_in_the_headroom():
    table = cells({"VPT": ("vpt", 5.0)})
    tuned, dense = headroom(table[table.method != "vpt"]), headroom(table[table.variant != "full fine-tuning"])
    assert tuned.dense.isna().all() and set(tuned.dense_variant) == {""} and not tuned.counts.any()
    np.testing.assert_allclose(tuned.headroom, 2.5)
    assert dense.full_finetuning.isna().all() and dense.counts.all()
    for absent in ("no prompt", ["VPT", "full fine-tuning"]):
        left = headroom(table[~table.variant.isin(np.atleast_1d(absent))])
        assert left.headroom.isna().all() and not left.counts.any()


@pytest.mark.parametrize("points", [3, 6, 12])
def test_a_gain_of_just_enough_points_counts(points):
    table = cells({"VPT": ("vpt", float(points))})
    assert headroom(table, least=points).counts.all()  # whatever 0.7 + 0.03 is in floating point


def test_the_accuracy_table_has_each_backbone_and_no_prompt_on_the_same_ones():
    runs = per_run(synthetic_scores({"better": 3, "equal": 0}, backbones=3, padded=1))
    table = accuracy_table(runs)
    own = runs[(runs.variant == "better") & (runs.backbone == "backbone 0")].clean
    assert table.loc[("tokens", "better"), "backbone 0"] == f"{own.mean():.1f} ± {own.std():.1f}"
    assert table.loc[("tokens", "better"), "backbone 2"] == "" and table.loc[("padding", "better"), "backbone 0"] == ""
    here = runs[runs.backbone.isin(["backbone 0", "backbone 1"])].groupby(["variant", "backbone"]).clean.mean().groupby("variant").mean()
    assert table.loc[("tokens", "better"), "mean"] == f"{here['better']:.1f}"
    assert table.loc[("tokens", "better"), "no prompt"] == f"{here['no prompt']:.1f}"
    assert "±" not in accuracy_table(runs[runs.seed == 0]).to_string()
    assert not accuracy_table(runs, "corrupted").equals(table)
