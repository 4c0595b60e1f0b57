"""Several axes in one GRADIEND, each blind to the others' classes."""

import pytest
import torch
from datasets import Dataset

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.errors import CompatibilityError, ConfigError, NumericalError
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.axes import join_axes, separating
from hf_gradiend.training.several_classes import train_contrasts


def texts_of(n, gaps, seed):
    """Projections on two axes of texts whose two classes lie `gaps` apart, with noise."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.tensor([1, -1] * (n // 2))
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return signs[:, None] * torch.tensor(gaps).double() / 2 + 0.1 * noise + 0.3, signs


def test_each_axis_tells_its_own_classes_apart_and_no_others():
    # Encoder 0 reads feature 1's classes nearly as far apart as its own.
    (z0, s0), (z1, s1) = texts_of(400, [2.0, 0.5], 0), texts_of(400, [1.5, 1.0], 1)

    mixing, offsets = separating([z0, z1], [s0, s1])

    def gap(axis, z, s):
        h = torch.tanh(z @ mixing[axis] + offsets[axis])
        return float(h[s > 0].mean() - h[s < 0].mean())

    assert gap(0, z0, s0) > 1.6
    assert gap(1, z1, s1) > 1.6
    assert abs(gap(0, z1, s1)) < 0.05
    assert abs(gap(1, z0, s0)) < 0.05
    # The control: without the mixture axis 0 reads the other feature.
    alone = torch.tanh(1.5 * (z1[:, 0] - z1[:, 0].mean()))
    assert float(alone[s1 > 0].mean() - alone[s1 < 0].mean()) > 1.0


def test_features_that_read_alike_cannot_be_joined():
    one, other = texts_of(400, [2.0, 1.0], 0), texts_of(400, [4.0, 2.0], 1)

    with pytest.raises(NumericalError, match="read each other's texts alike"):
        separating([one[0], other[0]], [one[1], other[1]])


WORDS = {"F": "she", "M": "he", "I": "it", "T": "the"}
TEXTS = [
    "Anna said that [TARGET] was late.",
    "The nurse was tired and [TARGET] said so.",
    "Paul was late because [TARGET] was tired.",
    "My doctor said [TARGET] was late.",
]


def rows(*classes) -> Dataset:
    return Dataset.from_list(
        [
            {
                "text": text, "factual": WORDS[a], "factual_class": a,
                "counterfactual": WORDS[b], "counterfactual_class": b,
            }
            for text in TEXTS
            for a, b in (classes, classes[::-1])
        ]
    )  # fmt: skip


@pytest.fixture
def parts(make_lm, arguments):
    lm = make_lm("gpt2")
    data = [rows("F", "M"), rows("I", "T")]
    gradiends = [
        next(iter(train_contrasts(lm.model, lm.tokenizer, arguments(feature_classes=classes), d)))[
            1
        ]
        for d, classes in zip(data, (["F", "M"], ["I", "T"]), strict=True)
    ]
    return lm, gradiends, data


def test_the_joined_gradiend_reads_and_decodes_every_axis(parts, tmp_path):
    lm, gradiends, data = parts

    joined = join_axes(gradiends, lm.model, lm.tokenizer, data, progress=False)

    assert joined.config.n_features == 2
    assert joined.config.feature_classes == [["F", "M"], ["I", "T"]]
    for axis in range(2):
        h = joined.encode_texts(lm.model, lm.tokenizer, data[axis], progress=False)
        signs = torch.tensor([1.0, -1.0] * len(TEXTS))
        own, other = ((h[:, k] * signs).mean() for k in (axis, 1 - axis))
        assert float(own) > 0.8
        assert abs(float(other)) < 0.1
    name = joined.names[0]
    update = joined.decode([0.5, -0.25])[name]
    expected = 0.5 * gradiends[0].decoder.weight.at(name)[0]
    expected = expected - 0.25 * gradiends[1].decoder.weight.at(name)[0]
    biases = [g.decoder.bias.at(name) for g in gradiends]
    torch.testing.assert_close(update, expected + (biases[0] + biases[1]) / 2)
    # Saved, loaded, and as an adapter, with one h per axis.
    joined.save_pretrained(tmp_path / "joined")
    again = GradiendModel.from_pretrained(tmp_path / "joined")
    torch.testing.assert_close(again.decode([0.5, -0.25])[name], update)
    adapter = again.to_adapter(feature_factor=[0.5, -0.25], step_size=0.1)
    key = next(iter(dict(lm.model.named_parameters())))
    assert key
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = lm.model(ids).logits
        with adapter.applied(lm.model):
            steered = lm.model(ids).logits
        with again.edited(lm.model, [0.5, -0.25], 0.1):
            edited = lm.model(ids).logits
    torch.testing.assert_close(steered, edited)
    assert not torch.equal(steered, base)  # the control


def test_what_cannot_be_joined_is_refused(parts):
    lm, gradiends, data = parts
    run = {"base_model": lm.model, "processing_class": lm.tokenizer, "progress": False}
    with pytest.raises(ConfigError, match="two or more GRADIENDs"):
        join_axes(gradiends[:1], datasets=data[:1], **run)
    with pytest.raises(ConfigError, match="with a data set each, but got 2 and 1"):
        join_axes(gradiends, datasets=data[:1], **run)
    other = GradiendModel(
        GradiendConfig.from_dict(gradiends[1].config.to_dict() | {"selection_fingerprint": "x"})
    )
    with pytest.raises(CompatibilityError, match="same weights, source and target"):
        join_axes([gradiends[0], other], datasets=data, **run)
    renamed = GradiendModel(
        GradiendConfig.from_dict(
            gradiends[1].config.to_dict()
            | {"feature_classes": [["F", "T"]], "feature_words": {"F": ["it"], "T": ["the"]}}
        )
    )
    with pytest.raises(ConfigError, match="'F' stands for"):
        join_axes([gradiends[0], renamed], datasets=data, **run)
    joined = join_axes(gradiends, datasets=data, **run)
    with pytest.raises(ConfigError, match="of one feature"):
        join_axes([gradiends[0], joined], datasets=data, **run)
