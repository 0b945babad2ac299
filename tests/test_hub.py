"""Adapters to the Hugging Face Hub and back, against a stand-in of its API on this machine."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, need, randomise, snapshot, thorough
from hub_stand_in import READ, WRITE, serving

import convlora
from convlora import CheckpointError, StateError, TargetError

need("huggingface_hub.hf_api")
TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
REPO = "clinic/tumour"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the library in this process talks to, with an empty cache and no token."""
    with serving() as server:
        point_to(monkeypatch, server.url, tmp_path / "cache")
        yield server


def point_to(monkeypatch, url, cache):
    """As HF_ENDPOINT and the other variables would have it, had huggingface_hub not been imported yet."""
    for module in ("hf_api", "file_download"):  # imported later, it would copy this stand-in's address and keep it
        importlib.import_module(f"huggingface_hub.{module}")
    set_constant(monkeypatch, "ENDPOINT", url)
    set_constant(monkeypatch, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    set_constant(monkeypatch, "HF_HUB_CACHE", str(cache))
    set_constant(monkeypatch, "HF_TOKEN_PATH", str(cache / "no token"))
    set_constant(monkeypatch, "HF_HUB_DISABLE_XET", True)  # the hub's newer storage, which has a client of its own
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def set_constant(monkeypatch, name, value):
    """In every module of huggingface_hub that has it: older releases import them one by one."""
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "huggingface_hub"]:
        if name in vars(module):
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def tuned(net):
    """A base, and the same with an adapter."""
    base = copy.deepcopy(net)
    randomise(convlora.inject(net, 3))
    return base, net.eval()


def refused(base, message, source=REPO, ending="Nothing was changed.", **arguments):
    """The one error, which leaves the model alone."""
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=message) as caught:
        convlora.load_adapter(base, source, **arguments)
    assert str(caught.value).endswith(ending)
    assert snapshot(base) == before


# ---- the law, in processes of their own, with nothing but environment variables

SCRIPT = """
import sys, torch, convlora
from conftest import SmallNet
torch.manual_seed(0)
model, images = SmallNet(), torch.randn(2, 3, 16, 16)
what, repo, file = sys.argv[1:]
if what == "push":
    torch.manual_seed(1)
    convlora.inject(model, 4, norm="track")
    optimizer = torch.optim.SGD(convlora.trainable_parameters(model), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad(); model.train()(images).square().mean().backward(); optimizer.step()
    print(convlora.push_to_hub(model, repo, metrics={"accuracy": 0.95}, base_model="clinic/small-net"))
    torch.save(model.eval()(images), file)
else:
    convlora.load_adapter(model, repo)
    print(torch.equal(model.eval()(images), torch.load(file)))
"""


def run(what, tmp_path, url, cache, **environment):
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / cache), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    root = Path(convlora.__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, what, REPO, str(tmp_path / "expected")],
        env=keep | ours | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.thorough
def test_pushed_then_loaded_elsewhere_predicts_the_same_bits_and_again_without_the_hub(tmp_path):
    with serving() as server:
        pushed = run("push", tmp_path, server.url, "one", HF_TOKEN=WRITE)
        assert pushed.returncode == 0, pushed.stderr
        commits = list(server.repositories[REPO].commits)
        assert pushed.stdout.strip() == f"{server.url}/{REPO}/commit/{commits[-1]}"
        server.log.clear()
        loaded = run("load", tmp_path, server.url, "another")
        assert loaded.stdout.strip() == "True", loaded.stderr
        assert server.fetched() == [TENSORS, CONFIG]
    again = run("load", tmp_path, server.url, "another")
    assert again.stdout.strip() == "True", again.stderr


# ---- loading


@pytest.mark.parametrize("norm", [thorough("freeze"), "track"])
def test_a_real_network_comes_back_from_the_hub_bit_for_bit(hub, train, norm):
    timm = need("timm")
    torch.manual_seed(0)
    base = timm.create_model("mobilenetv3_small_050", num_classes=3)
    images = torch.randn(2, 3, 64, 64)
    model = convlora.inject(copy.deepcopy(base), 4, norm=norm)
    train(model, images, steps=2)
    convlora.push_to_hub(model, REPO, token=WRITE, base_model="timm/mobilenetv3_small_050")
    assert torch.equal(convlora.load_adapter(base, REPO).eval()(images), model.eval()(images))


def test_all_files_in_one_commit(hub, tuned):
    url = convlora.push_to_hub(tuned[1], REPO, token=WRITE, commit_message="First try")
    repository = hub.repositories[REPO]
    assert repository.messages == ["initial commit", "First try"]
    assert url == f"{hub.url}/{REPO}/commit/{repository.main}"
    files = repository.commits[repository.main]
    assert sorted(files) == [".gitattributes", CARD, CONFIG, TENSORS]
    assert f'convlora.load_adapter(model, "{REPO}")' in files[CARD].decode()


def test_only_the_files_that_are_read_are_downloaded_and_once(hub, tuned, images):
    base, model = tuned
    convlora.push_to_hub(model, REPO, token=WRITE)
    hub.repositories[REPO].commit({"adapter_model.bin": b"pickle", "pytorch_model.bin": b"pickle"}, "more")
    hub.log.clear()
    for _ in range(2):
        loaded = convlora.load_adapter(copy.deepcopy(base), REPO).eval()
        assert torch.equal(loaded(images), model(images))
    assert hub.fetched() == [TENSORS, CONFIG]


def test_a_path_here_comes_before_the_hub(hub, tuned, images, tmp_path, monkeypatch):
    base, model = tuned
    monkeypatch.chdir(tmp_path)
    convlora.save_adapter(model, REPO)
    assert torch.equal(convlora.load_adapter(base, REPO).eval()(images), model(images))
    assert hub.log == []


@pytest.mark.parametrize("source", ["tumour", "./clinic/tumour", "clinic/tumour/best", "clinic/", Path(REPO)])
def test_what_is_no_name_of_a_repository_is_a_path(hub, net, source):
    refused(net, r"adapter_model\.safetensors does not exist", source, ending="")
    assert hub.log == []


def test_an_older_revision_is_the_older_adapter(hub, tuned, images):
    base, model = tuned
    first = convlora.push_to_hub(model, REPO, token=WRITE).rpartition("/")[2]
    expected = model(images)
    randomise(model, seed=2)
    convlora.push_to_hub(model, REPO, token=WRITE)
    for revision, output in ((first, expected), (None, model(images)), ("main", model(images))):
        loaded = convlora.load_adapter(copy.deepcopy(base), REPO, revision=revision)
        assert torch.equal(loaded.eval()(images), output)
    assert not torch.equal(expected, model(images))


def test_both_files_are_of_one_commit_though_the_branch_moves_in_between(hub, tuned, tmp_path):
    base, model = tuned
    convlora.push_to_hub(model, REPO, token=WRITE)
    repository = hub.repositories[REPO]
    pushed = repository.main
    hub.moves_on = {CONFIG: b"another's"}
    convlora.load_adapter(base, REPO)
    assert repository.main != pushed  # it did move
    snapshots = tmp_path / "cache" / "models--clinic--tumour" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [pushed]
    assert (snapshots / pushed / CONFIG).read_bytes() == repository.commits[pushed][CONFIG]


def test_without_a_config_the_tensors_suffice(hub, tuned, images, tmp_path):
    base, model = tuned
    convlora.save_adapter(model, tmp_path / "here")
    hub.create(REPO, {TENSORS: (tmp_path / "here" / TENSORS).read_bytes()})
    assert torch.equal(convlora.load_adapter(base, REPO).eval()(images), model(images))


def test_a_private_repository_opens_to_its_token_alone(hub, tuned, images):
    base, model = tuned
    convlora.push_to_hub(model, REPO, token=WRITE, private=True)
    assert hub.repositories[REPO].private
    refused(base, r"not a local path, and .* no such repository, or it is private: .*token=.*hf auth login")
    refused(base, r"cannot be read .*token=", token="hf_made_up")
    assert torch.equal(convlora.load_adapter(base, REPO, token=READ).eval()(images), model(images))


def test_neither_a_path_nor_a_repository(hub, net):
    refused(net, rf"{REPO} is not a local path, and on the Hugging Face Hub \({hub.url}\) there is no such repository")
    refused(net, r"there is no such repository", token=READ)


def test_gated(hub, net):
    hub.create(REPO, gated=True)
    refused(net, r"is gated: ask for access on its page, then give token=")


def test_a_token_for_other_repositories(hub, net):
    hub.create(REPO, closed=True)
    refused(net, r"cannot be read \(.*Your token is not for this repository.*give token=", token=READ)


def test_no_such_revision(hub, net):
    hub.create(REPO)
    refused(net, r"has no revision 'v2'", revision="v2")


def test_a_repository_without_an_adapter_says_what_is_there(hub, net):
    hub.create(REPO, {"model.safetensors": b"", "config.json": b"{}"})
    refused(net, r"holds no adapter_model\.safetensors; there is \.gitattributes, config\.json, model\.safetensors\.")
    hub.create(REPO, {f"file{n}": b"" for n in range(9)})
    refused(net, r"file6, 2 more\.")


def test_a_damaged_download_is_refused_as_a_damaged_file_is(hub, net):
    hub.create(REPO, {TENSORS: b"not this"})
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        convlora.load_adapter(net, REPO)


def test_a_name_that_the_hub_forbids(hub, net):
    refused(net, r"a--b/c is not a local path, and .*cannot be read \(.*a--b/c", "a--b/c")


def test_another_base_is_refused_as_from_a_path(hub, tuned):
    convlora.push_to_hub(tuned[1], REPO, token=WRITE)
    with pytest.raises(CheckpointError, match=r"(?s)fc\.weight: \(3, 12\) in the file, \(5, 12\) in the model"):
        convlora.load_adapter(SmallNet(5), REPO)


def test_revision_of_a_path(net, tmp_path):
    refused(net, r"revision='v2' is for a repository on the hub, and .* is a local path", tmp_path, revision="v2")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://hub.invalid"])  # nobody listens; no such name
def test_without_a_network(net, tuned, monkeypatch, tmp_path, url):
    point_to(monkeypatch, url, tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries several times
    refused(net, rf"not in the cache, and .*\({url}\) cannot be reached \(.+\).*hf download {REPO}")
    with pytest.raises(CheckpointError, match=rf"cannot be reached \(.+\).*hf upload {REPO}.*Nothing was uploaded\.$"):
        convlora.push_to_hub(tuned[1], REPO, token=WRITE)


def test_offline_mode_serves_what_is_in_the_cache_and_says_what_to_do_about_the_rest(hub, tuned, images, monkeypatch):
    base, model = tuned
    convlora.push_to_hub(model, REPO, token=WRITE)
    convlora.load_adapter(copy.deepcopy(base), REPO)
    hub.log.clear()
    set_constant(monkeypatch, "HF_HUB_OFFLINE", True)
    how = rf"offline mode is enabled.*HF_HUB_OFFLINE.*run `hf download clinic/b {TENSORS} {CONFIG} --local-dir adapter`"
    refused(base, rf"clinic/b is not a local path and not in the cache, .* cannot be reached \(.*{how}", "clinic/b")
    with pytest.raises(CheckpointError, match=r"cannot be reached \(.*HF_HUB_OFFLINE.*Nothing was uploaded"):
        convlora.push_to_hub(model, REPO, token=WRITE)
    assert torch.equal(convlora.load_adapter(base, REPO).eval()(images), model(images))
    assert hub.log == []


def test_without_huggingface_hub(tuned, monkeypatch):
    base, model = tuned
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(base, r"not a local path; to look for it .*huggingface_hub is needed: pip install 'convlora\[hub\]'")
    with pytest.raises(CheckpointError, match=r"to push, huggingface_hub is needed: pip install 'convlora\[hub\]'"):
        convlora.push_to_hub(model, REPO)


# ---- pushing


@pytest.mark.parametrize(
    "token, message", [(False, "may not be written .*token="), (READ, "may not be written .*rights to write here")]
)
def test_who_may_not_write_is_told(hub, tuned, token, message):
    hub.create(REPO)
    with pytest.raises(CheckpointError, match=message) as caught:
        convlora.push_to_hub(tuned[1], REPO, token=token)
    assert str(caught.value).endswith("Nothing was uploaded.") and READ not in str(caught.value)
    assert len(hub.repositories[REPO].commits) == 1


def test_private_is_never_published(hub, tuned):
    hub.create(REPO)
    with pytest.raises(CheckpointError, match=r"exists already and is public, which private=True does not change"):
        convlora.push_to_hub(tuned[1], REPO, token=WRITE, private=True)
    assert len(hub.repositories[REPO].commits) == 1


def test_own_card_is_replaced_and_an_edited_one_is_left(hub, tuned):
    model = tuned[1]
    convlora.push_to_hub(model, REPO, token=WRITE)
    convlora.push_to_hub(model, REPO, token=WRITE, metrics={"accuracy": 0.5})
    repository = hub.repositories[REPO]
    card = repository.commits[repository.main][CARD]
    assert b"accuracy" in card
    edited = card.replace(b"## Use", b"## How we use it")
    repository.commit({CARD: edited}, "edited")
    randomise(model, seed=2)
    with pytest.warns(UserWarning, match=rf"README\.md of {REPO} was edited.*is kept") as caught:
        convlora.push_to_hub(model, REPO, token=WRITE)
    assert caught[0].filename == __file__
    now = repository.commits[repository.main]
    assert now[CARD] == edited and now[TENSORS] != repository.commits[list(repository.commits)[-2]][TENSORS]


def test_another_adapter_by_name(hub, tuned):
    model = convlora.set_adapter(convlora.add_adapter(tuned[1], "stain", rank=2), "stain")
    randomise(model)
    convlora.push_to_hub(model, REPO, token=WRITE, adapter_name="stain")
    repository = hub.repositories[REPO]
    assert b"LoRA adapter stain for SmallNet" in repository.commits[repository.main][CARD]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"repo_id": "tumour"}, r"repo_id='tumour'; it must be 'user/repo'"),
        ({"repo_id": "https://huggingface.co/clinic/tumour"}, r"it must be 'user/repo'"),
        ({"repo_id": None}, r"repo_id=None"),
        ({"commit_message": ""}, r"commit_message is empty"),
        ({"metrics": {"accuracy": float("nan")}}, r"metrics\['accuracy'\]=nan"),
        ({"base_model": "my model"}, r"base_model='my model'"),
    ],
)
def test_wrong_arguments_are_refused_before_the_hub_is_asked(hub, tuned, arguments, message):
    with pytest.raises(TargetError, match=message):
        convlora.push_to_hub(tuned[1], **({"repo_id": REPO, "token": WRITE} | arguments))
    assert hub.log == []


def test_a_plain_model_is_refused_before_the_hub_is_asked(hub, net):
    with pytest.raises(StateError, match="carries no adapter"):
        convlora.push_to_hub(net, REPO, token=WRITE)
    assert hub.log == []


def test_an_untrained_adapter_warns_where_the_user_pushed_it(hub, net):
    convlora.inject(net)
    with pytest.warns(UserWarning, match=r"every lora_B is zero") as caught:
        convlora.push_to_hub(net, REPO, token=WRITE)
    assert caught[0].filename == __file__
