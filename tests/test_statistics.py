"Does the verdict find what is there, and only that, as often as it says?"
import gc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from spikeprompt.scores import synthetic_scores
from spikeprompt.statistics import answers, compare, mcnemar_counts, two_level_bootstrap, verdicts

DRAWS = 1000


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    "statsmodels collects garbage at every correction: leave it little to look through."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def planted():
    "Verdicts on a method 3 points better and one that is equal, in 1,000 sets of synthetic scores, each a family of two."
    tables = []
    for draw in range(DRAWS):
        A = answers(synthetic_scores({"better": 3, "equal": 0}, rng=draw), "clean")
        tables.append(verdicts({(v,): A[v] - A["linear_probe"] for v in ("better", "equal")}, resamples=200))
    return pd.concat(tables)


def test_three_points_are_found(planted):
    assert (planted.loc["better"].verdict == "ahead").mean() > 0.95


def test_nothing_is_found_where_nothing_is(planted):
    wrong = (planted.loc["equal"].verdict != "no difference shown").sum()
    assert binomtest(int(wrong), DRAWS, 0.05, alternative="greater").pvalue > 0.01, f"{wrong} of {DRAWS} verdicts are wrong"


def test_intervals_hold_the_truth_as_often_as_they_say(planted):
    for name, truth in ("better", 3), ("equal", 0):
        rows = planted.loc[name]
        held = ((rows.low <= truth) & (truth <= rows.high)).sum()
        assert binomtest(int(held), DRAWS, 0.95, alternative="less").pvalue > 0.01, f"{name}: {held} of {DRAWS} intervals hold {truth}"


def test_wide_spread_of_the_seeds_does_not_fool_it():
    wrong = 0
    for draw in range(100):
        A = answers(synthetic_scores({"equal": 0}, seed_spread=3, pictures=300, backbones=2, rng=draw), "clean")
        wrong += verdicts({("equal",): A["equal"] - A["linear_probe"]}, resamples=200).verdict.iloc[0] != "no difference shown"
    assert binomtest(int(wrong), 100, 0.05, alternative="greater").pvalue > 0.01, f"{wrong} of 100"


def test_what_is_detectable_is_detected_four_times_out_of_five():
    found, mdd = 0, np.median([verdicts({("v",): a["v"] - a["linear_probe"]}, resamples=200).mdd.iloc[0]
                               for a in (answers(synthetic_scores({"v": 0}, rng=draw), "clean") for draw in range(20))])
    for draw in range(100):
        A = answers(synthetic_scores({"v": mdd}, rng=1000 + draw), "clean")
        found += verdicts({("v",): A["v"] - A["linear_probe"]}, resamples=200).verdict.iloc[0] == "ahead"
    assert found >= 70  # 80 expected at least; fewer than 70 has a chance below 1 %


def test_bootstrap_spread_is_that_of_the_mean_over_seeds_and_pictures():
    rng = np.random.default_rng(0)
    of_seeds, of_pictures = rng.normal(0, 0.2, (400, 3, 1)), rng.normal(0, 1, (400, 1, 100))
    D = of_seeds + of_pictures
    spread = two_level_bootstrap(D, 2000).var(1).mean()
    assert spread == pytest.approx(0.2**2 / 3 + 1 / 100, rel=0.1)


def test_comparisons_of_a_target_are_one_family():
    tested = synthetic_scores({"better": 3, "equal": 0})
    table = compare(tested, [("better", "linear_probe"), ("equal", "linear_probe")])
    assert len(table) == 4 and (table.p_holm >= table.p).all()
    smallest = table.p.idxmin()
    assert table.p_holm[smallest] == pytest.approx(4 * table.p[smallest])


def test_each_corruption_counts_once():
    tested = synthetic_scores({}, backbones=1, seeds=1)
    by_hand = tested[tested.corruption != "clean"].groupby("corruption").accuracy.mean().mean()
    assert answers(tested, "corrupted")["linear_probe"].mean() == pytest.approx(by_hand)


def test_mcnemar_sees_one_backbone_that_loses():
    tested = synthetic_scores({"better": 0}, backbones=2, seed_spread=0)
    lost = (tested.variant == "better") & (tested.backbone == "backbone 1")
    tested.loc[lost, "correct"] = tested.loc[lost, "correct"].map(lambda bits: bits & (np.arange(len(bits)) % 8 > 0))
    counts = mcnemar_counts(tested)
    assert counts.loc["better", "backbone 0"] == "+0 -0 of 3" and counts.loc["better", "backbone 1"] == "+0 -3 of 3"
