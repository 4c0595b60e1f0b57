from collections import Counter

import pytest
from datasets import Dataset

from hf_gradiend.data.collation import PreparedText, PreparedTexts, WordReading
from hf_gradiend.errors import DataError
from hf_gradiend.training.texts import LabelledTexts, batch_at, label_texts, one_pass


def text(index: int, length: int = 3) -> PreparedText:
    return PreparedText(index, (WordReading(tuple(range(length)), ((0, 1),), 1.0),))


def labelled(n_plus: int, n_minus: int) -> LabelledTexts:
    """Texts whose numbers below n_plus are of the + class; mixed order, lengths 3 to 9."""
    rows = sorted(range(n_plus + n_minus), key=lambda row: row * 7 % (n_plus + n_minus + 1))
    return LabelledTexts(
        tuple(text(row, 3 + row % 7) for row in rows),
        tuple(+1 if row < n_plus else -1 for row in rows),
    )


def by_sign(texts: LabelledTexts) -> dict[int, list[PreparedText]]:
    return {sign: texts.of_sign(sign) for sign in (+1, -1)}


def numbers(texts) -> list[int]:
    return [one.index for one in texts]


# ---- batch_at ----


def test_a_batch_depends_on_its_step_alone():
    texts = by_sign(labelled(10, 7))
    in_order = {step: batch_at(texts, step, 3, seed=5) for step in range(40)}

    backwards = {step: batch_at(texts, step, 3, seed=5) for step in reversed(range(40))}

    assert in_order == backwards
    # The controls: another seed gives another order, and so does another epoch.
    assert any(batch_at(texts, step, 3, seed=6) != in_order[step] for step in range(40))
    assert in_order[0] != in_order[6]  # three batches of 3 of the + class make its epoch


def test_batches_hold_one_class_and_the_classes_alternate():
    texts = by_sign(labelled(10, 7))

    batches = [batch_at(texts, step, 3, seed=0) for step in range(30)]

    assert [batch.sign for batch in batches] == [+1, -1] * 15
    for batch in batches:
        assert all(one in texts[batch.sign] for one in batch.texts)


@pytest.mark.parametrize(("sign", "n", "size"), [(+1, 10, 3), (-1, 7, 3), (+1, 10, 5), (-1, 7, 1)])
def test_no_text_comes_twice_in_an_epoch(sign, n, size):
    texts = by_sign(labelled(10, 7))
    first_step, per_epoch = (0 if sign > 0 else 1), n // size

    for epoch in range(4):
        steps = [first_step + 2 * (epoch * per_epoch + i) for i in range(per_epoch)]
        seen = numbers(t for step in steps for t in batch_at(texts, step, size, seed=0).texts)

        assert len(seen) == len(set(seen)) == per_epoch * size


def test_over_many_epochs_every_text_is_seen_about_equally_often():
    texts = by_sign(labelled(10, 10))  # 3 batches of 3 a class: one text is left out of each epoch

    seen = Counter(
        number for step in range(600) for number in numbers(batch_at(texts, step, 3, 0).texts)
    )

    # 100 epochs, each text in 90 of them on average: a standard deviation of 3.
    assert len(seen) == 20
    assert all(abs(count - 90) < 15 for count in seen.values())


def test_a_batch_larger_than_its_class_is_the_whole_class():
    texts = by_sign(labelled(4, 2))

    assert sorted(numbers(batch_at(texts, 0, 32, 0).texts)) == [0, 1, 2, 3]
    assert sorted(numbers(batch_at(texts, 1, 32, 0).texts)) == [4, 5]


# ---- one_pass ----


def test_one_pass_has_every_text_once_in_batches_of_one_class():
    texts = labelled(10, 7)

    batches = one_pass(texts, 4)

    assert sorted(numbers(t for batch in batches for t in batch.texts)) == list(range(17))
    assert all((one.index < 10) == (batch.sign > 0) for batch in batches for one in batch.texts)
    assert sorted(len(batch.texts) for batch in batches) == [2, 3, 4, 4, 4]


def test_one_pass_begins_with_the_longest_texts():
    batches = one_pass(labelled(20, 20), 4)

    longest = [max(one.length for one in batch.texts) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    # The texts of a batch are of similar length: 20 texts of 7 lengths in batches of 4.
    assert all(
        max(b.texts, key=len_of).length - min(b.texts, key=len_of).length <= 2 for b in batches
    )


def len_of(one: PreparedText) -> int:
    return one.length


# ---- balanced, split, label_texts ----


@pytest.mark.parametrize(
    ("n_texts", "expected"), [(6, (3, 3)), (7, (3, 3)), (1, (1, 1)), (16, (8, 5))]
)
def test_balanced_takes_as_many_of_each_class(n_texts, expected):
    taken = labelled(12, 5).balanced(n_texts, seed=0)

    assert (len(taken.of_sign(+1)), len(taken.of_sign(-1))) == expected
    assert len(set(numbers(taken.texts))) == len(taken.texts)
    assert all((t.index < 12) == (s > 0) for t, s in zip(taken.texts, taken.signs, strict=True))


def test_balanced_is_the_same_for_a_seed_and_another_for_another():
    texts = labelled(30, 30)

    assert texts.balanced(10, seed=3) == texts.balanced(10, seed=3)
    assert texts.balanced(10, seed=3) != texts.balanced(10, seed=4)


@pytest.mark.parametrize("n_texts", [None, 17, 100])
def test_balanced_without_a_lower_limit_takes_everything(n_texts):
    texts = labelled(12, 5)

    assert texts.balanced(n_texts, seed=0) is texts


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
def test_a_split_is_disjoint_complete_and_stratified(fraction):
    texts = labelled(20, 8)

    first, second = texts.split(fraction, seed=0)

    assert sorted(numbers(first.texts) + numbers(second.texts)) == list(range(28))
    for sign, n in ((+1, 20), (-1, 8)):
        share = len(second.of_sign(sign)) / n
        assert len(first.of_sign(sign)) >= 1
        assert len(second.of_sign(sign)) >= 1
        assert abs(share - fraction) <= 1 / n  # to the nearest text, and at least one


def test_a_split_depends_on_its_seed():
    texts = labelled(20, 20)

    assert texts.split(0.5, seed=0) == texts.split(0.5, seed=0)
    assert texts.split(0.5, seed=0) != texts.split(0.5, seed=1)


def test_one_text_of_a_class_cannot_be_split():
    with pytest.raises(DataError, match="two texts of each class"):
        labelled(5, 1).split(0.5, seed=0)


def test_the_sign_of_a_text_follows_its_own_row_also_where_rows_were_skipped():
    rows = Dataset.from_dict({"factual_class": ["F", "M", "M", "F"]})
    texts = PreparedTexts((text(0), text(2), text(3)), n_rows=4, skipped=(1,))

    assert label_texts(texts, rows, ["F", "M"]).signs == (+1, -1, +1)
    assert label_texts(texts, rows, ["M", "F"]).signs == (-1, +1, -1)


@pytest.mark.parametrize("labels", [["F", "F"], ["F", "X"]])
def test_texts_of_other_than_the_two_classes_are_an_error(labels):
    texts = PreparedTexts((text(0), text(1)), n_rows=2)

    with pytest.raises(DataError, match="'F' and 'M'"):
        label_texts(texts, Dataset.from_dict({"factual_class": labels}), ["F", "M"])


def test_prepared_texts_are_numbered_from_zero_and_keep_their_readings():
    texts = labelled(6, 6).balanced(4, seed=0)

    prepared = texts.prepared()

    assert numbers(prepared) == [0, 1, 2, 3]
    assert [one.readings for one in prepared] == [one.readings for one in texts.texts]
    assert prepared.n_rows == 4
