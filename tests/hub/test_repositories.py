"""Private repositories, branches, pull requests, repeated and interrupted pushes."""

import json
import subprocess
import sys

import pytest

BASE = "acme/tiny-gpt2"
PUSHES = ("push_gradiend", "push_adapter", "push_debiased")


@pytest.fixture
def push(author, work):
    """Function of one of `PUSHES` and a repository that pushes with report and card."""

    def push(verb, repo_id, **options):
        place = {
            "push_gradiend": (work.gradiend,),
            "push_adapter": (work.adapter,),
            "push_debiased": (work.gradiend, BASE),
        }[verb]
        return getattr(author, verb)(*place, repo_id, report=work.report, **options)

    return push


def weights_of(files):
    return {name for name in files if name.endswith(".safetensors")}


# ---- who may see it ----


def test_a_private_gradiend_is_loaded_with_the_token_alone(hub, push, reader, work, failed):
    push("push_gradiend", "acme/private", private=True)

    assert hub["acme/private"].private
    for token in (False, "hf_reader"):
        with pytest.raises(failed) as caught:
            reader.gradiend_numbers("acme/private", token=token)
        assert "OSError" in caught.value.kinds
        assert "acme/private" in caught.value.line
    assert reader.gradiend_numbers("acme/private", token="hf_test_user") == work.encodings
    assert reader.gradiend_numbers("acme/private") == work.encodings


def test_a_private_adapter_is_loaded_with_the_token_alone(hub, push, reader, work, failed):
    push("push_adapter", "acme/private-adapter", private=True)

    assert hub["acme/private-adapter"].private
    with pytest.raises(failed) as caught:
        reader.logits_with_adapter("GradiendAdapter", "acme/private-adapter", BASE, token=False)
    assert "ConfigError" in caught.value.kinds
    assert caught.value.line == caught.value.message
    assert "acme/private-adapter" in caught.value.line
    numbers = reader.logits_with_adapter("GradiendAdapter", "acme/private-adapter", BASE)
    assert numbers == work.adapter_logits


def test_a_private_gradiend_is_read_straight_with_the_token_alone(push, reader, work, failed):
    push("push_gradiend", "acme/private-straight", private=True)

    with pytest.raises(failed) as caught:
        reader.logits_with_adapter("from_gradiend", "acme/private-straight", BASE, token=False)
    assert "ConfigError" in caught.value.kinds
    assert caught.value.line == caught.value.message
    numbers = reader.logits_with_adapter("from_gradiend", "acme/private-straight", BASE)
    assert numbers == work.adapter_logits


def test_a_public_repository_is_the_default(hub, published):
    assert published
    assert not any(hub[name].private for name in ("acme/gradiend", "acme/gradiend-adapter"))


# ---- branches and pull requests ----


@pytest.mark.parametrize("verb", PUSHES)
def test_a_branch_leaves_main_as_it_is(hub, push, verb):
    repo_id = f"acme/branch-{verb}"
    told = push(verb, repo_id, revision="variant")

    repository = hub[repo_id]
    assert set(repository.branches) == {"main", "variant"}
    assert repository.branches["variant"] == told["commit"]
    assert set(repository.files()) == {".gitattributes"}
    assert weights_of(repository.files("variant"))
    push(verb, repo_id, revision="variant", commit_message="Again")  # the branch is there now
    assert repository.branches["variant"] == told["commit"]


def test_a_branch_is_loaded_by_its_name(push, reader, work, failed):
    push("push_gradiend", "acme/branches", revision="variant")

    assert reader.gradiend_numbers("acme/branches", revision="variant") == work.encodings
    with pytest.raises(failed):
        reader.gradiend_numbers("acme/branches")


@pytest.mark.parametrize("verb", PUSHES)
def test_a_pull_request_leaves_main_as_it_is(hub, push, verb):
    repo_id = f"acme/pr-{verb}"
    push(verb, repo_id)
    before = dict(hub[repo_id].branches)
    report = json.loads(hub[repo_id].files()["report.json"])

    told = push(verb, repo_id, create_pr=True)  # nothing to change: no pull request either
    assert told["pull_request"] is None
    assert hub[repo_id].branches == before

    hub[repo_id].commit("main", {}, "emptied", "tester")
    before = dict(hub[repo_id].branches)
    told = push(verb, repo_id, create_pr=True, commit_message="Please")
    assert told["pull_request"] == f"{hub.url}/{repo_id}/discussions/1"
    assert hub[repo_id].branches == {**before, "refs/pr/1": told["commit"]}
    assert hub[repo_id].commits[told["commit"]].title == "Please"
    assert json.loads(hub[repo_id].files("refs/pr/1")["report.json"]) == report


def test_the_command_line_opens_a_pull_request(hub, author, push, work):
    push("push_gradiend", "acme/pr-cli", changed=True)
    before = dict(hub["acme/pr-cli"].branches)

    code, out, err = author.command_line(
        "push", "--kind", "gradiend", "--folder", work.gradiend, "--repo_id", "acme/pr-cli",
        "--create_pr", "--private",
    )  # fmt: skip

    assert code == 0, err
    assert out.strip() == f"Pushed to {hub.url}/acme/pr-cli/discussions/1"
    assert before == {"main": hub["acme/pr-cli"].branches["main"]}
    assert not hub["acme/pr-cli"].private  # --private is for new repositories


# ---- again ----


@pytest.mark.parametrize("verb", PUSHES)
def test_the_same_again_makes_no_commit(hub, push, verb):
    repo_id = f"acme/again-{verb}"
    first = push(verb, repo_id)
    state = hub[repo_id].state()

    again = push(verb, repo_id)

    assert again == first
    assert hub[repo_id].state() == state
    assert len(hub[repo_id].commits) == 2  # the control: the first push was one commit


def test_a_push_without_report_leaves_card_and_report(hub, push, author, work):
    push("push_gradiend", "acme/keeps-card")
    before = hub["acme/keeps-card"].files()

    author.push_gradiend(work.gradiend, "acme/keeps-card", changed=True)

    after = hub["acme/keeps-card"].files()
    assert after["model.safetensors"] != before["model.safetensors"]  # the control
    assert after["README.md"] == before["README.md"]
    assert after["report.json"] == before["report.json"]


@pytest.mark.parametrize("verb", ["push_gradiend", "push_debiased"])
def test_another_shard_size_leaves_no_stale_shards_and_no_code(hub, push, verb, reader, work):
    repo_id = f"acme/restarded-{verb}"
    code = {"include_code": True} if verb == "push_gradiend" else {}
    push(verb, repo_id, max_shard_size=20_000, **code)
    small = hub[repo_id].files()
    assert len(weights_of(small)) > 2
    assert "model.safetensors.index.json" in small
    assert ("modeling_gradiend.py" in small) == bool(code)

    push(verb, repo_id, max_shard_size=30_000)
    assert 1 < len(weights_of(hub[repo_id].files())) < len(weights_of(small))
    push(verb, repo_id)

    whole = hub[repo_id].files()
    assert weights_of(whole) == {"model.safetensors"}
    assert not {"model.safetensors.index.json", "modeling_gradiend.py"} & whole.keys()
    if verb == "push_gradiend":
        assert reader.gradiend_numbers(repo_id) == work.encodings
    else:
        assert reader.logits(repo_id) == work.edited_logits


@pytest.mark.parametrize("verb", PUSHES)
def test_other_peoples_files_stay(hub, push, verb):
    repo_id = f"acme/others-{verb}"
    theirs = {
        "notes.md": b"mine",
        "data/table.csv": b"1,2",
        "adapter/adapter_model.safetensors": b"an adapter in a folder",
        "models.safetensors": b"other weights",
        "picture.png": b"\x89PNG",
    }
    hub.plant(repo_id, theirs)

    push(verb, repo_id)

    after = hub[repo_id].files()
    assert theirs.items() <= after.items()
    assert len(after) > len(theirs) + 2  # the control


def test_a_bare_name_is_the_users_own(hub, author, work):
    told = author.push_gradiend(work.gradiend, "bare", report=work.report)

    assert told["commit"] == hub["tester/bare"].branches["main"]
    assert b'from_pretrained("tester/bare")' in hub["tester/bare"].files()["README.md"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("push_gradiend", "push_adapter"), ("push_adapter", "push_gradiend"),
     ("push_adapter", "push_debiased")],
)  # fmt: skip
def test_one_repository_holds_one_kind(hub, push, failed, first, second):
    """Weights of one kind with the other's configuration would be loaded as neither."""
    repo_id = f"acme/{first}-then-{second}".replace("push_", "")
    push(first, repo_id)
    state = hub[repo_id].state()

    with pytest.raises(failed) as caught:
        push(second, repo_id)

    assert "ConfigError" in caught.value.kinds
    assert repo_id in caught.value.line
    assert hub[repo_id].state() == state


# ---- interrupted ----


def drop():
    raise ConnectionResetError


@pytest.mark.parametrize("verb", PUSHES)
def test_a_lost_connection_leaves_the_repository_as_it_was(hub, push, failed, verb):
    repo_id = f"acme/lost-{verb}"
    hub.plant(repo_id, {"notes.md": b"mine", "model.safetensors": b"earlier"})
    hub.lfs.clear()  # or weights that another test has pushed would not be sent
    repository = hub[repo_id]
    state, since = repository.state(), len(hub.requests)
    hub.before("POST", f"{repo_id}/commit/", drop)

    with pytest.raises(failed) as caught:
        push(verb, repo_id)

    assert any(r.path.startswith("/lfs/") and r.status == 200 for r in hub.requests[since:])
    assert repository.state() == state
    assert "OutputError" in caught.value.kinds
    assert caught.value.line == caught.value.message
    assert repo_id in caught.value.line

    push(verb, repo_id)  # the control: the same push, with a connection, changes it
    assert repository.state() != state


def test_a_refused_upload_is_one_clear_line(hub, author, work, failed):
    """Hub and storage are two places: what the second one says comes as a RuntimeError."""
    hub.refuse("PUT", "/lfs/", 400, "The bucket is full.")
    hub.lfs.clear()

    with pytest.raises(failed) as caught:
        author.push_gradiend(work.gradiend, "acme/full", changed=True)

    assert "OutputError" in caught.value.kinds
    assert caught.value.line == caught.value.message
    assert set(hub["acme/full"].files()) == {".gitattributes"}


def test_an_ended_process_leaves_the_repository_as_it_was(hub, environment, reader, work, push):
    push("push_gradiend", "acme/ended", changed=True)
    numbers = reader.gradiend_numbers("acme/ended")
    repository = hub["acme/ended"]
    state, files = repository.state(), repository.files()
    hub.lfs.clear()
    process = subprocess.Popen(
        [sys.executable, "-c", "from hf_gradiend.cli import main; raise SystemExit(main())",
         "push", "--kind", "gradiend", "--folder", work.gradiend, "--repo_id", "acme/ended"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    hub.before("POST", "/lfs-verify", process.kill)

    out, _ = process.communicate(timeout=60)

    assert process.returncode == -9, out
    assert hub.lfs  # the control: the weights had been sent
    assert repository.state() == state
    assert repository.files() == files
    assert reader.gradiend_numbers("acme/ended") == numbers != work.encodings
