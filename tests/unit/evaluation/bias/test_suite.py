"""From a name and a folder to a result: what is refused, what is kept, what is taken in part."""

import copy
import hashlib
import json
import pathlib
import shutil
from fnmatch import fnmatch

import pytest
import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from hf_gradiend.errors import BaseModelError, ConfigError, DataError, GradiendError, NumericalError
from hf_gradiend.evaluation.bias import suite
from hf_gradiend.evaluation.bias.bec_pro import BecPro
from hf_gradiend.evaluation.bias.benchmark import checked_files
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.seat import Seat
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.evaluation.bias.suite import (
    BENCHMARKS,
    benchmarks_named,
    fingerprint,
    run_benchmark,
)
from hf_gradiend.evaluation.bias.wikitext import WikiText2
from hf_gradiend.evaluation.bias.winobias import WinoBias
from hf_gradiend.evaluation.bias.winogender import Winogender


@pytest.fixture
def lm(make_lm):
    return make_lm("gpt2")


@pytest.fixture
def run(lm, data, tmp_path):
    """Function of a benchmark that runs it on the model, with a cache."""

    def run(benchmark, model=None, tokenizer=None, data_dir=data, **options):
        return run_benchmark(
            benchmark, lm.model if model is None else model, tokenizer or lm.tokenizer, data_dir,
            cache_dir=tmp_path / "cache", progress=False, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def asked(monkeypatch):
    """Titles of the benchmarks that a model was asked, in order."""
    found = []
    for kind in BENCHMARKS.values():
        values = kind.values

        def counted(self, *args, values=values):
            found.append(self.title)
            return values(self, *args)

        monkeypatch.setattr(kind, "values", counted)
    return found


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("Expected ")
    return text


# ---- names ---------------------------------------------------------------------------------------


def test_benchmarks_are_known_by_name_and_variant():
    names = ["stereoset:gender", "seat", "seat:word", "seat", "crows_pairs"]

    found = benchmarks_named(names)

    assert [benchmark.title for benchmark in found] == list(dict.fromkeys(names))
    assert [type(benchmark) for benchmark in found] == [StereoSet, Seat, Seat, CrowsPairs]
    assert [benchmark.variant for benchmark in found] == ["gender", None, "word", None]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["stereo"], "'stereo'"),
        (["stereoset", "stereo", "crows"], "'stereo', 'crows'"),
        ([], "none"),
        ([""], "''"),
        (["StereoSet"], "'StereoSet'"),
        (["stereoset:genders"], "gender, profession, race, religion after a colon, but got"),
        (["winobias:gender"], "winobias alone"),
        (["seat:word:word"], "'word:word'"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(names, words):
    with pytest.raises(ConfigError) as caught:
        benchmarks_named(names)

    assert words in one_line(caught)


def test_a_colon_without_a_variant_is_refused():
    with pytest.raises(ConfigError):
        benchmarks_named(["stereoset:"])


# ---- files ---------------------------------------------------------------------------------------


def test_a_folder_and_one_above_it_are_found(run, data):
    here, above = (run(StereoSet(), data_dir=place) for place in (data, data.parent))

    assert torch.equal(here.values, above.values)
    assert here.n == 3
    assert checked_files(StereoSet(), data) == data


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "seat"])
def test_each_missing_or_changed_file_is_refused(run, data, tmp_path, name):
    benchmark = BENCHMARKS[name]()
    for file in benchmark.files:
        place = tmp_path / "broken"
        shutil.copytree(data, place, dirs_exist_ok=True)
        (place / file).write_bytes((place / file).read_bytes() + b" ")
        with pytest.raises(DataError, match="SHA-256") as caught:
            run(benchmark, data_dir=place)
        assert file in one_line(caught)
        (place / file).unlink()
        with pytest.raises(DataError, match="there is none") as caught:
            run(benchmark, data_dir=place)
        assert name in one_line(caught)
        assert benchmark.paper in str(caught.value)
    assert not (tmp_path / "cache").exists()


class NoRepositoryError(RepositoryNotFoundError):
    """The Hub's own error without the response of its HTTP library, which changes."""

    def __init__(self, message):
        OSError.__init__(self, message)


@pytest.mark.parametrize(
    "error",
    [
        lambda: LocalEntryNotFoundError("Cannot find the snapshot.\nCheck your connection."),
        lambda: NoRepositoryError("404 Client Error.\n\nRepository Not Found"),
        lambda: HFValidationError("Repo id must use alphanumeric chars: 'not a name'."),
        lambda: OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled."),
    ],
    ids=["out of reach", "no repository", "no name", "offline"],
)
def test_neither_a_folder_nor_a_data_set_is_refused(run, monkeypatch, tmp_path, error):
    def download(*_, **__):
        raise error()

    monkeypatch.setattr(suite, "snapshot_download", download)

    with pytest.raises(DataError) as caught:
        run(StereoSet(), data_dir="nobody/nothing")

    line = one_line(caught)
    assert "'nobody/nothing' is neither: " in line
    assert line.endswith(str(error()).strip().splitlines()[0])
    assert isinstance(caught.value.__cause__, type(error()))
    assert not (tmp_path / "cache").exists()


def test_a_path_that_does_not_exist_needs_no_network(run, monkeypatch, tmp_path):
    # Not a name of a repository: huggingface_hub refuses it before it asks anybody.
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))

    with pytest.raises(DataError) as caught:
        run(StereoSet(), data_dir=tmp_path / "no such folder")

    assert "no such folder" in one_line(caught)


@pytest.mark.parametrize("below", ["", "bias"])
def test_a_data_set_on_the_hub_is_downloaded_in_part(run, data, monkeypatch, tmp_path, below):
    snapshot = tmp_path / "snapshot" / below
    shutil.copytree(data, snapshot)
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(suite, "snapshot_download", download)
    expected = run(WinoBias())

    found = run(WinoBias(), data_dir="somebody/bias")

    assert torch.equal(found.values, expected.values)
    ((repo_id, options),) = calls
    assert (repo_id, options["repo_type"]) == ("somebody/bias", "dataset")

    # Every file is among the patterns, in the root and in a folder, and no other benchmark's.
    def wanted(name):
        return any(fnmatch(name, pattern) for pattern in options["allow_patterns"])

    for file in WinoBias.files:
        assert wanted(file)
        assert wanted(f"bias/{file}")
    assert not wanted("stereoset.json")
    assert not wanted("bias/crows_pairs.csv")


def test_a_data_set_without_the_files_is_refused(run, monkeypatch, tmp_path):
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(suite, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))

    with pytest.raises(DataError, match=r"stereoset\.json of stereoset in .* there is none"):
        run(StereoSet(), data_dir="somebody/else")


def test_seat_needs_no_files(run, tmp_path):
    assert run(Seat(), data_dir=tmp_path / "nowhere").n == 960


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", [StereoSet, Seat, WikiText2])
def test_a_model_without_a_head_is_refused_before_any_file_is_read(run, lm, benchmark, tmp_path):
    with pytest.raises(BaseModelError, match="with its head"):
        run(benchmark(), model=lm.model.transformer, data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "seat"])
def test_a_model_that_says_nan_is_refused_and_nothing_is_kept(run, lm, name, tmp_path):
    with torch.no_grad():
        lm.model.transformer.ln_f.weight.fill_(torch.nan)

    with pytest.raises(NumericalError) as caught:
        run(BENCHMARKS[name]())

    assert "NaN" in one_line(caught)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_model_is_left_as_it_was(make_lm, data, name, family):
    lm = make_lm(family)
    lm.model.train()
    before = copy.deepcopy(lm.model.state_dict())

    result = run_benchmark(BENCHMARKS[name](), lm.model, lm.tokenizer, data, progress=False)

    assert lm.model.training
    assert all(torch.equal(t, before[n]) for n, t in lm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert set(result.score()) == {measure.name for measure in result.benchmark.measures}


# ---- parts ---------------------------------------------------------------------------------------


def test_a_variant_takes_the_items_of_its_kind(run):
    assert [run(StereoSet(v)).n for v in (None, "gender", "profession")] == [3, 2, 1]
    assert [run(CrowsPairs(v)).n for v in (None, "gender", "age")] == [3, 2, 1]
    gender = run(StereoSet("gender"))
    assert torch.equal(gender.values, run(StereoSet()).values[:2])


@pytest.mark.parametrize("benchmark", [StereoSet("race"), CrowsPairs("religion")])
def test_a_variant_that_leaves_nothing_is_refused(run, benchmark, tmp_path):
    with pytest.raises(DataError) as caught:
        run(benchmark)

    assert benchmark.title in one_line(caught)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("benchmark", [WinoBias(), BecPro(), Winogender()])
def test_a_limit_that_leaves_too_few_items_is_refused(run, benchmark):
    with pytest.raises(DataError) as caught:
        run(benchmark, limit=1)

    line = one_line(caught)
    assert f"more items of {benchmark.title} than " in line
    assert line.endswith("Raise the limit.")
    assert run(benchmark).n > 1  # the control


@pytest.fixture
def numbered(monkeypatch):
    """A StereoSet of so many items, whose targets are their numbers."""

    def numbered(n):
        gap = {"context": "Anna was BLANK.", "fillings": ["late", "tired", "it"]}
        items = [{**gap, "target": number} for number in range(n)]
        monkeypatch.setattr(StereoSet, "load", lambda *_: list(items))
        taken = []
        columns = StereoSet.columns
        monkeypatch.setattr(
            StereoSet,
            "columns",
            lambda self, chosen: taken.extend(i["target"] for i in chosen) or columns(self, chosen),
        )
        return taken

    return numbered


@pytest.mark.parametrize(("n", "limit"), [(10, 5), (10, 1), (10, 10), (10, 99), (9, 3)])
def test_a_limit_takes_evenly_spread_items(run, numbered, n, limit):
    taken = numbered(n)

    result = run(StereoSet(), limit=limit)

    step = max(1, n // limit)
    assert taken == list(range(0, n, step))[:limit]
    assert result.n == min(n, limit)


@pytest.mark.parametrize(("n", "limit"), [(10, 6), (11, 4), (1508, 1000)])
def test_a_limit_of_any_size_takes_evenly_spread_items(run, numbered, n, limit):
    taken = numbered(n)

    run(StereoSet(), limit=limit)

    gaps = {b - a for a, b in zip(taken, [*taken[1:], n], strict=True)}
    assert len(taken) == limit
    assert max(gaps) - min(gaps) <= 1  # the last item's gap is to the end


def test_seat_takes_all_items_under_any_limit(run):
    assert run(Seat(), limit=5).n == len(Seat().load(None)) == 960


def test_bec_pro_s_items_have_the_same_values_under_a_limit(run, monkeypatch):
    taken = []
    columns = BecPro.columns
    monkeypatch.setattr(
        BecPro, "columns", lambda self, items: taken.append(list(items)) or columns(self, items)
    )

    whole, part = run(BecPro()), run(BecPro(), limit=12)

    of_whole, of_part = taken
    values = dict(zip((item["sentence"] for item in of_whole), whole.values, strict=True))
    assert 0 < len(of_part) <= 12
    expected = torch.stack([values[item["sentence"]] for item in of_part])
    torch.testing.assert_close(part.values, expected, atol=1e-5, rtol=0)


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_model_of_the_same_bits_is_not_asked_again(run, lm, data, asked, name, tmp_path):
    benchmark = BENCHMARKS[name]()

    first = run(benchmark)
    again = run(benchmark, model=copy.deepcopy(lm.model))
    shutil.copytree(data, tmp_path / "elsewhere")
    moved = run(benchmark, data_dir=tmp_path / "elsewhere")

    assert asked == [name]
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.values, moved.values)
    assert first.score() == again.score()
    assert first.estimates() == again.estimates()
    assert again.values.dtype == torch.float64
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [file.partition("-")[0] for file in files] == [name]


def change_one_bit(model):
    with torch.no_grad():
        weight = next(model.parameters()).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


def change_one_filling(data):
    """Another word in StereoSet's file; its SHA-256."""
    file = data / "stereoset.json"
    content = json.loads(file.read_text("utf-8"))
    content["stereotype"][0]["sentence"] = "The nurse said that my was late."
    file.write_text(json.dumps(content), encoding="utf-8")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("what", ["bits", "items", "version", "variant", "limit"])
def test_whatever_else_changes_is_asked(run, lm, data, asked, monkeypatch, tmp_path, what):
    benchmark, options = StereoSet(), {}
    first = run(benchmark)
    if what == "bits":
        change_one_bit(lm.model)
    elif what == "items":
        monkeypatch.setattr(StereoSet, "files", {"stereoset.json": change_one_filling(data)})
    elif what == "version":
        monkeypatch.setattr(suite, "__version__", "0.0.0")
    elif what == "variant":
        benchmark = StereoSet("gender")
    else:
        options = {"limit": 2}

    second = run(benchmark, **options)
    again = run(benchmark, **options)

    fresh = run_benchmark(benchmark, lm.model, lm.tokenizer, data, progress=False, **options)
    assert len(asked) == 3  # and the fresh one, without a cache
    assert torch.equal(second.values, fresh.values)
    assert torch.equal(again.values, fresh.values)
    assert torch.equal(second.values, first.values) is (what == "version")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_tokenizer_is_asked(run, lm, asked):
    other = copy.deepcopy(lm.tokenizer)
    other.bos_token = "!"

    first, second = run(StereoSet()), run(StereoSet(), tokenizer=other)

    assert len(asked) == 2
    assert not torch.equal(first.values, second.values)


def test_another_setting_of_the_model_is_asked(run, lm, make_lm, asked):
    other = make_lm("gpt2", activation_function="relu").model
    other.load_state_dict(lm.model.state_dict())

    first, second = run(StereoSet()), run(StereoSet(), model=other)

    assert len(asked) == 2
    assert not torch.equal(first.values, second.values)


def test_the_fingerprint_is_of_the_weights_as_they_stand(lm, make_lm):
    before = fingerprint(lm.model)

    assert fingerprint(make_lm("gpt2").model) == before
    assert fingerprint(make_lm("gpt2").model.to(torch.bfloat16)) != before
    assert fingerprint(make_lm("bert").model) != before
    change_one_bit(lm.model)
    assert fingerprint(lm.model) != before


def test_the_fingerprint_sees_words_that_change_places(lm):
    before = fingerprint(lm.model)
    she, he = (lm.tokenizer.convert_tokens_to_ids(token) for token in ("Ġshe", "Ġhe"))
    rows = lm.model.get_input_embeddings().weight
    with torch.no_grad():
        rows[[she, he]] = rows[[he, she]].clone()  # an edit that turns a bias around

    assert not torch.equal(rows[she], rows[he])  # the control
    assert fingerprint(lm.model) != before


def cache_file(tmp_path):
    (file,) = (tmp_path / "cache").iterdir()
    return file


BREAKS = {
    "empty": lambda whole: whole[:0],
    "half": lambda whole: whole[: len(whole) // 2],
    "no safetensors": lambda whole: b"\xff" * len(whole),
    "other names": lambda whole: whole.replace(b'"values"', b'"valuez"'),
}


@pytest.mark.parametrize("content", BREAKS.values(), ids=BREAKS)
def test_a_broken_cache_file_is_asked_again(run, asked, tmp_path, content):
    expected = run(StereoSet())
    file = cache_file(tmp_path)
    file.write_bytes(content(file.read_bytes()))

    found = run(StereoSet())
    again = run(StereoSet())

    assert len(asked) == 2
    assert torch.equal(found.values, expected.values)
    assert torch.equal(again.values, expected.values)


def test_an_interrupted_write_leaves_no_cache_file_that_is_read(run, asked, monkeypatch, tmp_path):
    save = suite.save_file

    def interrupted(tensors, file):
        save(tensors, file)
        with pathlib.Path(file).open("r+b") as opened:
            opened.truncate(40)
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(StereoSet())
    assert not list((tmp_path / "cache").glob("*.safetensors"))

    monkeypatch.setattr(suite, "save_file", save)
    run(StereoSet())
    run(StereoSet())

    assert len(asked) == 2
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_without_a_cache_folder_nothing_is_written(lm, data, asked, tmp_path):
    before = sorted(tmp_path.rglob("*"))

    for _ in range(2):
        run_benchmark(StereoSet(), lm.model, lm.tokenizer, data, progress=False)

    assert sorted(tmp_path.rglob("*")) == before
    assert len(asked) == 2


def test_every_refusal_is_one_of_the_package_s_own_errors():
    # The command line makes one line of these, and a traceback of any other.
    assert all(issubclass(e, GradiendError) for e in (DataError, ConfigError, BaseModelError))
