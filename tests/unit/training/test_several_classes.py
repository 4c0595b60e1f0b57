"""Several classes from one pass: the same numbers as each pair on its own."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from hf_gradiend.base_models import objective_of
from hf_gradiend.data.collation import prepare_texts
from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.gradients.backward import gradient_stream
from hf_gradiend.gradients.packing import passes_over
from hf_gradiend.parameters import select_parameters
from hf_gradiend.training import several_classes
from hf_gradiend.training.calibration import fit_plane, fit_scale
from hf_gradiend.training.class_texts import class_texts
from hf_gradiend.training.contrasts import all_pairs, one_against_rest, rows_of
from hf_gradiend.training.means import ClassMeans
from hf_gradiend.training.several_classes import WordSums, train_contrasts
from hf_gradiend.training.texts import label_texts
from hf_gradiend.training.trainer import GradiendTrainer

WORDS = {"F": "she", "M": "he", "N": "it"}
SHARED = [  # every class's word fits
    "The nurse said that [TARGET] was late.",
    "The doctor was tired and [TARGET] said so.",
]
OWN = {  # texts of one class
    "F": ["Anna said that [TARGET] was tired.", "Anna was late and [TARGET] said so."],
    "M": ["Paul said that [TARGET] was late.", "Paul was tired and [TARGET] was late."],
    "N": ["The nurse was late and [TARGET] was tired.", "The doctor said [TARGET] was late."],
}


def long_form(texts: dict[str, list[str]]) -> Dataset:
    """One row per text and other class."""
    return Dataset.from_list(
        [
            {
                "text": text, "factual": WORDS[own], "factual_class": own,
                "counterfactual": WORDS[other], "counterfactual_class": other,
            }
            for own, held in texts.items()
            for text in held
            for other in WORDS
            if other != own
        ]
    )  # fmt: skip


@pytest.fixture(params=["shared", "own", "mixed"])
def data(request):
    return long_form(
        {
            "shared": dict.fromkeys(WORDS, SHARED),
            "own": OWN,
            "mixed": {name: [*OWN[name], *SHARED] for name in WORDS},
        }[request.param]
    )


def sums_of(lm, data) -> WordSums:
    texts = class_texts(data, lm.tokenizer, objective_of(lm.model))
    selection = select_parameters(lm.model)
    sums = WordSums(selection, texts)
    with gradient_stream(lm.model, selection) as stream:
        for pattern in sums.patterns:
            own = [t for t, p in zip(texts.texts, texts.patterns, strict=True) if p == pattern]
            for _, part in passes_over(lm.model, own, pad_token_id=lm.tokenizer.pad_token_id):
                sums.add(stream, part, pattern)
    return sums


def means_of_pair(lm, data, pair) -> ClassMeans:
    """The closed form of one pair alone, from its own rows."""
    rows = data.filter(lambda row: {row["factual_class"], row["counterfactual_class"]} == {*pair})
    texts = label_texts(prepare_texts(rows, lm.tokenizer, objective_of(lm.model)), rows, list(pair))
    sizes = {sign: len(texts.of_sign(sign)) for sign in (1, -1)}
    selection = select_parameters(lm.model)
    means = ClassMeans(selection, source="factual", target="diff", class_sizes=sizes)
    with gradient_stream(lm.model, selection) as stream:
        for sign in (1, -1):
            own = texts.of_sign(sign)
            for _, part in passes_over(lm.model, own, pad_token_id=lm.tokenizer.pad_token_id):
                means.add(stream, part, sign)
    return means


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_each_pair_has_the_closed_form_of_its_own_rows(make_lm, family, data):
    lm = make_lm(family)
    sums = sums_of(lm, data)

    found = []
    for contrast in all_pairs(sorted(WORDS)):
        pair = contrast.positive.name, contrast.negative.name
        (plus, minus), weight, bias = sums.closed_form(contrast)
        direction = {name: plus[name] - minus[name] for name in plus}
        alone = means_of_pair(lm, data, pair)
        expected_direction = alone.to_direction((1.0, -1.0))
        expected_weight, expected_bias = alone.to_decoder()
        for own, expected in (
            (direction, expected_direction), (weight, expected_weight), (bias, expected_bias)
        ):  # fmt: skip
            largest = max(float(t.abs().max()) for t in expected_direction.values())
            for name, tensor in own.items():
                torch.testing.assert_close(tensor, expected[name], atol=1e-5 * largest, rtol=1e-4)
        found.append(torch.cat([t.flatten() for t in direction.values()]))
    # The control: the pairs differ.
    assert all(not torch.allclose(a, b, rtol=0.1) for a, b in itertools.combinations(found, 2))


def test_texts_that_read_the_same_are_read_once(make_lm):
    lm = make_lm("gpt2")
    texts = class_texts(long_form(dict.fromkeys(WORDS, SHARED)), lm.tokenizer, "causal")

    assert len(texts.texts) == len(SHARED)
    assert set(texts.patterns) == {(0, 1, 2)}
    assert texts.counts() == [2, 2, 2]
    assert sums_of(lm, long_form(dict.fromkeys(WORDS, SHARED))).sums.keys() == {
        ((0, 1, 2), word) for word in range(3)
    }


def test_a_class_against_the_rest_is_the_mean_of_the_others(make_lm):
    lm = make_lm("gpt2")
    sums = sums_of(lm, long_form(OWN))
    name = sums.selection.names[0]

    first = one_against_rest(sorted(WORDS))[0]
    (plus_mean, minus_mean), weight, _ = sums.closed_form(first)

    m = {(c, w): sums.mean(name, c, w) for c in range(3) for w in range(3)}
    own, rest = m[0, 0], (m[1, 1] + m[2, 2]) / 2
    torch.testing.assert_close(plus_mean[name], own)
    torch.testing.assert_close(minus_mean[name], rest)
    plus = own - (m[0, 1] + m[0, 2]) / 2
    minus = rest - (m[1, 0] + m[2, 0]) / 2
    torch.testing.assert_close(weight[name], (plus - minus) / 2)


@pytest.mark.parametrize("kind", ["pairs", "rest"])
def test_the_gradiends_encode_their_classes(make_lm, arguments, kind):
    lm = make_lm("gpt2")
    args = arguments(calibration_fraction=0.5)
    before = {name: t.clone() for name, t in lm.model.state_dict().items()}

    found = train_contrasts(lm.model, lm.tokenizer, args, long_form(OWN), kind=kind)
    made = {contrast.name: gradiend for contrast, gradiend in found}

    names = ["F-M", "F-N", "M-N"] if kind == "pairs" else ["F-rest", "M-rest", "N-rest"]
    assert list(made) == names
    assert all(torch.equal(t, before[n]) for n, t in lm.model.state_dict().items())
    for name, gradiend in made.items():
        positive, negative = name.split("-")
        assert gradiend.config.feature_classes == [[positive, negative]]
        assert gradiend.config.feature_words[positive] == [WORDS[positive]]
        rows = [
            {"text": OWN["F"][0], "factual": WORDS[positive], "counterfactual": "late"}
        ]  # fmt: skip
        read = gradiend.encode_texts(lm.model, lm.tokenizer, rows, progress=False)
        assert bool(read.isfinite().all())


def test_a_planted_feature_is_told_apart(planted, arguments):
    """Two classes are one pair: as good as the trainer's."""
    rows = planted.data["train"]
    args = arguments(calibration_fraction=0.25)

    neutral = ["the doctor took the red coat home .", "the day was long because the rain began ."]
    ((contrast, gradiend),) = train_contrasts(
        planted.model, planted.tokenizer, args, rows, neutral_texts=neutral
    )

    h = gradiend.encode_texts(
        planted.model, planted.tokenizer, planted.data["test"], progress=False
    )[:, 0]
    signs = torch.tensor([1.0 if c == "F" else -1.0 for c in planted.data["test"]["factual_class"]])
    assert contrast.name == "F-M"
    assert float((h.sign() == signs).float().mean()) > 0.95


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "adamw", "max_steps": 2},
        {"source": "diff"},
        {"prune_fraction": 0.5},
        {"accumulator_dtype": "bfloat16"},
    ],
)
@pytest.mark.parametrize("kind", ["pairs", "rest"])
def test_what_shares_no_pass_is_trained_from_each_contrasts_own_rows(
    make_lm, arguments, settings, kind
):
    lm = make_lm("gpt2")
    rows = long_form(OWN)
    args = arguments(**settings)

    learned = train_contrasts(lm.model, lm.tokenizer, args, rows, kind=kind, eval_dataset=rows)

    for (contrast, gradiend), expected in zip(
        learned, (all_pairs if kind == "pairs" else one_against_rest)(sorted(WORDS)), strict=True
    ):
        assert contrast == expected
        own = arguments(
            **settings,
            output_dir=args.output_dir + "/alone",
            feature_classes=[contrast.positive.name, contrast.negative.name],
        )
        of_contrast = rows_of(contrast, rows)
        alone = GradiendTrainer(lm.model, lm.tokenizer, own, of_contrast, of_contrast)
        alone.train()
        for name, tensor in alone.model.state_dict().items():
            assert torch.equal(tensor, gradiend.state_dict()[name])


def test_the_rows_of_a_contrast_are_those_between_its_sides():
    rows = long_form(OWN)
    pair, rest = all_pairs(sorted(WORDS))[1], one_against_rest(sorted(WORDS))[0]

    of_pair, of_rest = rows_of(pair, rows), rows_of(rest, rows)

    assert sorted(zip(of_pair["text"], of_pair["factual_class"], strict=True)) == sorted(
        (text, name) for name in ("F", "N") for text in OWN[name]
    )
    assert sorted(set(of_rest["factual_class"])) == ["F", "rest"]
    assert of_rest["factual_class"].count("rest") == 4
    assert len(of_rest) == 6  # each text once


def test_neutral_words_read_as_0_where_one_side_is_far_larger():
    generator = torch.Generator().manual_seed(0)

    def texts(n, *means):
        noise = 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return torch.tensor(means).double() + noise

    # Both sides are far from neutral words along a common direction, one of them further.
    z = torch.cat([texts(50, 5.0, 3.5), texts(50, 1.0, 1.5)])
    signs = torch.tensor([1] * 50 + [-1] * 50)
    neutral = texts(50, 0.0, 0.0)

    (a, b), offset = fit_plane(z, signs, neutral)

    h = torch.tanh(z @ torch.tensor([a, b]).double() + offset)
    assert float((h.sign() == signs).double().mean()) == 1.0
    of_neutral = torch.tanh(neutral @ torch.tensor([a, b]).double() + offset)
    assert float(of_neutral.abs().mean()) < 0.3
    # The control: the difference of the two means, with the closed form's scale.
    alone = z[:, 0] - z[:, 1]
    scale, shift = fit_scale(alone, signs)
    assert float(torch.tanh(scale * (neutral[:, 0] - neutral[:, 1]) + shift).abs().mean()) > 0.4


def test_what_cannot_be_learned_is_refused(make_lm, arguments):
    lm = make_lm("gpt2")
    rows = long_form(OWN)
    without = rows.filter(lambda r: (r["factual_class"], r["counterfactual_class"]) != ("F", "N"))
    with pytest.raises(DataError, match=r"one row per other class, but .* has no word of N"):
        class_texts(without, lm.tokenizer, "causal")
    with pytest.raises(ConfigError, match="kind pairs or rest"):
        train_contrasts(lm.model, lm.tokenizer, arguments(), rows, kind="triples")
    few = long_form({name: texts[:1] for name, texts in OWN.items()})
    with pytest.raises(DataError, match="at least two texts of F"):
        train_contrasts(lm.model, lm.tokenizer, arguments(), few)


def test_several_processes_are_refused(make_lm, arguments, monkeypatch):
    lm = make_lm("gpt2")
    rows = long_form(OWN)
    train_contrasts(lm.model, lm.tokenizer, arguments(), rows)  # the control

    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(several_classes, "PartialState", lambda **_: two)
    with pytest.raises(ConfigError, match="one process for several contrasts, but got 2"):
        train_contrasts(lm.model, lm.tokenizer, arguments(), rows)
