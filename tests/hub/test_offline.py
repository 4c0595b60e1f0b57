"""What was loaded once is loaded again without the Hub."""

import pytest

BASE = "acme/tiny-gpt2"


@pytest.fixture(scope="module")
def offline(reader, reader_home, published, author, person):
    """A process without the Hub, with the cache of one that loaded everything once."""
    author.push_gradiend(published.gradiend, "acme/offline-shards", max_shard_size=20_000)
    reader.gradiend_numbers("acme/gradiend")
    reader.gradiend_numbers("acme/offline-shards")
    for way in ("PeftModel", "load_adapter"):
        reader.logits_with_adapter(way, "acme/gradiend-adapter", BASE)
    reader.logits("acme/gradiend-adapter")
    reader.logits("acme/gradiend-debiased")
    return person("with_package", home=reader_home, HF_HUB_OFFLINE="1")


def test_a_gradiend(hub, offline, published, failed):
    since = len(hub.requests)

    assert offline.gradiend_numbers("acme/gradiend") == published.encodings
    assert offline.gradiend_numbers("acme/offline-shards") == published.encodings
    with pytest.raises(failed):
        offline.gradiend_numbers("acme/never-loaded")
    assert len(hub.requests) == since


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter", "GradiendAdapter"])
def test_an_adapter(hub, offline, published, way):
    since = len(hub.requests)

    logits = offline.logits_with_adapter(way, "acme/gradiend-adapter", BASE)

    assert logits == published.adapter_logits
    assert len(hub.requests) == since


def test_an_adapter_with_its_base_model(offline, published):
    assert offline.logits("acme/gradiend-adapter") == published.adapter_logits


@pytest.mark.parametrize("repo_id", ["acme/gradiend", "acme/offline-shards"])
def test_an_adapter_straight_from_a_gradiend(offline, published, repo_id):
    logits = offline.logits_with_adapter("from_gradiend", repo_id, BASE)

    assert logits == published.adapter_logits


def test_an_edited_model(offline, published):
    assert offline.logits("acme/gradiend-debiased") == published.edited_logits


def test_a_push_is_refused_in_one_line(hub, offline, published, failed):
    with pytest.raises(failed) as caught:
        offline.push_gradiend(published.gradiend, "acme/offline-push")

    assert "OutputError" in caught.value.kinds
    assert caught.value.line == caught.value.message
    assert "acme/offline-push" not in hub.repositories
