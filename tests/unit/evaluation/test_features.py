"""Features side by side, against full vectors and against readings made by hand."""

import copy
import json
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_gradiend.base_models import objective_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import collate, prepare_texts
from hf_gradiend.errors import CompatibilityError, ConfigError, DataError, NumericalError
from hf_gradiend.evaluation import features
from hf_gradiend.evaluation.features import (
    FeatureComparison,
    compare_features,
    comparison_values,
    energy_by_layer,
)
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.gradients.forward import encode_texts
from hf_gradiend.metrics import pearson_correlation
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import select_parameters, selection_of

CODERS = ("encoder", "decoder")


@torch.no_grad()
def with_normal_weights(gradiend: GradiendModel, seed: int) -> GradiendModel:
    """The GRADIEND with weights without ties, which are in part those of every other seed."""
    shared, own = (torch.Generator().manual_seed(number) for number in (0, seed))
    for entry in selection_of(gradiend):
        common = torch.randn(entry.shape, generator=shared)
        for coder in CODERS:
            held = getattr(gradiend, coder).weight.at(entry.name)
            for axis in held:
                noise = torch.randn(entry.shape, generator=own)
                axis.copy_(entry.gather(common + (0.2 + 0.8 * seed) * noise))
    return gradiend


@torch.no_grad()
def scaled(gradiend: GradiendModel, factor: float, *coders: str) -> GradiendModel:
    made = copy.deepcopy(gradiend)
    for coder in coders or CODERS:
        for name in made.names:
            getattr(made, coder).weight.at(name).mul_(factor)
    return made


def compared(gradiends: Mapping[str, GradiendModel], model, **options) -> FeatureComparison:
    """The comparison of the weights alone."""
    return compare_features(gradiends, model, None, {}, progress=False, **options)


def full_vectors(gradiends: Sequence[GradiendModel], model, coder: str) -> list[Tensor]:
    """Every axis over all weights of the base model, with plain indexing; NaN if not selected."""
    vectors: list[Tensor] = []
    for gradiend in gradiends:
        for axis in range(gradiend.config.n_features):
            parts = []
            for name, parameter in model.named_parameters():
                part = torch.full((parameter.numel(),), torch.nan, dtype=torch.float64)
                if name in gradiend.names:
                    held = getattr(gradiend, coder).weight.at(name)[axis].detach().double()
                    entry = next(e for e in selection_of(gradiend) if e.name == name)
                    where = slice(None) if entry.indices is None else entry.indices.long()
                    part[where] = held.flatten()
                parts.append(part)
            vectors.append(torch.cat(parts))
    return vectors


@pytest.fixture
def several(tiny_model, gradiend_for):
    """A dense GRADIEND, a sparse one, one of two axes, and one that also has the embeddings."""
    made = {
        "dense": gradiend_for(tiny_model),
        "sparse": gradiend_for(tiny_model, every=3),
        "two": gradiend_for(tiny_model, "*.0.*", n_features=2, every=2),
        "wide": gradiend_for(tiny_model, "backbone", every=5),
    }
    return {name: with_normal_weights(g, seed) for seed, (name, g) in enumerate(made.items())}


# ---- weights ----


@pytest.mark.parametrize("block", [7, 2**18])
def test_cosines_are_those_of_full_vectors_with_zeros_where_nothing_is_selected(
    several, tiny_model, block, monkeypatch
):
    monkeypatch.setattr(features, "_BLOCK", block)

    found = compared(several, tiny_model)

    assert [f.name for f in found.features] == ["dense", "sparse", "two/0", "two/1", "wide"]
    for coder, cosines in (("encoder", found.encoder_cosines), ("decoder", found.decoder_cosines)):
        vectors = [v.nan_to_num(0.0) for v in full_vectors([*several.values()], tiny_model, coder)]
        expected = [[float(a @ b / (a.norm() * b.norm())) for b in vectors] for a in vectors]
        torch.testing.assert_close(torch.tensor(cosines), torch.tensor(expected))
        assert abs(expected[0][1] - expected[0][4]) > 0.1  # the control: they are not all alike
        assert abs(expected[0][1]) > 0.1


@pytest.mark.parametrize("top_k", [0.01, 0.3, 1.0])
def test_overlaps_are_those_of_full_vectors_with_what_chance_would_give(several, tiny_model, top_k):
    found = compared(several, tiny_model, top_k=top_k)

    vectors = full_vectors([*several.values()], tiny_model, "decoder")
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            sizes = [int(v.isfinite().sum()) for v in (a, b)]
            k = max(1, round(top_k * min(sizes)))
            top = [{*v.abs().nan_to_num(-1.0).topk(k).indices.tolist()} for v in (a, b)]
            n_common = int((a.isfinite() & b.isfinite()).sum())
            assert found.overlaps[i][j] == len(top[0] & top[1]) / k
            # Each of k weights drawn from the one is common, and then drawn from the other.
            chance = k * (n_common / sizes[0]) * (1 / sizes[1])
            assert found.chance_overlaps[i][j] == pytest.approx(chance)
    assert found.top_k == top_k


def test_all_weights_of_one_selection_overlap_wholly_as_chance_would(tiny_bert, gradiend_for):
    pair = {str(s): with_normal_weights(gradiend_for(tiny_bert), s) for s in (1, 2)}

    everything, few = (compared(pair, tiny_bert, top_k=top_k) for top_k in (1.0, 0.05))

    assert everything.overlaps[0][1] == everything.chance_overlaps[0][1] == 1.0
    assert few.chance_overlaps[0][1] == pytest.approx(0.05, rel=0.01)
    assert 0.0 < few.overlaps[0][1] < 1.0


def test_a_gradiend_is_one_with_itself_and_minus_one_with_its_negative(tiny_bert, gradiend_for):
    gradiend = with_normal_weights(gradiend_for(tiny_bert), 1)
    trio = {"a": gradiend, "double": scaled(gradiend, 2.0), "flipped": scaled(gradiend, -1.0)}

    found = compared(trio, tiny_bert)

    for cosines in (found.encoder_cosines, found.decoder_cosines):
        assert [value for row in cosines for value in row] == pytest.approx(
            [1, 1, -1, 1, 1, -1, -1, -1, 1]
        )
    assert found.overlaps == [[1.0] * 3] * 3


@torch.no_grad()
def test_gradiends_of_other_weights_are_orthogonal(tiny_bert, gradiend_for):
    halves = [with_normal_weights(gradiend_for(tiny_bert), 1) for _ in range(2)]
    for place, gradiend in enumerate(halves):
        for coder in CODERS:
            for name in gradiend.names:
                getattr(gradiend, coder).weight.at(name)[0].flatten()[place::2] = 0.0
    parts = [with_normal_weights(gradiend_for(tiny_bert, p), 1) for p in ("*.0.*", "*.1.*")]
    quartet = {str(number): made for number, made in enumerate([*halves, *parts])}

    found = compared(quartet, tiny_bert)

    for one, other in ((0, 1), (2, 3)):
        for matrix in (found.encoder_cosines, found.decoder_cosines, found.overlaps):
            assert matrix[one][other] == 0.0
    assert found.chance_overlaps[0][1] > 0.0
    assert found.chance_overlaps[2][3] == 0.0  # no weight is in both
    assert found.decoder_cosines[0][2] > 0.5  # the control


def test_a_gradiend_of_the_body_is_the_same_under_the_head(tiny_bert, gradiend_for):
    pair = {"head": gradiend_for(tiny_bert), "body": gradiend_for(tiny_bert.base_model)}
    assert pair["head"].names != pair["body"].names

    found = compared({n: with_normal_weights(g, 1) for n, g in pair.items()}, tiny_bert)

    assert found.decoder_cosines[0][1] == pytest.approx(1.0)
    assert found.overlaps[0][1] == 1.0


def test_a_decoder_of_zeros_has_no_cosine_and_no_overlap(tiny_bert, gradiend_for):
    gradiend = with_normal_weights(gradiend_for(tiny_bert), 1)

    found = compared({"a": gradiend, "untrained": scaled(gradiend, 0.0, "decoder")}, tiny_bert)

    assert found.decoder_cosines == [[pytest.approx(1.0), None], [None, None]]
    assert found.overlaps == [[1.0, None], [None, None]]
    assert found.encoder_cosines[0][1] == pytest.approx(1.0)
    assert found.features[1].energy_by_layer == {}


def test_energy_by_layer_is_each_axis_own(tiny_bert, gradiend_for):
    two = with_normal_weights(gradiend_for(tiny_bert, "backbone", n_features=2), 1)

    found = compared({"two": two, "late": gradiend_for(tiny_bert, "*.1.*")}, tiny_bert)

    for axis, factors in enumerate(([1.0, 0.0], [0.0, 1.0])):
        expected = energy_by_layer(two.energy_by_parameter(factors))
        assert found.features[axis].energy_by_layer == pytest.approx(expected)
        assert list(expected) == [0, 1, None]
    assert found.features[2].energy_by_layer == {1: pytest.approx(1.0)}


def test_shares_of_the_energy_sum_to_one_by_layer():
    energy = {"head": 1.0, "h.10.a": 2.0, "h.2.a": 3.0, "h.10.b": 2.0}

    assert energy_by_layer(energy) == {2: 0.375, 10: 0.5, None: 0.125}
    assert list(energy_by_layer(energy)) == [2, 10, None]
    assert energy_by_layer({"h.0.a": 0.0}) == {}


# ---- readings ----

ADJECTIVES = {"L": "long", "T": "tired"}


def adjective_rows(names: Sequence[str]) -> list[dict[str, str]]:
    """Texts of another feature in the planted language."""
    sentences = (
        "the nurse was [TARGET] because {} went home .",
        "the doctor was [TARGET] because {} went home .",
    )
    return [
        {
            "text": sentence.format(name), "factual": ADJECTIVES[own], "factual_class": own,
            "counterfactual": ADJECTIVES[other], "counterfactual_class": other,
        }
        for own, other in (("L", "T"), ("T", "L"))
        for name in names
        for sentence in sentences
    ]  # fmt: skip


@torch.no_grad()
def closed_form(planted, rows: Sequence[Mapping[str, str]], classes: list[str]) -> GradiendModel:
    """Class means; the encoder puts them at ±0.9."""
    selection = select_parameters(planted.model)
    means = []
    for label in classes:
        own = [row for row in rows if row["factual_class"] == label]
        texts = prepare_texts(own, planted.tokenizer, objective_of(planted.model))
        batch = collate(texts.texts, planted.tokenizer.pad_token_id)
        with torch.enable_grad():
            means.append(gradients(planted.model, batch, selection, ("factual", "diff")))
    made = GradiendModel(
        GradiendConfig(parameters=selection.to_config(), feature_classes=[classes])
    )
    apart = {n: means[0]["factual"][n] - means[1]["factual"][n] for n in selection.names}
    plus, minus = (sum(float((m["factual"][n] * d).sum()) for n, d in apart.items()) for m in means)
    scale = 2 * math.atanh(0.9) / (plus - minus)
    made.encoder.bias.fill_(-scale * (plus + minus) / 2)
    for name in selection.names:
        made.encoder.weight.at(name)[0] = scale * apart[name]
        made.decoder.weight.at(name)[0] = (means[0]["diff"][name] - means[1]["diff"][name]) / 2
    return made


def joined(first: GradiendModel, second: GradiendModel, **settings: object) -> GradiendModel:
    """One GRADIEND with both as its axes."""
    made = GradiendModel(
        GradiendConfig(parameters=first.config.parameters, n_features=2, **settings)
    )
    with torch.no_grad():
        for axis, one in enumerate((first, second)):
            made.encoder.bias[axis] = one.encoder.bias[0]
            for name in made.names:
                made.encoder.weight.at(name)[axis] = one.encoder.weight.at(name)[0]
                made.decoder.weight.at(name)[axis] = one.decoder.weight.at(name)[0]
    return made


@pytest.fixture
def world(planted_gpt2):
    """Two GRADIENDs, of pronouns and of adjectives, and texts that they were not made of."""
    pronouns = planted_gpt2.data["train"].select(range(0, 96, 3)).to_list()
    gradiends = {
        "gender": closed_form(planted_gpt2, pronouns, ["F", "M"]),
        "state": closed_form(
            planted_gpt2, adjective_rows(["anna", "lucy", "paul", "mark"]), ["T", "L"]
        ),
    }
    datasets = {
        "pronouns": planted_gpt2.data["test"],
        "adjectives": Dataset.from_list(adjective_rows(["nora", "ruth", "jack", "luke"])),
    }
    return planted_gpt2, gradiends, datasets


def read(world, gradiends=None, datasets=None) -> FeatureComparison:
    planted, own, texts = world
    return compare_features(
        own if gradiends is None else gradiends, planted.model, planted.tokenizer,
        texts if datasets is None else datasets, progress=False,
    )  # fmt: skip


@pytest.fixture
def readings(world):
    return {(row.feature, row.dataset): row for row in read(world).readings}


def test_every_reading_is_that_of_encode_texts_with_its_pearson_correlation(world):
    planted, gradiends, datasets = world
    before = copy.deepcopy(planted.model.state_dict())

    found = read(world).readings

    rows = iter(found)
    for name, gradiend in gradiends.items():
        for dataset, data in datasets.items():
            row = next(rows)
            h = encode_texts(
                gradiend, planted.model, planted.tokenizer, data, progress=False
            ).source[:, 0]
            plus = {"pronouns": "F", "adjectives": "T"}[dataset]  # as the GRADIEND of its own says
            signs = torch.tensor([1.0 if c == plus else -1.0 for c in data["factual_class"]])
            assert (row.feature, row.dataset) == (name, dataset)
            assert row.classes == {"pronouns": ("F", "M"), "adjectives": ("T", "L")}[dataset]
            if h.unique().numel() == 1:  # pronouns' encoder is far beyond its range there
                assert (name, row.correlation) == ("gender", None)
            else:
                assert row.correlation.value == pytest.approx(pearson_correlation(h, signs))
                assert row.correlation.low <= row.correlation.value <= row.correlation.high
                assert row.correlation.n == len(data)
            gap = float(h[signs > 0].mean() - h[signs < 0].mean())
            assert row.gap == pytest.approx(gap, abs=1e-6)
            assert row.mean_absolute == pytest.approx(float(h.abs().mean()))
            assert row.n == len(data)
    assert next(rows, None) is None
    after = planted.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_gradiend_reads_its_own_texts_and_hardly_the_others(readings):
    own = [row for row in readings.values() if row.own]
    others = [row for row in readings.values() if not row.own]

    assert {(r.feature, r.dataset) for r in own} == {
        ("gender", "pronouns"),
        ("state", "adjectives"),
    }
    assert min(row.correlation.low for row in own) > 0.9
    assert min(row.gap for row in own) > 1.5
    assert max(abs(row.correlation.value) for row in others if row.correlation) < 0.5
    assert max(abs(row.gap) for row in others) < 0.1


def test_a_gradiend_of_opposite_sign_correlates_negatively(world):
    _, gradiends, _ = world
    reversed_ = copy.deepcopy(gradiends["gender"])
    reversed_.flip_()
    reversed_.config.feature_classes = [["M", "F"]]

    found = read(world, {"a": gradiends["gender"], "b": reversed_})

    a, b = (row for row in found.readings if row.dataset == "pronouns")
    assert a.classes == b.classes == ("F", "M")
    assert a.own
    assert b.own
    assert b.correlation.value == pytest.approx(-a.correlation.value)


def test_the_axes_of_one_gradiend_are_read_as_single_ones(world, readings):
    _, gradiends, _ = world
    both = joined(*gradiends.values(), feature_classes=[["F", "M"], ["T", "L"]])

    found = read(world, {"both": both, "gender": gradiends["gender"]})

    assert [f.name for f in found.features] == ["both/F-M", "both/T-L", "gender"]
    assert [f.classes for f in found.features] == [("F", "M"), ("T", "L"), ("F", "M")]
    singles = ["gender", "state", "gender"]
    expected = [readings[name, data] for name in singles for data in ("pronouns", "adjectives")]
    for row, single in zip(found.readings, expected, strict=True):
        assert (row.dataset, row.own) == (single.dataset, single.own)
        assert row.gap == pytest.approx(single.gap, abs=1e-6)
        assert (row.correlation is None) == (single.correlation is None)
        if single.correlation is not None:
            assert row.correlation.value == pytest.approx(single.correlation.value, abs=1e-4)
    assert found.decoder_cosines[0][2] == pytest.approx(1.0)
    assert found.decoder_cosines[1][2] == pytest.approx(found.decoder_cosines[0][1])


def test_axes_without_classes_are_numbered_and_own_nothing(world):
    _, gradiends, _ = world

    found = read(world, {"both": joined(*gradiends.values())})

    assert [f.name for f in found.features] == ["both/0", "both/1"]
    assert [f.classes for f in found.features] == [None, None]
    assert not any(row.own for row in found.readings)
    # No GRADIEND says which class is +, so that it is the first by alphabet.
    assert {row.classes for row in found.readings} == {("F", "M"), ("L", "T")}


def test_texts_without_room_for_their_target_are_left_out(world, readings, caplog):
    _, _, datasets = world
    rows = datasets["pronouns"].to_list()
    # A causal model has nothing to go by at the start of a text.
    unreadable = {**rows[0], "text": "[TARGET] was late ."}

    found = read(world, datasets={"pronouns": Dataset.from_list([*rows, unreadable])})

    for row in found.readings:
        assert row.n == len(rows)
        assert row.correlation == readings[row.feature, "pronouns"].correlation
    assert "1 of 49 texts are skipped" in caplog.text


def test_equal_encodings_have_no_correlation(world):
    _, gradiends, datasets = world
    blind = scaled(gradiends["gender"], 0.0, "encoder")
    h = float(blind.encoder.bias.detach().tanh())

    found = read(world, {"blind": blind})

    for row in found.readings:
        assert row.correlation is None
        assert row.gap == pytest.approx(0.0, abs=1e-6)
        assert row.mean_absolute == pytest.approx(abs(h))
        assert row.n == len(datasets[row.dataset])


@pytest.fixture
def three_classes():
    words = {"F": "she", "M": "he", "N": "it"}
    return Dataset.from_list(
        [
            {
                "text": f"{name} said that [TARGET] was late .", "factual": words[own],
                "counterfactual": words[other], "factual_class": own,
                "counterfactual_class": other,
            }
            for own in words
            for name in ("the nurse", "the doctor", "anna", "paul")
            for other in words
            if other != own
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("named", "columns"),
    [
        (None, [("F", "M"), ("F", "N"), ("M", "N")]),  # all pairs, by alphabet
        (["N", "F"], [("N", "F")]),
        (["N", "rest"], [("N", "rest")]),
        (["N", "X"], [("F", "M"), ("F", "N"), ("M", "N")]),  # not a class of the data
    ],
)
def test_of_several_classes_those_are_read_that_a_gradiend_names(
    world, three_classes, named, columns
):
    planted, gradiends, _ = world
    gradiend = copy.deepcopy(gradiends["gender"])
    gradiend.config.feature_classes = named and [named]

    found = read(world, {"a": gradiend}, {"data": three_classes})

    assert [row.classes for row in found.readings] == columns
    h = encode_texts(gradiend, planted.model, planted.tokenizer, three_classes, progress=False)
    for row in found.readings:
        plus, minus = row.classes
        once = {}  # a text has a row for each other class
        for i, text in enumerate(three_classes):
            if plus == text["factual_class"] or minus in {text["factual_class"], "rest"}:
                once.setdefault((text["text"], text["factual"]), (i, text["factual_class"] == plus))
        rows, signs = zip(*once.values(), strict=True)
        expected = pearson_correlation(h.source[list(rows), 0], 2.0 * torch.tensor(signs) - 1)
        assert row.correlation.value == pytest.approx(expected)
        assert row.n == (12 if minus == "rest" else 8)
        assert row.own == (named == [plus, minus])


# ---- JSON and refusals ----


@pytest.mark.parametrize("with_classes", [True, False])
def test_a_comparison_is_valid_json_and_comes_back_as_it_was(world, with_classes):
    planted, gradiends, _ = world
    planted.model.config.name_or_path = "org/tiny"
    classes = [["F", "M"], ["T", "L"]] if with_classes else None
    both = joined(*gradiends.values(), feature_classes=classes)
    blind = scaled(gradiends["gender"], 0.0)

    values = comparison_values(read(world, {"both": both, "blind": blind}))

    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["base_model"] == "org/tiny"
    assert [f["name"] for f in values["features"]] == (
        ["both/F-M", "both/T-L", "blind"] if with_classes else ["both/0", "both/1", "blind"]
    )
    assert set(values["features"][0]["energy_by_layer"]) == {"0", "1"}
    assert values["features"][0]["classes"] == (["F", "M"] if with_classes else None)
    assert values["decoder_cosines"][0][2] is None
    assert len(values["readings"]) == 6
    assert values["readings"][0]["correlation"]["n"] == 48


def test_weights_outside_of_layers_are_so_in_json(tiny_bert, gradiend_for):
    found = comparison_values(compared({"wide": gradiend_for(tiny_bert, "backbone")}, tiny_bert))

    assert list(found["features"][0]["energy_by_layer"]) == ["0", "1", "outside"]


@pytest.mark.parametrize("top_k", [0.0, -0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(tiny_bert, gradiend_for, top_k):
    with pytest.raises(ConfigError, match="top_k in"):
        compared({"a": gradiend_for(tiny_bert)}, tiny_bert, top_k=top_k)


def test_no_gradiend_is_refused(tiny_bert):
    with pytest.raises(ConfigError, match="at least one GRADIEND"):
        compared({}, tiny_bert)


def test_two_features_of_one_name_are_refused(tiny_bert, gradiend_for):
    pair = {"a": gradiend_for(tiny_bert, n_features=2), "a/1": gradiend_for(tiny_bert)}

    with pytest.raises(ConfigError, match="two are 'a/1'"):
        compared(pair, tiny_bert)


def test_a_gradiend_of_another_base_model_is_refused_by_name(tiny_bert, tiny_gpt2, gradiend_for):
    pair = {"right": gradiend_for(tiny_bert), "wrong": gradiend_for(tiny_gpt2)}

    with pytest.raises(CompatibilityError, match=r"'wrong' does not fit.*is missing"):
        compared(pair, tiny_bert)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tiny_bert, gradiend_for, coder, value):
    broken = gradiend_for(tiny_bert)
    with torch.no_grad():
        getattr(broken, coder).weight.at(broken.names[-1])[0, 0] = value

    with pytest.raises(NumericalError, match="'broken'"):
        compared({"a": gradiend_for(tiny_bert), "broken": broken}, tiny_bert)


def test_texts_of_one_class_alone_are_refused(world):
    _, _, datasets = world
    rows = [row for row in datasets["pronouns"] if row["factual_class"] == "F"]

    with pytest.raises(DataError, match=r"'F' and 'M' in the data set 'women'.*24 and 0"):
        read(world, datasets={"women": Dataset.from_list(rows)})
