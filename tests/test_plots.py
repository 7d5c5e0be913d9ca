"Figures: the same bytes again, an alt text each, and marks that mean what the table says."

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from spikeprompt.evaluation.scores import headroom, per_run, synthetic_scores
from spikeprompt.evaluation.statistics import compare
from spikeprompt.plots.prompts import draw_prompt, gallery
from spikeprompt.plots.results import (
    accuracy_map,
    convergence,
    density_gains,
    difference_map,
    headroom_plot,
    of_placement,
    pareto,
    readable,
    robustness_curves,
    severity_curves,
    tradeoff,
    variant_styles,
)
from spikeprompt.plots.style import alt_text, save_figure, style
from spikeprompt.prompts.base import Prompt, method_class, packaged_methods
from spikeprompt.prompts.pictures import picture_values, prompt_picture
from spikeprompt.prompts.tokens import TokenPrompt

SIZES = {"no prompt": 0, "better": 400, "equal": 800, "worse": 8000, "full fine-tuning": 50_000}


@pytest.fixture(scope="module")
def scores():
    "Two backbones, tokens of one size and padding of another, with noise of two kinds and an attack on fewer images."
    style()
    table = synthetic_scores({"better": 3, "equal": 0, "worse": -4}, backbones=2, images=200, padded=1)
    attacked = table[table.corruption == "clean"].assign(kind="attack", corruption="pgd", severity=0.01)
    table = pd.concat([table, attacked], ignore_index=True)
    doubled = 1 + (table.backbone == table.backbone.unique()[1])
    return table.assign(
        prompt_parameters=table.variant.map(SIZES) * doubled,
        pixel_density=table.variant.map({"better": 0.3, "equal": 0.4}),
        bit_density=table.variant.map({"worse": 0.2}),
    )


@pytest.fixture(scope="module")
def compared(scores):
    return compare(scores, [(variant, "no prompt") for variant in ("better", "equal", "worse")], ("clean", "gaussian"))


@pytest.fixture(scope="module")
def history():
    "Training losses that fall by a half over the last fifth with no prompt, by a fifth with a prompt."
    epochs = np.arange(1, 11)
    runs = [
        pd.DataFrame({"epoch": epochs, "loss": np.where(epochs == 10, end, 1.0) + 0.1 * (seed - 1), "train_accuracy": 0.5}).assign(
            mapping=mapping, dataset="toy", backbone=backbone, method=variant, variant=variant, seed=seed
        )
        for mapping in ("label", "linear")
        for backbone in ("A", "B", "C")
        for variant, end in {"no prompt": 0.5, "VPT": 0.8}.items()
        for seed in range(3)
    ]
    return pd.concat(runs)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


FIGURES = {
    "robustness": lambda scores, compared: robustness_curves(scores),
    "severity": lambda scores, compared: severity_curves(of_placement(scores, "tokens"), columns=2),
    "headroom": lambda scores, compared: headroom_plot(headroom(scores)),
    "tradeoff": lambda scores, compared: tradeoff(scores),
    "pareto": lambda scores, compared: pareto(scores),
    "density": lambda scores, compared: density_gains(scores),
    "differences": lambda scores, compared: difference_map(compared),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_scores_give_the_same_bytes_and_an_alt_text(name, scores, compared, tmp_path):
    for stem in "first", "second":
        figure = FIGURES[name](scores, compared)
        said = save_figure(figure, tmp_path / stem)
        assert all(text.get_fontsize() >= 6 for text in figure.findobj(Text) if text.get_text())
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert said == alt_text(tmp_path / "first.svg") and len(said) > 30


def test_an_alt_text_is_kept_to_the_letter_and_is_required(tmp_path):
    figure = plt.figure()
    assert save_figure(figure, tmp_path / "folder/a.b", 'x < "y" & z') == alt_text(tmp_path / "folder/a.b.svg") == 'x < "y" & z'
    with pytest.raises(ValueError, match="needs an alt text"):
        save_figure(figure, tmp_path / "none")
    assert not (tmp_path / "none.svg").exists()
    (tmp_path / "old.svg").write_text("<svg></svg>")
    with pytest.raises(ValueError, match="old.svg: no alt text"):
        alt_text(tmp_path / "old.svg")


def test_variants_are_told_apart_without_colour_and_the_references_are_grey():
    styles = variant_styles([*"abcdefghijkl", "full fine-tuning", "no prompt", "raw pixels", "a"])
    assert len(styles) == 15 and len({look["marker"] for look in styles.values()}) == 15
    assert list(styles)[:3] == ["no prompt", "full fine-tuning", "raw pixels"]
    assert all(float(look["color"]) for look in list(styles.values())[:3])
    assert "raw pixels" not in variant_styles(["a"])


def test_readable_names():
    assert [readable(name) for name in ("label", "linear", "fashion_mnist", "shot_noise", "fault: quantise")] == [
        "label mapping",
        "linear head",
        "Fashion-MNIST",
        "shot noise",
        "quantised prompt",
    ]


def points(ax):
    "Marked points of a panel as {x: y}."
    return {x: y for line in ax.lines if line.get_marker() not in ("None", "", None) for x, y in zip(line.get_xdata(), line.get_ydata())}


def test_pareto_shows_each_backbone_at_its_own_size(scores):
    axes = np.array(pareto(scores).axes).reshape(2, 2)
    for number, ax in enumerate(axes[0]):
        assert set(points(ax)) == {size * (1 + number) for size in SIZES.values()}
        part = scores[(scores.backbone == scores.backbone.unique()[number]) & (scores.variant == "worse") & (scores.corruption == "clean")]
        clean = part[part.kind == "clean"].accuracy.mean()
        assert points(ax)[8000 * (1 + number)] == pytest.approx(100 * clean)
        low, high = ax.get_xlim()
        assert all(low < size < high for size in points(ax))


def test_densities_of_pixels_and_of_bits_are_not_mixed(scores):
    axes = np.array(density_gains(scores).axes).reshape(2, 2)
    assert set(points(axes[0, 0])) == {0.3, 0.4} and set(points(axes[1, 0])) == {0.2}
    without = density_gains(scores.assign(bit_density=np.nan))
    assert len(without.axes) == 2


def test_each_condition_has_a_row_that_starts_at_the_clean_accuracy(scores):
    axes = np.array(robustness_curves(scores).axes).reshape(-1, 2)
    assert [row[0].get_ylabel().split("\n")[0] for row in axes] == ["Gaussian noise", "shot noise", "PGD"]
    assert [row[0].get_xlabel() for row in axes] == ["σ", "severity", "ε"]
    clean = scores[(scores.kind == "clean") & (scores.backbone == scores.backbone.unique()[0])].groupby("variant").accuracy.mean()
    for ax in axes[:, 0]:
        curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
        assert {round(line.get_ydata()[0], 6) for line in curves} == {round(100 * value, 6) for value in clean}


def test_faults_keep_their_order_from_mild_to_strong(scores):
    stored = scores[(scores.kind == "clean") & (scores.variant != "no prompt")]
    faults = [stored.assign(kind="fault", corruption="quantise", severity=float(level)) for level in (8, 4, 2)]
    ax = robustness_curves(pd.concat([scores[scores.kind == "clean"], *faults])).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "8", "4", "2"] and ax.get_xlabel() == "bits"
    assert ax.get_ylabel().startswith("quantised prompt")


def test_clean_scores_alone_have_one_row_and_no_curves(scores):
    clean = scores[scores.kind == "clean"]
    assert len(pareto(clean).axes) == 2
    with pytest.raises(ValueError, match="no condition besides clean"):
        robustness_curves(clean)


def test_raw_pixels_need_no_backbone_of_their_own(scores):
    none = scores[(scores.variant == "no prompt") & (scores.backbone == scores.backbone.unique()[0])]
    raw = none.assign(variant="raw pixels", method="raw_pixels", backbone="none", prompt_parameters=0)
    both = pd.concat([scores, raw])
    assert len(robustness_curves(both).axes) == len(robustness_curves(scores).axes)
    assert len(pareto(both).axes) == len(pareto(scores).axes) and "raw pixels" in pareto(both).get_label()


def test_marks_of_the_difference_map_are_the_verdicts(compared):
    part = compared[compared.placement == "tokens"]
    verdicts = ["significantly better", "equivalent", "significantly worse", "not significant", "not significant", "significantly worse"]
    marked = part.assign(verdict=verdicts, equivalent=[False, True, False, False, False, True], difference=[1.0, 2, 3, 4, 5, 6])
    cells = difference_map(marked).axes[0].texts
    found = {(*cell.get_text().split(), cell.get_fontweight()) for cell in cells}
    assert found == {
        ("+1.0", "•", "bold"),
        ("+2.0", "≈", "normal"),
        ("+3.0", "•", "bold"),
        ("+4.0", "normal"),
        ("+5.0", "normal"),
        ("+6.0", "•", "≈", "bold"),
    }
    with pytest.raises(ValueError, match="allowed are no prompt"):
        difference_map(compared, "VPT-deep")


def test_a_cell_without_headroom_has_no_number(compared):
    none = compared.variant.eq("better") & compared.placement.eq("tokens")
    marked = compared.assign(verdict=np.where(none, "no headroom", "not significant"), difference=compared.difference.mask(none))
    last = (compared.variant == "worse") & (compared.placement == "padding") & (compared.images == "gaussian")
    marked.loc[last, ["verdict", "difference"]] = "significantly worse", -7.0
    figure = difference_map(marked.assign(equivalent=False))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()][:2] == ["better as tokens", "better as padding"]
    texts = figure.axes[0].texts
    assert len(texts) == 10 and [cell.get_text() for cell in texts if cell.get_fontweight() == "bold"] == ["-7.0 •"]
    assert "2 no headroom" in figure.get_label()
    nothing = difference_map(marked.assign(equivalent=False, difference=np.nan, verdict="no headroom"))
    assert not nothing.axes[0].texts and "12 no headroom" in nothing.get_label()


def test_headroom_is_shown_cell_by_cell_and_pale_without_it():
    cells = pd.DataFrame(
        [
            ["label", "toy", "A", 20.0, 60.0, "VPT", 70.0, 50.0, True],
            ["label", "toy", "B", 30.0, np.nan, "", 31.0, 1.0, False],
            ["linear", "toy", "A", 40.0, 44.0, "VPT", np.nan, 4.0, True],
        ],
        columns=["mapping", "dataset", "backbone", "no_prompt", "dense", "dense_variant", "full_finetuning", "headroom", "counts"],
    )
    figure = headroom_plot(cells)
    assert [ax.get_title() for ax in figure.axes] == ["label mapping, toy", "linear head, toy"]
    marked = lambda ax, y: [line for line in ax.lines if line.get_marker() != "None" and list(line.get_ydata()) == [y]]
    shown = {y: [line.get_xdata()[0] for line in marked(figure.axes[0], y)] for y in (0, 1)}
    np.testing.assert_array_equal([shown[0], shown[1]], [[20, 60, 70], [30, np.nan, 31]])
    assert {line.get_alpha() for line in marked(figure.axes[0], 0)} == {1.0} != {line.get_alpha() for line in marked(figure.axes[0], 1)}
    assert "2 of 3 cells have headroom; pale, without it: B (label mapping, toy)." in figure.get_label()
    alone = headroom_plot(cells.head(1).assign(dense=np.nan))
    assert "best dense prompt" not in alone.get_label() and alone.get_label().endswith("1 of 1 cells have headroom.")


def test_references_are_averaged_over_the_backbones_of_a_placement(scores):
    assert set(of_placement(scores, "padding").backbone) == {"backbone 1"}
    assert set(of_placement(scores, "padding").placement) == {"none", "weights", "padding"}
    for placement, ax, backbone in zip(("tokens", "padding"), tradeoff(scores).axes, scores.backbone.unique()):
        means = per_run(scores).query("backbone == @backbone").groupby("variant")[["clean", "corrupted"]].mean()
        drawn = [line.get_xydata()[0] for line in ax.lines if line.get_marker() != "None"]
        assert ax.get_title() == placement and len(drawn) == len(means)
        np.testing.assert_allclose(sorted(map(tuple, drawn)), sorted(map(tuple, means.to_numpy())))


def test_variants_of_a_method_are_joined(scores):
    swept = scores.assign(method=scores.method.replace({"better": "lorsp", "worse": "lorsp"}))
    joined = lambda figure: [line for line in figure.axes[0].lines if line.get_marker() == "None" and len(line.get_xdata()) > 1]
    assert [len(line.get_xdata()) for line in joined(tradeoff(swept))] == [2] and not joined(tradeoff(scores))


def test_a_tradeoff_needs_noise_and_no_prompts(scores):
    with pytest.raises(ValueError, match="there is no noise"):
        tradeoff(scores[scores.kind == "clean"])
    bare = tradeoff(scores[scores.placement.isin(["none", "weights"])])
    assert len(bare.axes) == 1 and len(points(bare.axes[0])) == 2


def test_tokens_and_padding_have_no_common_mean(scores):
    with pytest.raises(ValueError, match="the placements tokens, padding have no common mean"):
        severity_curves(scores)


def test_convergence_has_a_row_for_each_mapping_and_a_column_for_each_backbone(history):
    figure = convergence(history)
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["A", "B", "C"]
    assert [row[0].get_ylabel() for row in axes] == ["label mapping\ntraining loss", "linear head\ntraining loss"]
    for ax in axes.flat:
        ends = {round(line.get_ydata()[-1], 6) for line in ax.lines}
        lows = {round(band.get_paths()[0].vertices[:, 1].min(), 6) for band in ax.collections}
        assert ends == {0.5, 0.8} and lows == {0.4, 0.7}  # mean and range of the seeds
    assert figure.get_label().endswith("over the last fifth of the epochs it changes by -50 to -20 %.")


def test_chosen_variants_keep_their_style_in_the_convergence(history):
    chosen = convergence(history, ["VPT"])
    assert {line.get_color() for line in chosen.axes[0].lines} == {variant_styles(history.variant)["VPT"]["color"]}
    assert "for VPT on" in chosen.get_label() and "-20 to -20 %" in chosen.get_label()
    short = convergence(history[history.epoch == 1])
    assert "it changes by +0 to +0 %" in short.get_label()


def test_accuracy_map_names_the_best_setting():
    table = pd.DataFrame({"timesteps": [1, 1, 4, 4], "sigma": [0.0, 0.5] * 2, "val_accuracy": [0.5, 0.6, 0.7, 0.9]})
    assert "best is 90.0 % at timesteps = 4, sigma = 0.5" in accuracy_map(table, "timesteps", "sigma").get_label()


@pytest.mark.parametrize("method", packaged_methods())
def test_every_prompt_can_be_drawn(method, prompted, images):
    takes_tokens = issubclass(method_class(method), TokenPrompt)
    for name in ("pocket_vit", "pocket_swin", "pocket_resnet") if takes_tokens else ("pocket_resnet",):
        prompt = prompted(name, method).prompt.eval()
        figure = draw_prompt(prompt, images)
        assert prompt.label in figure.get_label()
        assert all(text.get_fontsize() >= 6 for text in figure.findobj(Text) if text.get_text())
        plt.close(figure)
        picture = prompt_picture(prompt, images[0])
        assert picture.dim() == 2 or picture.shape == (3, 32, 32) and picture.dtype == torch.uint8


def test_tokens_are_drawn_as_tokens(prompted, images):
    models = [prompted("pocket_vit", method).prompt.eval() for method in ("vpt", "spike_nvpt")]
    dense, bits = (prompt_picture(prompt, images[0]) for prompt in models)
    assert dense.shape == bits.shape == (40, 128)
    values = torch.cat([models[0].prompt_tokens(layer) for layer in range(4)])
    assert (picture_values(dense) - values / values.abs().max()).abs().max() <= 0.5 / 127 + 1e-6
    assert torch.equal(picture_values(bits).flatten(), models[1].discrete_state())
    for method in "vpt", "spike_nvpt":
        swin = picture_values(prompt_picture(prompted("pocket_swin", method).prompt.eval(), images[0]))
        assert swin.isnan().any() and not swin.isnan().all(1).any()  # narrow blocks leave the right side blank
    figure = gallery({"VPT-deep": {"ViT": dense}, "LoR-VP": {"ResNet": (255 * images[0]).byte()}})
    assert [len(ax.images) for ax in figure.axes] == [1, 0, 0, 1]


class Brightening(Prompt):
    label = "brightening"

    def pattern(self):
        return torch.full((3, 32, 32), 0.1)

    def pixels(self, images):
        return images + self.pattern()


def test_a_prompt_of_ones_own_is_drawn_around_grey(images):
    prompt = Brightening(None, None)
    assert torch.equal(prompt_picture(prompt, images[0]), torch.full((3, 32, 32), 255, dtype=torch.uint8))
    assert torch.equal(prompt_picture(Prompt(None, None), images[0]), torch.full((3, 32, 32), 128, dtype=torch.uint8))
    large = torch.nn.functional.interpolate(images[:1], 160)[0]
    assert prompt_picture(Prompt(None, None), large).shape == (3, 48, 48)
    assert len(draw_prompt(prompt, images).axes) == 3  # one image: the pattern is the same for all
