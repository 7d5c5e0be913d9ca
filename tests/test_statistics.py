"Do the verdicts find what is there, and only that, as often as they say?"

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student

from spikeprompt.evaluation.scores import per_run, synthetic_scores
from spikeprompt.evaluation.statistics import (
    MARGIN,
    compare,
    gain_table,
    gains,
    headline,
    image_accuracy,
    mcnemar_counts,
    paired_differences,
    pairs,
    questions,
    seed_variances,
    sentence,
    tally,
    two_level_bootstrap,
    variance_components,
    verdicts,
)

SPREADS = {  # standard deviations over seeds in points: of the reference, then of each method
    "equal": [0.5] * 6,
    "noisy method": [0.3] * 5 + [1.5],
    "noisy tokens": [0.3] * 2 + [1.5] + [0.3] * 3,
    "quiet reference": [0.1, 0.3, 0.3, 0.5, 0.8, 1.5],
    "noisy reference": [1.5] + [0.3] * 5,
}


PLACES = {"tokens": (0, 1, 2), "padding": (0, 1, 2), "pixels": (0, 3, 4), "weights": (0, 5)}  # reference and methods of each placement
LAYOUTS = [(1, 1), (1, 2), (2, 2), (2, 3)]  # backbones with tokens, with padding


def accuracies(rng, spreads, backbones=5, seeds=3, images=40, image_spread=1.0, shared=0.0, uneven=0.0, gain=0.0):
    "A [methods, backbones, seeds, images] without true differences, but for `gain` points of the last method."
    methods = len(spreads)
    per_backbone = np.exp(uneven * rng.normal(size=(methods, backbones, 1))) * rng.normal(size=(methods, backbones, seeds))
    of_seeds = np.array(spreads)[:, None, None] * (per_backbone + shared * rng.normal(size=(methods, 1, seeds)))
    of_images = rng.normal(0, image_spread, (methods, 1, 1, images)) + rng.normal(0, image_spread, (methods, backbones, seeds, images))
    A = (of_seeds[..., None] + of_images) / 100
    A[-1] += gain / 100
    return A


def family(rng, spreads, **kind):
    "Every method against the first and the second: nine comparisons."
    A = accuracies(rng, spreads, **kind)
    return {(m, reference): A[m] - A[reference] for reference in (0, 1) for m in range(reference + 1, len(A))}


def bench(rng, spreads, layout, **kind):
    "Ten comparisons as `compare` makes them: of tokens, of padding, of prompts on pixels and of fine-tuning."
    A, tokens = accuracies(rng, spreads, sum(layout), **kind), layout[0]
    on = {"tokens": slice(tokens), "padding": slice(tokens, None)}
    differences = {
        (m, reference, place): (A[m] - A[reference])[on.get(place, slice(None))]
        for place, methods in PLACES.items()
        for reference, m in itertools.combinations(methods, 2)
    }
    return differences, [place for *_, place in differences]


def claims(table):
    "Whether any difference of a family is called significant."
    return table.verdict.str.startswith("significantly").any()


def count_false_claims(families, rng, **kind):
    "Families of null differences in which any is called significant."
    return sum(claims(verdicts(family(rng, **kind))) for _ in range(families))


def holds(wrong, of, rate=0.05):
    "Whether a count is compatible with an error rate."
    return binomtest(int(wrong), of, rate, alternative="greater").pvalue > 0.01


@pytest.fixture(scope="module")
def many():
    "Verdicts of families of many kinds, on null differences and true ones."
    rng = np.random.default_rng(1)
    kinds = itertools.product(SPREADS.values(), (1, 5), (0.5, 4.0), (0.0, 2.0))
    return pd.concat([verdicts(family(rng, s, backbones=b, image_spread=i, gain=g)) for s, b, i, g in kinds])


@pytest.fixture(scope="module")
def scores():
    "Scores with an attack on fewer images and a fault that is called like a corruption; the last two backbones take padding."
    table = synthetic_scores({"better": 3, "equal": 0}, images=400, padded=2)
    clean = table[table.kind == "clean"]
    attack = clean.assign(kind="attack", corruption="pgd", severity=0.01, correct=clean.correct.map(lambda bits: bits[:100]))
    fault = clean.assign(kind="fault", corruption="gaussian", severity=0.5, correct=clean.correct.map(lambda bits: ~bits))
    return pd.concat([table, attack, fault], ignore_index=True)


def test_interval_p_and_verdict_agree(many):
    excludes = (many.low > 0) | (many.high < 0)
    significant = many.verdict.isin(["significantly better", "significantly worse"])
    assert significant.any() and not significant.all()
    assert (significant == excludes).all() and (significant == (many.p < 0.05)).all()
    assert (many.difference[many.verdict == "significantly better"] > 0).all()
    assert (many.difference[many.verdict == "significantly worse"] < 0).all()


def test_equivalent_is_an_interval_within_the_margin(many):
    within = (many.low > -MARGIN) & (many.high < MARGIN)
    includes = (many.low <= 0) & (many.high >= 0)
    assert within.any() and (many.equivalent == within).all()
    assert ((many.verdict == "equivalent") == (within & includes)).all()
    assert ((many.verdict == "not significant") == (~within & includes)).all()


def test_mdd_is_at_the_level_of_the_interval(many):
    half = (many.high - many.low) / 2
    assert (many.mdd > half).all()  # what is found four times out of five is beyond what is found half of the time
    assert (many.mdd[many.verdict == "not significant"] > many.difference.abs()[many.verdict == "not significant"]).all()


def test_a_small_difference_can_be_significant_and_within_the_margin():
    D = family(np.random.default_rng(0), [0.05, 0.05], image_spread=0.2, gain=0.6)
    row = verdicts(D).iloc[0]
    assert row.verdict == "significantly better" and row.equivalent
    assert not verdicts(D, margin=0.5).equivalent.any()


def test_one_comparison_is_welch_satterthwaite_at_95_percent():
    D = np.random.default_rng(0).normal(0.02, 0.3, (1, 3, 200))
    seeds, together, images = variance_components(D)
    used = max(seeds, together)
    nu = (used + images) ** 2 / (used**2 / 2 + images**2 / 199)
    row = verdicts({"a": D}).iloc[0]
    assert (row.high - row.low) / 2 == pytest.approx(100 * student.ppf(0.975, nu) * np.sqrt(used + images))
    assert row.p == pytest.approx(2 * student.sf(abs(D.mean()) / np.sqrt(used + images), nu))


def test_a_larger_family_has_wider_intervals():
    D = np.random.default_rng(0).normal(0, 0.3, (5, 3, 100))
    widths = [verdicts({k: D for k in range(count)}).pipe(lambda t: t.high - t.low).iloc[0] for count in (1, 5, 50)]
    assert widths[0] < widths[1] < widths[2]


def test_variance_components_are_those_of_the_mean():
    rng = np.random.default_rng(0)
    found, means = [], []
    for _ in range(1000):
        D = rng.normal(0, 0.2, (4, 3, 1)) + rng.normal(0, 1, (1, 1, 60)) + rng.normal(0, 1, (4, 3, 60))
        found.append(variance_components(D))
        means.append(D.mean())
    independent, together, images = np.mean(found, 0)
    assert independent + images == pytest.approx(np.var(means), rel=0.1)
    assert together == pytest.approx(independent, rel=0.1)
    assert images == pytest.approx(1 / 60, rel=0.05)


def test_three_seeds_that_agree_by_chance_prove_nothing():
    "A comparison whose seeds give 4.17, 4.07 and 4.33, among others whose seeds spread as usual."
    rng = np.random.default_rng(0)
    D = {k: np.full((1, 3, 1000), 0.0) + rng.normal(0, 0.01, (1, 3, 1)) for k in range(5)}
    D["lucky"] = np.array([0.0417, 0.0407, 0.0433])[None, :, None] + np.zeros((1, 3, 1000))
    D = {name: d + rng.normal(0, 0.05, (1, 1, 1000)) for name, d in D.items()}
    alone, among = verdicts({"lucky": D["lucky"]}).loc["lucky"], verdicts(D).loc["lucky"]
    assert among.p > 1e-3 > alone.p
    assert among.high - among.low > 3 * (alone.high - alone.low)


def test_a_noisy_method_keeps_its_own_variance():
    components = np.array([[1.0, 0, 0], [1.0, 0, 0], [16.0, 0, 0]])
    assert seed_variances(components, ["clean"] * 3).tolist() == [6, 6, 16]
    assert seed_variances(components, ["clean", "clean", "corrupted"]).tolist() == [1, 1, 16]
    assert seed_variances(np.array([[1.0, 4.0, 0], [1.0, 8.0, 0]]), [0, 0]).tolist() == [6, 6]  # luck that backbones share


@pytest.mark.parametrize("spreads", SPREADS)
def test_false_claims_at_three_seeds(spreads):
    wrong = count_false_claims(300, np.random.default_rng(0), spreads=SPREADS[spreads], backbones=2)
    assert holds(wrong, 300), f"{wrong} of 300 families"


@pytest.mark.slow
@pytest.mark.parametrize("spreads", SPREADS)
@pytest.mark.parametrize("backbones", [1, 2, 5])
@pytest.mark.parametrize("image_spread", [0.0, 1.0])
@pytest.mark.parametrize("shared, uneven", [(0, 0), (0.5, 0), (0, 1), (0.5, 1)])
def test_false_claims_at_three_seeds_whatever_the_variances(spreads, backbones, image_spread, shared, uneven):
    kind = {"spreads": SPREADS[spreads], "backbones": backbones, "image_spread": image_spread, "shared": shared, "uneven": uneven}
    wrong = count_false_claims(80, np.random.default_rng(2), **kind)
    assert holds(wrong, 80), f"{wrong} of 80 families"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_false_claims_by_placement(layout):
    "With the seeds' variance pooled within a placement, on two to five backbones."
    rng = np.random.default_rng(0)
    wrong = sum(claims(verdicts(*bench(rng, SPREADS["equal"], layout))) for _ in range(200))
    assert holds(wrong, 200), f"{wrong} of 200 families"


@pytest.mark.slow
@pytest.mark.parametrize("spreads", SPREADS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared, uneven", [(0, 0), (0.5, 1)])
def test_false_claims_by_placement_whatever_the_variances(spreads, layout, shared, uneven):
    rng = np.random.default_rng(2)
    wrong = sum(claims(verdicts(*bench(rng, SPREADS[spreads], layout, shared=shared, uneven=uneven))) for _ in range(80))
    assert holds(wrong, 80), f"{wrong} of 80 families"


@pytest.mark.slow
@pytest.mark.parametrize("control", [1.5, 3.0])
def test_false_claims_on_backbones_chosen_by_headroom(control):
    "Full fine-tuning gains about as much as counts, so that chance decides which backbones enter; the other methods gain nothing."
    wrong = compared = 0
    for draw in range(25):
        made = synthetic_scores({"VPT": 0, "spiking": 0}, images=200, seed_spread=1.0, padded=3, control=control, rng=draw)
        made["method"] = made.method.replace("VPT", "vpt")
        table = compare(made, [("VPT", "no prompt"), ("spiking", "no prompt"), ("spiking", "VPT")])
        wrong, compared = wrong + claims(table), compared + table.backbones.between(1, 2).any()
    assert compared > 12 and holds(wrong, 25), f"{wrong} of 25 families"


@pytest.fixture(scope="module")
def gained():
    scores = synthetic_scores({"dense": 5, "spiking": 5, "control": 0}, images=400, padded=2).assign(prompt_parameters=1234)
    compared = compare(scores, [("spiking", "dense"), ("control", "spiking"), ("dense", "no prompt")])
    return compared, per_run(scores), gains(compared, "spiking", "dense")


def test_a_gain_is_the_comparison_and_a_gain_over_a_control_the_comparison_turned_round(gained):
    compared, _, found = gained
    keys = ["placement", "images"]
    over_dense, over_control = (found[found.reference == name].set_index(keys) for name in ("dense", "control"))
    beside_dense = compared[compared.reference == "dense"].set_index(keys)
    of_control = compared[compared.reference == "spiking"].set_index(keys)
    assert len(found) == 8 == len(compared) - 4 and set(found.variant) == {"spiking"} and (over_control.low <= over_control.high).all()
    assert over_dense.difference.to_dict() == beside_dense.difference.to_dict()
    assert (
        over_control.difference.to_dict() == (-of_control.difference).to_dict()
        and over_control.low.to_dict() == (-of_control.high).to_dict()
    )
    assert over_dense.helps.all() and not over_control.helps.any()  # the dense one was compared with no prompt, and the others were not
    assert set(of_control.verdict) == {"significantly worse"} and set(over_control.verdict) == {"significantly better"}


def test_the_table_of_gains_gives_clean_then_corrupted_and_marks_what_is_significant(gained):
    compared, _, found = gained
    table = gain_table(found)
    assert list(table.index) == [(f"spiking as {kind}", other) for kind in ("padding", "tokens") for other in ("dense", "control")]
    points = found[(found.name == "spiking as tokens") & (found.reference == "control")].set_index("images").difference
    assert table.loc[("spiking as tokens", "control"), ("label", "toy")] == f"(**{points.clean:+.1f}**), (**{points.corrupted:+.1f}**)"
    marked = found.assign(helps=True, verdict=["equivalent", "not significant"] * 4, difference=[0.04, -2.26] * 4)
    assert set(gain_table(marked).stack(["mapping", "dataset"])) == {"+0.0 =, -2.3"}
    none = found.assign(helps=[False, True] * 4, verdict=["no headroom", "significantly worse"] * 4, difference=[np.nan, -2.26] * 4)
    assert set(gain_table(none).stack(["mapping", "dataset"])) == {"n/a, **-2.3**"}


def test_a_headline_counts_the_verdicts_of_each_placement(gained):
    compared, runs, found = gained
    padding, tokens = headline(found, runs, "dense")
    rows = compared[(compared.placement == "tokens") & (compared.reference == "dense")]
    count = rows.verdict.value_counts()
    assert tokens == (
        f"**spiking as tokens** against dense (1,234 prompt parameters, 1,234): of 2 comparisons {count.get('significantly better', 0)} "
        f"significantly better, {count.get('significantly worse', 0)} significantly worse, {count.get('equivalent', 0)} equivalent, "
        f"{count.get('not significant', 0)} not significant; the MDD is {rows.mdd.min():.1f} to {rows.mdd.max():.1f} points; "
        "in 0 neither is significantly better than no prompt."
    )
    assert padding.startswith("**spiking as padding** against dense") and headline(found, runs, "nothing") == []
    none = headline(found.assign(verdict="no headroom"), runs, "dense")[0]
    assert ": of 0 comparisons 0 significantly better, 0 significantly worse, 0 equivalent, 0 not significant; in 0 neither" in none


@pytest.mark.parametrize("gain, found, at_least", [(0.0, "equivalent", 45), (2.0, "significantly better", 95)])
def test_power_on_five_backbones(gain, found, at_least):
    "Seeds that spread by half a point: nine comparisons still find two points, and often that there is no difference of one."
    rng = np.random.default_rng(0)
    rows = [verdicts(family(rng, SPREADS["equal"], image_spread=0.7, gain=gain)).loc[(5, 0)] for _ in range(100)]
    assert sum(row.verdict == found for row in rows) >= at_least


def test_what_is_detectable_is_detected_four_times_out_of_five():
    rng = np.random.default_rng(0)
    kind = {"spreads": SPREADS["equal"], "image_spread": 4.0}
    mdd = np.median([verdicts(family(rng, **kind)).mdd.iloc[0] for _ in range(50)])
    found = sum(verdicts(family(rng, gain=mdd, **kind)).loc[(5, 0)].verdict == "significantly better" for _ in range(200))
    assert 140 <= found <= 185  # 160 expected


def test_a_difference_as_large_as_the_margin_is_not_equivalent():
    rng = np.random.default_rng(0)
    wrong = sum(verdicts(family(rng, SPREADS["equal"], gain=MARGIN)).equivalent[5, 0] for _ in range(300))
    assert holds(wrong, 300), f"{wrong} of 300"


def test_intervals_hold_the_truth_on_scores_of_zeros_and_ones():
    held = []
    for draw in range(100):
        made = synthetic_scores({"better": 3, "equal": 0}, backbones=3, images=400, rng=draw)
        A = image_accuracy(made[made.kind == "clean"], "clean")
        table = verdicts({v: paired_differences(A, v, "no prompt") for v in ("better", "equal")})
        truth = pd.Series({"better": 3.0, "equal": 0.0})
        held.append(((table.low <= truth) & (truth <= table.high)).all())
    assert holds(100 - sum(held), 100)


def test_no_verdict_from_one_seed(scores):
    table = compare(scores[scores.seed == 0], [("better", "no prompt")])
    assert set(table.verdict) == {"no verdict (one seed)"}
    assert table[["low", "high", "mdd", "p"]].isna().all(axis=None) and not table.equivalent.any()
    assert "one seed allows no verdict" in sentence(table)


def test_methods_that_answer_alike_are_equivalent():
    row = verdicts({"a": np.zeros((2, 3, 50))}).iloc[0]
    assert row.verdict == "equivalent" and row.p == 1 and row.high == pytest.approx(0)


def test_each_corruption_counts_once(scores):
    by_hand = scores[scores.kind == "noise"].groupby(["variant", "corruption"]).accuracy.mean().groupby("variant").mean()
    found = image_accuracy(scores, "corrupted").mean(axis=1).groupby(level=0).mean()
    pd.testing.assert_series_equal(found, by_hand, check_names=False)


def test_images_are_named_by_condition(scores):
    clean, fault = image_accuracy(scores, "clean"), image_accuracy(scores, "fault: gaussian")
    assert (fault == 1 - clean).all(axis=None)
    assert image_accuracy(scores, "pgd").shape[1] == 100
    with pytest.raises(ValueError, match="images 'fog': allowed are corrupted, clean, gaussian, shot_noise, pgd, fault: gaussian"):
        image_accuracy(scores, "fog")


def test_differences_are_paired_whatever_the_order_of_the_rows(scores):
    one = paired_differences(image_accuracy(scores, "clean"), "better", "no prompt")
    other = paired_differences(image_accuracy(scores.sample(frac=1, random_state=0), "clean"), "better", "no prompt")
    assert one.shape == (5, 3, 400) and (one == other).all()


def test_runs_that_cannot_be_paired_are_refused(scores):
    clean = scores[scores.kind == "clean"]
    gone = (clean.variant == "equal") & (clean.backbone == "backbone 1") & (clean.seed == 2)
    A = image_accuracy(clean[~gone], "clean")
    for pair in ("equal", "better"), ("better", "equal"):
        with pytest.raises(ValueError, match="not run on the same backbones with the same seeds"):
            paired_differences(A, *pair)
    with pytest.raises(ValueError, match="variant 'worse' has no scores; there are better, equal, full fine-tuning, no prompt"):
        paired_differences(A, "worse", "better")


def test_comparisons_with_one_mapping_on_one_dataset_are_one_family(scores):
    wanted = [("better", "no prompt"), ("equal", "no prompt")]
    three = pd.concat([scores, scores.assign(dataset="other"), scores.assign(mapping="linear")])
    table, alone = compare(three, wanted, ("clean", "pgd")), compare(scores, wanted, ("clean",))
    assert list(table.columns[:8]) == ["mapping", "dataset", "variant", "placement", "reference", "images", "question", "backbones"]
    assert len(table) == 24
    parts = [part.drop(columns=["mapping", "dataset"]).reset_index(drop=True) for _, part in table.groupby(["mapping", "dataset"])]
    assert len(parts) == 3
    for part in parts[1:]:
        pd.testing.assert_frame_equal(part, parts[0])
    assert (parts[0][parts[0].images == "clean"].high.to_numpy() > alone.high.to_numpy()).all()


def test_tokens_and_padding_are_compared_apart(scores):
    table = compare(scores, [("better", "equal"), ("better", "no prompt")], ("clean",))
    assert table.placement.tolist() == ["tokens", "padding"] * 2 and table.backbones.tolist() == [3, 2] * 2
    clean = 100 * scores[scores.kind == "clean"].groupby(["backbone", "variant"]).accuracy.mean().unstack()
    by_hand = clean.better - clean["equal"], clean.better - clean["no prompt"]
    expected = [gains[list(part)].mean() for gains in by_hand for part in (clean.index[:3], clean.index[3:])]
    np.testing.assert_allclose(table.difference, expected)


def test_seed_variance_is_pooled_within_a_placement(scores):
    "Seeds that differ widely with padding do not widen the intervals of tokens."
    clean = scores[scores.kind == "clean"]
    worst = (clean.placement == "padding") & (clean.seed == 0)
    noisy = clean.assign(correct=[bits & (np.arange(400) % 4 > 0) if hit else bits for bits, hit in zip(clean.correct, worst)])
    width = lambda made: compare(made, [("better", "no prompt")], ("clean",)).set_index("placement").pipe(lambda t: t.high - t.low)
    before, after = width(clean), width(noisy)
    assert after.tokens == pytest.approx(before.tokens) and after.padding > 2 * before.padding


def without_headroom(scores, backbones):
    "Scores in which full fine-tuning gains nothing on some backbones."
    none = scores[scores.variant == "no prompt"].assign(method="full_finetuning", variant="full fine-tuning", placement="weights")
    kept = ~((scores.variant == "full fine-tuning") & scores.backbone.isin(backbones))
    return pd.concat([scores[kept], none[none.backbone.isin(backbones)]])


def test_backbones_without_headroom_do_not_enter(scores):
    left = without_headroom(scores, ["backbone 1"])
    table = compare(left, [("better", "no prompt")], ("clean",))
    assert table.backbones.tolist() == [2, 2]
    pd.testing.assert_frame_equal(table, compare(left[left.backbone != "backbone 1"], [("better", "no prompt")], ("clean",)))


def test_no_verdict_where_no_backbone_has_headroom(scores):
    left, wanted = without_headroom(scores, ["backbone 3", "backbone 4"]), [("better", "no prompt"), ("equal", "no prompt")]
    table = compare(left, wanted, ("clean",)).set_index(["variant", "placement"])
    assert table.verdict.eq("no headroom").tolist() == [False, True] * 2 and table.backbones.tolist() == [3, 0] * 2
    padding = table.xs("padding", level="placement")
    assert padding[["difference", "low", "high", "mdd", "p"]].isna().all(axis=None) and not padding.equivalent.any()
    assert table.equivalent.dtype == bool
    alone = compare(scores[scores.placement != "padding"].query("backbone < 'backbone 3'"), wanted, ("clean",))
    np.testing.assert_allclose(table.xs("tokens", level="placement").high, alone.high)  # the family has two comparisons, not four
    nowhere = compare(left[left.variant != "full fine-tuning"], wanted).set_index("images")
    assert set(nowhere.verdict["clean"]) == {"no headroom"} and len(nowhere) == 8 and set(nowhere.backbones["clean"]) == {0}
    assert "no headroom" not in set(nowhere.verdict["corrupted"]) and set(nowhere.backbones["corrupted"]) == {3, 2}


def test_questions_are_a_family_of_their_own(scores):
    wanted = [("better", "no prompt"), ("equal", "no prompt"), ("better", "equal")]
    apart, alone = compare(scores, wanted, questions=wanted[:1]), compare(scores, wanted[:1])
    assert apart.question.tolist() == [pair == wanted[0] for pair in zip(apart.variant, apart.reference)]
    pd.testing.assert_frame_equal(apart[apart.question].reset_index(drop=True), alone.assign(question=True))
    rest = compare(scores, wanted[1:])
    pd.testing.assert_frame_equal(apart[~apart.question].reset_index(drop=True), rest)


def test_questions_are_of_the_first_variants_and_their_controls():
    methods = {"no_prompt": ["no prompt"], "vpt": ["VPT", "wide"], "spike_nvpt": ["S", "bits"], "straight": ["ST"], "fine": ["F"]}
    references = {"vpt": "no_prompt", "spike_nvpt": "vpt", "straight": "spike_nvpt", "fine": "no_prompt"}
    assert questions(methods, references) == [("S", "VPT"), ("bits", "S"), ("ST", "S")]
    assert set(questions(methods, references)) <= set(pairs(methods, references))


def test_nothing_to_compare_is_an_empty_table(scores):
    table = compare(scores, [])
    assert table.empty and {"mapping", "placement", "backbones", "verdict", "equivalent"} <= set(table.columns)


def test_a_variant_without_scores_is_named_even_without_headroom(scores):
    for left in scores, scores[scores.variant != "full fine-tuning"]:
        with pytest.raises(ValueError, match="variant 'worse' has no scores; there are better, equal"):
            compare(left, [("better", "worse")])


def test_pairs_are_with_no_prompt_the_reference_methods_and_the_methods_first_variant():
    methods = {"no_prompt": {"no prompt": {}, "with noise": {}}, "vpt": {"VPT": {}, "VPT-shallow": {}}, "spike_nvpt": {"Spike-NVPT": {}}}
    expected = [("VPT", none) for none in ("no prompt", "with noise")]
    expected += [("VPT-shallow", reference) for reference in ("no prompt", "with noise", "VPT")]
    expected += [("Spike-NVPT", reference) for reference in ("no prompt", "with noise", "VPT", "VPT-shallow")]
    assert pairs(methods, {"no_prompt": "no_prompt", "vpt": "no_prompt", "spike_nvpt": "vpt"}) == expected
    assert pairs({"spike_nvpt": {"Spike-NVPT": {}}}, {"spike_nvpt": "vpt"}) == []


def test_a_method_may_have_several_references():
    methods = {"no_prompt": ["no prompt"], "lor_vp": ["LoR-VP"], "smm": ["SMM"], "lorsp": ["K2", "K4"]}
    several = pairs(methods, {"lorsp": ("lor_vp", "smm")})
    assert several[:2] == [("LoR-VP", "no prompt"), ("SMM", "no prompt")]
    assert several[2:5] == [("K2", reference) for reference in ("no prompt", "LoR-VP", "SMM")]
    assert several[5:] == [("K4", reference) for reference in ("no prompt", "LoR-VP", "SMM", "K2")]


@pytest.fixture
def rows():
    "A table with each verdict."
    names = ["mapping", "dataset", "variant", "placement", "reference", "images", "backbones"]
    names += ["difference", "low", "high", "mdd", "p", "verdict", "equivalent"]
    start = ["label", "toy", "A", "pixels", "no prompt"]
    return pd.DataFrame(
        [
            [*start, "clean", 5, 2.6, 1.0, 4.2, 1.9, 0.01, "significantly better", False],
            [*start, "clean", 5, -0.4, -0.7, -0.1, 0.4, 0.02, "significantly worse", True],
            [*start, "clean", 1, -0.01, -0.5, 0.5, 0.6, 1.0, "equivalent", True],
            [*start, "shot_noise", 5, 0.8, -1.0, 2.6, 2.2, 0.6, "not significant", False],
            [*start, "clean", 0, *[np.nan] * 5, "no headroom", False],
        ],
        columns=names,
    )


def test_one_claim_a_sentence(rows):
    assert sentence(rows).replace(". ", ".\n").splitlines() == [
        "With label mapping, A is significantly better than no prompt on clean images: "
        "+2.6 points (5 backbones; 95 % simultaneous interval +1.0 to +4.2; MDD 1.9).",
        "With label mapping, A is significantly worse than no prompt on clean images: "
        "-0.4 points (5 backbones; 95 % simultaneous interval -0.7 to -0.1; MDD 0.4).",
        "This difference lies within the equivalence margin.",
        "With label mapping, A and no prompt are equivalent on clean images: "
        "+0.0 points (1 backbone; 95 % simultaneous interval -0.5 to +0.5; MDD 0.6).",
        "With label mapping, the difference between A and no prompt under shot noise is not significant: "
        "+0.8 points (5 backbones; 95 % simultaneous interval -1.0 to +2.6; MDD 2.2).",
        "With label mapping, A is not compared with no prompt on clean images: none of its backbones has headroom.",
    ]


def test_sentences_name_the_mapping_and_the_placement_where_there_are_several(rows):
    other = rows.assign(mapping="linear", placement=["tokens", "padding", "tokens", "padding", "padding"])
    text = sentence(pd.concat([rows, other]))
    assert "With a linear head, A as tokens is significantly better than no prompt on clean images" in text
    assert "With a linear head, the difference between A as padding and no prompt under shot noise" in text
    assert "With label mapping, A is significantly better" in text and "as pixels" not in text


def test_tally_names_every_variant_once_for_each_kind_of_images(rows):
    clean = rows.assign(variant=list("ABCDE"), images="clean")
    assert tally(clean, "no prompt").replace(". ", ".\n").splitlines() == [
        "With label mapping, A is significantly better than no prompt on clean images.",
        "With label mapping, B is significantly worse than no prompt on clean images.",
        "With label mapping, C is equivalent to no prompt on clean images.",
        "With label mapping, the difference to no prompt on clean images is not significant for D.",
        "With label mapping, E is not compared with no prompt on clean images: no headroom.",
    ]
    both = tally(clean.assign(verdict="significantly better"), "no prompt")
    assert "A, B, C, D and E are significantly better than" in both and "no variant is significantly worse" in both
    placed = tally(clean.assign(variant="A", placement=list("abcde")), "no prompt")
    assert "A as a is significantly better" in placed and "not significant for A as d." in placed


def test_tally_claims_nothing_where_nothing_is_compared(rows):
    none = rows[rows.verdict == "no headroom"]
    assert tally(none, "no prompt") == "With label mapping, A is not compared with no prompt on clean images: no headroom."


def test_mcnemar_sees_one_backbone_that_loses():
    made = synthetic_scores({"better": 0}, backbones=2, seed_spread=0)
    lost = (made.variant == "better") & (made.backbone == "backbone 1")
    made.loc[lost, "correct"] = made.loc[lost, "correct"].map(lambda bits: bits & (np.arange(len(bits)) % 8 > 0))
    raw = made[made.kind == "clean"].head(1).assign(variant="raw pixels", backbone="none")  # has nothing to be paired with
    counts = mcnemar_counts(pd.concat([made, raw]))
    assert counts.loc["better", "backbone 0"] == "+0 -0 of 3" and counts.loc["better", "backbone 1"] == "+0 -3 of 3"
    assert list(counts.index) == ["better", "full fine-tuning"]


def test_bootstrap_spread_is_that_of_the_mean_over_seeds_and_images():
    rng = np.random.default_rng(0)
    D = rng.normal(0, 0.2, (400, 3, 1)) + rng.normal(0, 1, (400, 1, 100))
    assert two_level_bootstrap(D, 2000).var(1).mean() == pytest.approx(0.2**2 / 3 + 1 / 100, rel=0.1)
