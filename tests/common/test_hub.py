import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from imgen_common import hub
from imgen_common.errors import UserError


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.zeros(3, 4)}, path)


def transformers_folder(folder: Path) -> Path:
    write_json(folder / "config.json", {"model_type": "clip"})
    write_weights(folder / "model.safetensors")
    return folder


def diffusers_folder(folder: Path) -> Path:
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "image_encoder": [None, None],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", {})
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    write_json(folder / "transformer" / "config.json", {})
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def sharded_folder(folder: Path) -> Path:
    write_json(folder / "config.json", {})
    write_json(
        folder / "model.safetensors.index.json", {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    )
    write_weights(folder / "one.safetensors")
    write_weights(folder / "two.safetensors")
    return folder


def lora_folder(folder: Path) -> Path:
    write_json(folder / "adapter_config.json", {})
    write_weights(folder / "adapter_model.safetensors")
    return folder


WHOLE = [transformers_folder, diffusers_folder, sharded_folder, lora_folder]


@pytest.mark.parametrize("make", WHOLE)
def test_a_whole_folder_resolves_to_itself(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    assert hub.resolve(str(folder)) == folder


@pytest.mark.parametrize("make", WHOLE)
def test_any_file_missing_or_cut_is_noticed(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    optional = {"adapter_config.json", "model_index.json", "model.safetensors.index.json"}
    for file in [file for file in folder.rglob("*") if file.is_file() and file.name not in optional]:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(UserError, match=str(folder)):
            hub.resolve(str(folder))
        file.write_bytes(content[: len(content) // 2])
        if file.suffix == ".safetensors" or file.name == "config.json":
            with pytest.raises(UserError, match=r"half-downloaded.*download or copy it again"):
                hub.resolve(str(folder))
        file.write_bytes(content)
    hub.check_folder(folder)


def test_an_unfinished_download_is_noticed(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "abc.incomplete").touch()
    with pytest.raises(UserError, match=r"abc\.incomplete is an unfinished download"):
        hub.resolve(str(folder))


def test_a_git_lfs_pointer_is_no_model(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    (folder / "model.safetensors").write_text("version x\noid sha256:123\nsize 12345\n")
    with pytest.raises(UserError, match="cut short or not a safetensors file"):
        hub.resolve(str(folder))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert them to safetensors"):
        hub.resolve(str(folder))
    with pytest.raises(UserError, match="safetensors files"):
        hub.resolve(str(folder / "pytorch_model.bin"))


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        hub.resolve(str(tmp_path))


def test_a_lora_file_resolves(tmp_path: Path) -> None:
    write_weights(tmp_path / "lora.safetensors")
    assert hub.resolve(str(tmp_path / "lora.safetensors"), single_file=True) == tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match=r"is a single file; give a model folder.*from_single_file"):
        hub.resolve(str(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("ref", ["./none", "/none/at/all", "~/none", "none", "a/b/c", "org/name@", ""])
def test_what_is_neither_path_nor_repository_is_refused(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"no such folder|not a model folder"):
        hub.resolve(ref)


def test_builtin_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path)
    folder = diffusers_folder(tmp_path / "generator")
    assert hub.resolve("builtin:shapes/generator") == folder
    assert hub.prefetch("builtin:shapes/generator") == folder
    with pytest.raises(UserError, match="did you mean 'builtin:shapes/generator'"):
        hub.resolve("builtin:shapes/genrator")
    with pytest.raises(UserError, match="unknown model"):
        hub.resolve("builtin:shapes/../generator")


class FakeHub:
    """A hub whose one repository is a folder; it records what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo} | options)
        if repo != "org/name":
            raise LocalEntryNotFoundError("not there\nand more")
        return str(self.folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot")
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_a_repository_is_fetched_without_pickles(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    transformers_folder(fake.folder)
    assert hub.prefetch("org/name@v1.0") == fake.folder
    assert {call["revision"] for call in fake.calls} == {"v1.0"}
    assert not any(call["local_files_only"] for call in fake.calls)
    assert set(fake.calls[-1]["allow_patterns"]) == {"model_index.json", *hub.HUB_FILES}
    assert not any("bin" in pattern or "pt" in pattern.split(".") for pattern in fake.calls[-1]["allow_patterns"])


def test_a_pipeline_is_fetched_by_component(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    diffusers_folder(fake.folder)
    assert hub.resolve("org/name") == fake.folder
    patterns = fake.calls[-1]["allow_patterns"]
    assert "transformer/*.safetensors" in patterns
    assert "*.safetensors" not in patterns
    assert not any(pattern.startswith("image_encoder/") for pattern in patterns)


def test_a_description_is_fetched_without_weights(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (transformers_folder(fake.folder) / "model.safetensors").unlink()
    assert hub.resolve("org/name", weights=False) == fake.folder
    assert not any("safetensors" in pattern for pattern in fake.calls[-1]["allow_patterns"])
    (fake.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        hub.resolve("org/name", weights=False)


def test_offline_asks_the_cache_only_and_says_what_to_run(fake: FakeHub) -> None:
    transformers_folder(fake.folder)
    hub.resolve("org/name")
    assert all(call["local_files_only"] for call in fake.calls)
    assert hub.prefetch("org/name") == fake.folder
    for ask in (hub.resolve, hub.prefetch):
        with pytest.raises(UserError, match=r"`interleave prefetch org/other@main` with a network and without HF_HUB"):
            ask("org/other@main")


def test_half_a_snapshot_says_what_to_run(fake: FakeHub) -> None:
    (transformers_folder(fake.folder) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="flowbp prefetch org/name"):
        hub.resolve("org/name")


def test_a_folder_wins_over_a_repository(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers_folder(tmp_path / "org" / "name")
    assert hub.resolve("org/name") == Path("org/name")
    assert fake.calls == []
