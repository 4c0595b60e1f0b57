"""What lies in an adapter's folder, packed indices, and the bits of an edited weight."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_gradiend import GradiendAdapter
from hf_gradiend.edits import EditedWeight, Update
from hf_gradiend.errors import OutputError
from hf_gradiend.parameters import pack_indices, unpack_indices


@pytest.mark.parametrize("every", [None, 7], ids=["dense", "sparse"])
def test_a_file_has_the_keys_that_peft_expects(tiny_llama, make_gradiend, saved, tmp_path, every):
    gradiend = make_gradiend(tiny_llama, every=every)
    tensors = load_file(saved(gradiend, tmp_path) / "adapter_model.safetensors")

    module = "base_model.model.model.layers.0.mlp.up_proj.gradiend."
    kinds = ["decoder_bias", "decoder_weight"] + (["index_gaps"] if every else [])
    own = sorted(key for key in tensors if key.startswith(module))
    assert own == sorted(f"{module}gradiend_{kind}.weight" for kind in kinds)
    assert len(tensors) == len(kinds) * len(gradiend.names)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tensors[f"{module}gradiend_decoder_weight.weight"]
    assert torch.equal(weight, gradiend.decoder.weight.at(name))


def test_the_configuration_is_json_that_names_its_origin(
    tiny_llama, make_gradiend, saved, tmp_path
):
    gradiend = make_gradiend(
        tiny_llama, every=7, base_model_name_or_path="org/base", base_model_revision="abc",
        feature_classes=[["F", "M"]],
    )  # fmt: skip
    gradiend.save_pretrained(tmp_path / "gradiend")
    again = type(gradiend).from_pretrained(tmp_path / "gradiend")

    folder = saved(again, tmp_path / "adapter", strength=0.5)
    content = json.loads((folder / "adapter_config.json").read_text())

    assert content["peft_type"] == "GRADIEND"
    assert content["base_model_name_or_path"] == "org/base"
    assert content["revision"] == "abc"
    assert content["feature_classes"] == [["F", "M"]]
    assert content["strength"] == 0.5
    assert content["gradiend_name_or_path"] == str(tmp_path / "gradiend")
    assert len(content["selection_fingerprint"]) == 64
    assert [entry["name"] for entry in content["parameters"]] == gradiend.names
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_loaded_adapter_is_saved_again_bit_for_bit(tiny_llama, make_gradiend, saved, tmp_path):
    folder = saved(make_gradiend(tiny_llama, every=7), tmp_path / "first", dtype=torch.bfloat16)

    GradiendAdapter.from_pretrained(folder).save_pretrained(tmp_path / "second")

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_an_adapter_is_saved_over_the_folder_that_it_reads(
    tiny_llama, make_gradiend, saved, tmp_path
):
    folder = saved(make_gradiend(tiny_llama), tmp_path)
    before = load_file(folder / "adapter_model.safetensors")

    GradiendAdapter.from_pretrained(folder).save_pretrained(folder)

    after = load_file(folder / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_fixed_feature_factor_halves_the_file(tiny_llama, make_gradiend, saved, tmp_path):
    gradiend = make_gradiend(tiny_llama)
    sizes = {}
    for adjustable in (True, False):
        folder = saved(gradiend, tmp_path / str(adjustable), adjustable=adjustable)
        tensors = load_file(folder / "adapter_model.safetensors")
        sizes[adjustable] = sum(tensor.nbytes for tensor in tensors.values())

    assert sizes[True] == 2 * sizes[False]


def test_a_folder_that_cannot_be_written_is_refused(tiny_llama, make_gradiend, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="cannot be written"):
        make_gradiend(tiny_llama).to_adapter().save_pretrained(tmp_path / "file" / "folder")


# ---- indices as bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "packed"),
    [
        ([], []),
        ([0], [0]),
        ([254], [254]),
        ([255], [255, 0]),
        ([256], [255, 1]),
        ([509], [255, 254]),
        ([510], [255, 255, 0]),
        ([0, 1, 2], [0, 0, 0]),
        ([3, 4, 260], [3, 0, 255, 0]),
    ],
    ids=str,
)
def test_packed_indices_are_gaps_in_bytes(indices, packed):
    ours = pack_indices(torch.tensor(indices, dtype=torch.int64))

    assert ours.dtype == torch.uint8
    assert ours.tolist() == packed
    back = unpack_indices(ours)
    assert back.dtype == torch.int64
    assert back.tolist() == indices


@pytest.mark.parametrize("density", [0.9, 0.1, 0.01, 0.0005])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_come_back_from_their_bytes(density, dtype):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(300_000, generator=generator) < density
    indices = kept.nonzero().squeeze(-1).to(dtype)

    packed = pack_indices(indices)

    assert torch.equal(unpack_indices(packed), indices.long())
    assert len(packed) < (1.2 if density >= 0.01 else 10) * len(indices)


def test_gaps_of_millions_come_back():
    indices = torch.tensor([5, 2**24, 2**24 + 9, 2**25])

    assert torch.equal(unpack_indices(pack_indices(indices)), indices)


# ---- the bits of an edited weight ----------------------------------------------------------------

INDICES = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def edited_weight(weight, sparse):
    indices = torch.arange(0, weight.numel(), 3) if sparse else None
    size = weight.numel() if indices is None else len(indices)
    edit = EditedWeight(weight, indices)
    edit.write([Update(None, torch.linspace(-1, 1, size), (), 0.5)])
    return edit


@INDICES
def test_a_weight_that_nobody_else_changed_keeps_its_original_bits(sparse):
    weight = torch.nn.Parameter(torch.randn(40, 50).to(torch.bfloat16))
    before = weight.detach().clone()
    edit = edited_weight(weight, sparse)
    assert not torch.equal(weight, before)

    edit.absorb_changes()
    edit.restore()

    assert torch.equal(weight, before)


@INDICES
@pytest.mark.parametrize("inplace", ["no_grad", "data"])
@pytest.mark.parametrize("positions", [slice(None), slice(7, 8), slice(-2, -1)], ids=str)
def test_a_change_by_others_is_taken_into_the_original(sparse, inplace, positions):
    # A LoRA's merge writes to `.data`, which torch does not count as a change.
    weight = torch.nn.Parameter(torch.randn(40, 50))
    before = weight.detach().clone()
    change = torch.zeros_like(before)
    change.view(-1)[positions] = 0.25
    edit = edited_weight(weight, sparse)
    if inplace == "data":
        weight.data += change
    else:
        with torch.no_grad():
            weight += change

    edit.absorb_changes()
    edit.restore()

    torch.testing.assert_close(weight.detach(), before + change, atol=1e-6, rtol=0)


@INDICES
def test_a_weight_that_is_not_contiguous_is_edited_and_restored(sparse):
    weight = torch.nn.Parameter(torch.randn(50, 40).T)
    before = weight.detach().clone()
    assert not weight.is_contiguous()

    edit = edited_weight(weight, sparse)

    size = 2000 if not sparse else len(torch.arange(0, 2000, 3))
    expected = before.reshape(-1).clone()
    expected[:: 3 if sparse else 1] += torch.linspace(-1, 1, size) * 0.5
    assert torch.equal(weight.detach().reshape(-1), expected)
    edit.restore()
    assert torch.equal(weight, before)
