import contextlib
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from imgen_common import hub
from imgen_common.errors import UserError, quoted
from imgen_common.run_folder.data import hash_adapter, hash_model
from imgen_common.weights import check_file, loading, weight_files


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
    (folder / "tokenizer" / "spiece.model").write_bytes(bytes(32))
    write_json(folder / "transformer" / "config.json", {"_class_name": "Flux2Transformer2DModel"})
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
    assert hub.resolve(str(folder), single_file=make is lora_folder) == folder


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an adapter; give the model it was trained on"):
        hub.resolve(str(lora_folder(tmp_path)))


def test_a_model_with_an_adapter_beside_it_is_refused(tmp_path: Path) -> None:
    """transformers would put the adapter on the weights, which may have it already."""
    folder = transformers_folder(tmp_path / "merged")
    write_json(folder / "adapter_config.json", {"r": 2})
    write_weights(folder / "adapter_model.safetensors")
    for check in (hub.resolve, lambda ref: weight_files(Path(ref))):
        with pytest.raises(UserError, match=r"merged: holds a model and an adapter \(adapter_config\.json\); move"):
            check(str(folder))
    (folder / "model.safetensors").unlink()  # some adapters have the configuration of their model
    assert hub.resolve(str(folder), single_file=True) == folder


@pytest.mark.parametrize("name", ["modules.json", "results.json"])  # of sentence-transformers, of an evaluation
def test_a_list_beside_a_model_is_no_damage(tmp_path: Path, name: str) -> None:
    folder = transformers_folder(tmp_path / "clip")
    write_json(folder / name, [{"idx": 0, "path": "", "type": "sentence_transformers.models.CLIPModel"}])
    assert hub.resolve(str(folder)) == folder


def test_hashes_hold_the_head_of_a_reward_and_the_description_of_an_adapter(tmp_path: Path) -> None:
    folder, adapter = transformers_folder(tmp_path / "reward"), tmp_path / "adapter_model.safetensors"
    write_weights(folder / "head.safetensors")
    write_weights(adapter)
    write_json(tmp_path / "adapter_config.json", {"lora_alpha": 8})
    before = hash_model("x", str(folder)) | hash_adapter("y", adapter)
    save_file({"w": torch.ones(3, 4)}, folder / "head.safetensors")
    write_json(tmp_path / "adapter_config.json", {"lora_alpha": 64})
    now = hash_model("x", str(folder)) | hash_adapter("y", adapter)
    assert {key for key in now if now[key] != before[key]} == {"the head of x", "the configuration of y"}


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


@pytest.mark.parametrize("place", ["tokenizer", "."])
@pytest.mark.parametrize("names", [[], ["vocab.json"], ["merges.txt", "chat_template.jinja"]])
def test_a_tokenizer_without_a_vocabulary_is_noticed(place: str, names: list[str], tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path) if place == "tokenizer" else transformers_folder(tmp_path)
    write_json(folder / place / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    (folder / place / "spiece.model").unlink(missing_ok=True)
    for name in names:
        write_json(folder / place / name, {})
    with pytest.raises(UserError, match=r"has no vocabulary \(tokenizer\.json or vocab\.json and merges\.txt or"):
        hub.resolve(str(folder), weights=False)
    write_json(folder / place / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    hub.resolve(str(folder))


@pytest.mark.parametrize(
    "names",
    [["vocab.json", "merges.txt"], ["spiece.model", "tokenizer.json"], ["tokenizer.json"], ["vocab.txt"]],
)
def test_vocabularies_of_published_folders_pass(names: list[str], tmp_path: Path) -> None:
    for folder, place in ((diffusers_folder(tmp_path / "a"), "tokenizer"), (transformers_folder(tmp_path / "b"), ".")):
        write_json(folder / place / "tokenizer_config.json", {})
        (folder / place / "spiece.model").unlink(missing_ok=True)
        for name in names:
            write_json(folder / place / name, {"<unk>": 0, "a": 1})
        hub.check_folder(folder)


@pytest.mark.parametrize("place", [".", "tokenizer"])
@pytest.mark.parametrize(
    ("length", "said"),
    [("77", r'"77"'), (0, "0"), (-1, "-1"), (True, "true"), ([77], r"\[77\]"), (float("nan"), "NaN")],
)
def test_a_tokenizer_of_no_length_is_refused(place: str, length: object, said: str, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path) if place == "tokenizer" else transformers_folder(tmp_path)
    (folder / place / "spiece.model").write_bytes(bytes(32))
    for good in (77, 1e30, int(1e30), None):
        write_json(folder / place / "tokenizer_config.json", {"model_max_length": good})
        hub.resolve(str(folder))
    write_json(folder / place / "tokenizer_config.json", {"model_max_length": length})
    with pytest.raises(UserError, match=rf"tokenizer_config.json: model_max_length {said}: must be a number of tokens"):
        hub.resolve(str(folder), weights=False)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{}"},
        {"vocab.json": "{}", "merges.txt": "#version: 0.2\n"},
        {"vocab.json": json.dumps({"a": 0, "b": 1, "ab": 2}), "merges.txt": ""},
        {"vocab.txt": ""},
        {"spiece.model": ""},
    ],
)
def test_a_vocabulary_without_words_is_none(files: dict[str, str], tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError, match="has no vocabulary"):
        hub.resolve(str(folder))


@pytest.mark.parametrize("name", ["._model.safetensors", "._config.json", "._model.safetensors.index.json"])
def test_files_that_other_systems_leave_are_left_alone(name: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    (folder / name).write_bytes(b"\0\5\26\7Mac OS X")
    assert hub.resolve(str(folder)) == folder
    assert [file.name for file in weight_files(folder).files] == ["model.safetensors"]


@pytest.mark.parametrize("name", [".cache/abc.incomplete", "model.safetensors.aria2", "tokenizer.json.crdownload"])
def test_an_unfinished_download_is_noticed(tmp_path: Path, name: str) -> None:
    folder = transformers_folder(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(UserError, match=rf"{name} is an unfinished download"):
        hub.resolve(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "merges.txt"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version git-lfs.example/spec/v1\noid sha256:123\nsize 12345\n", "a pointer of Git LFS.*run `git lfs pull`"),
        ("\n<!DOCTYPE html>\n<title>Log in</title>", "a web page, not the file itself; download it again"),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    folder = transformers_folder(tmp_path)
    (folder / name).write_text(text)
    (folder / "single-file.safetensors").symlink_to("gone")
    with pytest.raises(UserError, match=rf"{name}: is {said}"):
        hub.resolve(str(folder))


def test_a_file_system_that_maps_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError("No such device (os error 19)")

    folder = transformers_folder(tmp_path)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(UserError, match=r"its file system cannot map files .*; copy the model to a local disk"):
        hub.resolve(str(folder))


def test_shards_without_their_index_are_named(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"the index of its shards, model\.safetensors\.index\.json, is missing"):
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


@pytest.mark.parametrize("numbers", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("make", [transformers_folder, diffusers_folder])
def test_integers_are_no_weights_unless_config_json_says_how_to_decode_them(
    make: Callable[[Path], Path], numbers: torch.dtype, tmp_path: Path
) -> None:
    folder = make(tmp_path / "m")
    part = folder / ("transformer" if make is diffusers_folder else ".")
    weights = {"norm.weight": torch.zeros(3), "a.weight": torch.zeros(3, dtype=numbers)}
    save_file(weights, next(part.glob("*.safetensors")))
    with pytest.raises(UserError, match=r"1 weights are integers \(\w+\), the first is a\.weight, and config"):
        hub.resolve(str(folder))
    about = json.loads((part / "config.json").read_text())
    for config in ({"quantization_config": {"a": 1}}, {"text_config": {"quantization_config": {"a": 1}}}):
        write_json(part / "config.json", about | config)
        assert hub.resolve(str(folder)) == folder


@pytest.mark.parametrize("numbers", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_8_bit_weights_with_scales_need_a_description_too(scale: str, numbers: torch.dtype, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "m")
    weights = {"norm.weight": torch.zeros(3), "a.weight": torch.zeros(3).to(numbers)}
    save_file(weights, folder / "model.safetensors")
    assert hub.resolve(str(folder)) == folder  # they are what they say, as T5 of Stable Diffusion 3 is published
    save_file(weights | {f"a.{scale}": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"1 weights are 8-bit numbers with scales \(F8_\w+\), the first is a\.weight, and"
    ):
        hub.resolve(str(folder))
    about = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", about | {"quantization_config": {"a": 1}})
    assert hub.resolve(str(folder)) == folder


def test_buffers_of_published_models_may_be_integers(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "m")
    names = ("embeddings.position_ids", "bn.num_batches_tracked", "attn.bias")
    save_file({name: torch.arange(3) for name in names}, folder / "model.safetensors")
    assert hub.resolve(str(folder)) == folder


def test_a_lora_file_resolves(tmp_path: Path) -> None:
    write_weights(tmp_path / "lora.safetensors")
    assert hub.resolve(str(tmp_path / "lora.safetensors"), single_file=True) == tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match=r"is a single file; give a model folder.*from_single_file"):
        hub.resolve(str(tmp_path / "lora.safetensors"))


def test_a_folder_of_a_model_in_one_file_says_how_it_becomes_a_model(tmp_path: Path) -> None:
    (tmp_path / "text_encoders").mkdir()
    for name in ("sd3.5_medium.safetensors", "text_encoders/clip_g.safetensors"):
        write_weights(tmp_path / name)
    said = r"the one file sd3\.5_medium\.safetensors is not read: give a model folder; .*from_single_file"
    with pytest.raises(UserError, match=said):
        hub.resolve(str(tmp_path))


def test_a_snapshot_whose_links_lead_nowhere_says_so(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").symlink_to("../../blobs/1234")
    with pytest.raises(UserError, match=r"model_index\.json: is a link to a file that is not there; copy .*cp -rL"):
        hub.resolve(str(tmp_path))


def test_a_folder_of_one_weights_file_and_no_description_is_that_file(tmp_path: Path) -> None:
    write_weights(tmp_path / "lora.safetensors")
    (tmp_path / "README.md").write_text("words")
    assert hub.resolve(str(tmp_path), single_file=True) == tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match="not a model folder"):
        hub.resolve(str(tmp_path))
    write_weights(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"2 safetensors files \(lora\.safetensors, other\.safetensors\); give one"):
        hub.resolve(str(tmp_path), single_file=True)


STRANGE = [
    "~~",
    "~nobody-here/x",
    "a\0b",
    "~a\0b",
    "x" * 5000,
    "\ud83d",
    "a" * 300 + "/b" * 3,
    "org/na me",
    "a\nb",
    "http" + "://x/y",
]
"""References that are no paths, or too long for one."""


def test_the_address_of_a_page_says_which_name_to_give() -> None:
    with pytest.raises(UserError, match=r"^model org/name: is given as an address; give org/name\[@revision\]$"):
        hub.resolve("https" + "://hub.example/org/name/tree/main")


@pytest.mark.parametrize("scheme", ["s3", "hf", "file", "git+ssh"])
def test_other_addresses_are_refused_without_their_passwords(scheme: str) -> None:
    with pytest.raises(
        UserError, match=r"^model \.\.\.: is given as an address; give a folder or org/name\[@revision\]$"
    ):
        hub.resolve(f"{scheme}{'://'}name:password@place/org/name")


@pytest.mark.parametrize("end", ["/org/name", "", "/x", "/org/name/blob/main/a.safetensors"])
def test_a_password_in_the_address_of_a_model_is_not_shown(end: str) -> None:
    with pytest.raises(UserError, match="is given as an address") as error:
        hub.resolve("https" + f"://me:hf_SecretSecret@hub.example{end}")
    assert "Secret" not in str(error.value)


def test_a_file_of_a_folder_in_its_place_is_told_from_weights(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=rf"give the folder that it is in, {re.escape(str(tmp_path))}$"):
        hub.resolve(str(tmp_path / "model_index.json"))


@pytest.mark.parametrize("ref", ["./none", "/none/at/all", "~/none", "none", "a/b/c", "org/name@", "", *STRANGE])
def test_what_is_neither_path_nor_repository_is_refused(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(
        UserError,
        match=r"no such (home )?folder|not a model folder|cannot be read as|longer than a path|given as an address",
    ):
        hub.resolve(ref)


def variant_folder(folder: Path) -> Path:
    transformers_folder(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    return folder


def sharded_variant_folder(folder: Path) -> Path:
    sharded_folder(folder)
    (folder / "model.safetensors.index.json").rename(folder / "model.safetensors.index.bf16.json")
    return folder


def both_folder(folder: Path) -> Path:
    """The plain index, but none of its files; a whole variant."""
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "plain.safetensors"}})
    return variant_folder(folder)


@pytest.mark.parametrize(
    ("make", "variant", "names"),
    [
        (transformers_folder, None, ["model.safetensors"]),
        (sharded_folder, None, ["one.safetensors", "two.safetensors"]),
        (variant_folder, "fp16", ["model.fp16.safetensors"]),
        (sharded_variant_folder, "bf16", ["one.safetensors", "two.safetensors"]),
        (both_folder, "fp16", ["model.fp16.safetensors"]),
        (lambda folder: transformers_folder(variant_folder(folder)), None, ["model.safetensors"]),
    ],
)
def test_weights_of_a_variant_are_taken_where_there_are_no_plain_ones(
    make: Callable[[Path], Path], variant: str | None, names: list[str], tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    assert hub.resolve(str(folder)) == folder
    assert weight_files(folder) == (variant, tuple(folder / name for name in names))


def whole_and_sharded_folder(folder: Path) -> Path:
    return transformers_folder(sharded_folder(folder))


def whole_and_stale_index_folder(folder: Path) -> Path:
    part = diffusers_folder(folder) / "transformer"
    write_json(part / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"w": "gone.safetensors"}})
    return folder


def twice_a_variant_folder(folder: Path) -> Path:
    write_weights(sharded_variant_folder(folder) / "model.bf16.safetensors")
    write_json(folder / "model.bf16.safetensors.index.json", {"weight_map": {"w": "one.safetensors"}})
    return folder


@pytest.mark.parametrize(
    "make",
    [whole_and_sharded_folder, whole_and_stale_index_folder, twice_a_variant_folder],
    ids=lambda make: make.__name__,
)
def test_weights_that_are_there_twice_are_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """diffusers reads the shards, transformers the whole file: either may be the stale one."""
    with pytest.raises(UserError, match=r"holds weights twice \(.*safetensors and .*index.*\); remove those that"):
        hub.resolve(str(make(tmp_path / "model")))


@pytest.mark.parametrize(
    "name",
    ["flux1-dev.safetensors", "consolidated.safetensors", "Model.safetensors", "model.fp16-00001-of-00002.safetensors"],
)
def test_weights_that_are_not_loaded_are_no_weights(name: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=f"no model.*there is {name}, which .* load.*give it that name"):
        hub.resolve(str(folder))


@pytest.mark.parametrize(
    ("make", "part", "before", "after"),
    [
        (diffusers_folder, "transformer", "diffusion_pytorch_model", "model"),
        (transformers_folder, ".", "model", "diffusion_pytorch_model"),
    ],
)
def test_weights_under_the_other_library_s_name_are_no_weights(
    make: Callable[[Path], Path], part: str, before: str, after: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "m") / part
    (folder / f"{before}.safetensors").rename(folder / f"{after}.safetensors")
    with pytest.raises(UserError, match=f"no {before}.safetensors .there is {after}.safetensors, which"):
        hub.resolve(str(tmp_path / "m"))


def entry(start: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HEADERS: dict[str, tuple[object, int]] = {
    "short offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "overlap": ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "backwards": ({"a": entry(4, 0)}, 4),
    "negative shape": ({"a": entry(0, 4, (-1,))}, 4),
    "overflow": ({"a": entry(0, 4, (2**62, 2**62))}, 4),
    "other size": ({"a": entry(0, 4, (2,))}, 4),
    "unknown dtype": ({"a": entry(0, 4, dtype="F33")}, 4),
    "cut": ({"a": entry(0, 4)}, 3),
    "longer": ({"a": entry(0, 4)}, 5),
    "list": ([], 0),
    "deep": ("[" * 100_000, 0),
    "half a surrogate": (r'{"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4),
}


@pytest.mark.parametrize("part", ["image processor", "feature extractor", "tokenizer", "configuration"])
def test_what_a_folder_lacks_is_said_without_advice_about_names_on_the_hub(part: str) -> None:
    said = f"Can't load {'the configuration of' if part == 'configuration' else f'{part} for'} '/a/model'. If you were"
    with pytest.raises(UserError, match=rf"^m \(files of its {part} are missing or damaged; copy them"), loading("m"):
        raise OSError(f"{said} trying to load it from 'https://huggingface.co/models', make sure you don't have ...")


def test_what_libraries_raise_is_one_line() -> None:
    for error in (
        KeyError("a"),
        RuntimeError("size\nmismatch"),
        RecursionError(),
        type("Strict", (Exception,), {})("x"),
    ):
        with pytest.raises(UserError, match=r"^folder \(.+\)$"), loading("folder"):
            raise error
    for kind in (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt):
        with pytest.raises(kind), loading("folder"):
            raise kind


def write_header(path: Path, header: object, size: int) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    write_header(tmp_path / "w.safetensors", *HEADERS[name])
    with pytest.raises(UserError, match=r"w\.safetensors is cut short or not a safetensors file"):
        check_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2**63), struct.pack("<Q", 10**8 + 1) + b"{" * 64])
def test_a_header_of_any_length_is_bounded(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file"):
        check_file(tmp_path / "w.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="not a file"):
        check_file(tmp_path / "folder.safetensors")


@pytest.mark.exhaustive
def test_headers_with_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    file, rng = tmp_path / "w.safetensors", random.Random(0)
    write_header(file, {"a": entry(0, 8, (2,)), "b": entry(8, 12), "__metadata__": {"format": "pt"}}, 12)
    whole = file.read_bytes()
    for _ in range(3_000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.choice(b'0123456789{}[],:"\\ \xff\0ab')
        file.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        with contextlib.suppress(UserError):
            check_file(file)


INDEXES: dict[str, object] = {
    "deep": "[" * 100_000,
    "escape": {"transformer": ["diffusers", "X"], "../../etc": ["diffusers", "X"]},
    "absolute": {"/etc": ["diffusers", "X"]},
    "zero byte": {"a\0b": ["diffusers", "X"]},
    "surrogate": r'{"\ud800": ["diffusers", "X"]}',
    "class": {"transformer": ["diffusers", "a/b"]},
    "library": {"transformer": ["os", "system"]},
    "module of the folder": {"transformer": ["my_model", "MyModel"]},
    "list": [],
    "number": "1" * 5000,
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_names_no_components_is_refused(name: str, tmp_path: Path) -> None:
    content = INDEXES[name]
    text = content if isinstance(content, str) else json.dumps(content)
    (diffusers_folder(tmp_path) / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a JSON object|names must be plain|allowed: diffusers, transformers"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["transformer", "vae", "tokenizer", "text_encoder_2", "text_encoder_3"])
@pytest.mark.parametrize("entry", [[None, None], None, ["diffusers", None], ["diffusers"], "diffusers"])
def test_a_required_part_is_not_null(name: str, entry: object, tmp_path: Path) -> None:
    index = diffusers_folder(tmp_path) / "model_index.json"
    write_json(index, json.loads(index.read_text()) | {"image_encoder": [None, None]})
    hub.pipeline_index("org/model", tmp_path)
    write_json(index, json.loads(index.read_text()) | {name: entry})
    with pytest.raises(
        UserError,
        match=rf"org/model: model_index\.json {name}: is (null, but is needed here|.*; must be the library and the)",
    ):
        hub.pipeline_index("org/model", tmp_path)


def test_values_of_a_pipeline_are_no_components(tmp_path: Path) -> None:
    index = diffusers_folder(tmp_path) / "model_index.json"
    write_json(index, json.loads(index.read_text()) | {"layers": [10, 20], "boundary": [0.5, None], "x": ["a"]})
    hub.check_folder(tmp_path)


@pytest.mark.parametrize("shards", [[], {}, {"a": 1}, {"a": "../x.safetensors"}, {"a": "a\0b"}, None, {"a": ["x"]}])
def test_an_index_of_shards_names_files_beside_it(shards: object, tmp_path: Path) -> None:
    write_json(sharded_folder(tmp_path) / "model.safetensors.index.json", {"weight_map": shards})
    with pytest.raises(UserError, match="has no weight_map of file names"):
        hub.resolve(str(tmp_path))


def test_builtin_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path)
    folder = diffusers_folder(tmp_path / "generator")
    assert hub.resolve("builtin:shapes/generator") == folder
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

    def model_info(self, repo: str, revision: str | None, *, timeout: float) -> SimpleNamespace:
        assert timeout > 0  # else it would wait without end
        files = [file.relative_to(self.folder) for file in sorted(self.folder.rglob("*")) if file.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file.as_posix()) for file in files])


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot")
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fake.model_info)
    return fake


def test_a_repository_is_fetched_without_pickles(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    transformers_folder(fake.folder)
    assert hub.prefetch("org/name@v1.0") == fake.folder
    assert {call["revision"] for call in fake.calls} == {"v1.0"}
    assert not any(call["local_files_only"] for call in fake.calls)
    assert set(fake.calls[-1]["allow_patterns"]) == {"model_index.json", hub.SAMPLING_FILE, *hub.HUB_FILES}
    assert fake.calls[-1]["ignore_patterns"] == ["*/*"]
    assert not any("bin" in pattern or "pt" in pattern.split(".") for pattern in fake.calls[-1]["allow_patterns"])


def test_a_pipeline_is_fetched_by_component(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    diffusers_folder(fake.folder)
    assert hub.resolve("org/name") == fake.folder
    patterns = fake.calls[-1]["allow_patterns"]
    assert "transformer/*.safetensors" in patterns
    assert "*.safetensors" not in patterns
    assert fake.calls[-1]["ignore_patterns"] == []
    twice = "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors"
    for name in twice:
        write_weights(fake.folder / name)
    whole = fake.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_suffix(".fp16.safetensors"))
    write_weights(fake.folder / "text_encoder" / "model-00001-of-00002.safetensors")
    write_weights(fake.folder / "vae" / whole.name)
    hub.resolve("org/name")
    assert sorted(fake.calls[-1]["ignore_patterns"]) == sorted(twice)
    hub.resolve("org/name", weights=False)
    assert fake.calls[-1]["ignore_patterns"] == []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **options: 1 / 0)  # no network
    hub.resolve("org/name")
    assert fake.calls[-1]["local_files_only"]  # the cache alone
    assert not any(pattern.startswith("image_encoder/") for pattern in patterns)


def test_adapters_of_a_repository_are_found_whatever_lies_beside_them(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workflow of ComfyUI, or the configuration of the model that it is for; one of several is named."""
    write_weights(fake.folder / "my_lora.safetensors")
    write_json(fake.folder / "workflow.json", {})
    assert hub.prefetch("org/name") == fake.folder / "my_lora.safetensors"
    for name in ("workflow.json", "config.json"):
        write_json(fake.folder / name, {})
        for ref in ("org/name", "org/name@main", str(fake.folder)):
            assert hub.resolve_adapter(ref, "lora.init") == fake.folder / "my_lora.safetensors"
        fake.calls.clear()
    write_weights(fake.folder / "other.safetensors")
    for ref in ("org/name", "org/name@v1"):
        with pytest.raises(UserError, match=rf"lora: {ref}: 2 .* one of them, as {ref}/my_lora.safetensors"):
            hub.resolve_adapter(ref, "lora")
    fake.calls.clear()
    for ask in (hub.prefetch, lambda ref: hub.resolve_adapter(ref, "lora")):
        assert ask("org/name@v1/other.safetensors") == fake.folder / "other.safetensors"
    assert [(call["revision"], call["local_files_only"]) for call in fake.calls] == [("v1", True)] * 2
    with pytest.raises(
        UserError, match=r"lora: model .*: no such file of org/name was found; .*prefetch org/name/no\.s"
    ):
        hub.resolve_adapter("org/name/no.safetensors", "lora")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fake.calls.clear()
    write_weights(fake.folder / "sub" / "a.safetensors")
    hub.resolve_adapter("org/name/sub/a.safetensors", "lora")
    described = ["sub/sampling.json", "sub/adapter_config.json"]
    assert [call["allow_patterns"] for call in fake.calls] == [["sub/a.safetensors", *described]]
    fake.calls.clear()
    hub.resolve("org/name@v1/other.safetensors", single_file=True)
    described = ["sampling.json", "adapter_config.json"]
    assert fake.calls[0]["allow_patterns"] == ["other.safetensors", *described]
    # where the hub cannot be asked, it is the one in the cache
    with monkeypatch.context() as away:
        (fake.folder / "other.safetensors").rename(tmp_path / "other.safetensors")
        away.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: 1 / 0)
        assert hub.resolve_adapter("org/name", "lora") == fake.folder / "my_lora.safetensors"
        with pytest.raises(UserError, match=r"lora: model 'org/none': .* \(division by zero\); check the name"):
            hub.resolve_adapter("org/none", "lora")
        (tmp_path / "other.safetensors").rename(fake.folder / "other.safetensors")
    # several are found, and one is chosen, before anything is downloaded
    fake.calls.clear()
    with pytest.raises(
        UserError, match=r"lora: org/name: 3 .* \(my_lora.safetensors, other.safetensors, sub/a.safetensors\); give one"
    ):
        hub.resolve_adapter("org/name", "lora")
    assert fake.calls == []
    (fake.folder / "my_lora.safetensors").rename(fake.folder / "adapter_model.safetensors")
    hub.resolve_adapter("org/name", "lora")
    assert [call["allow_patterns"] for call in fake.calls] == [["adapter_model.safetensors", *described]]


def test_what_is_no_model_is_named_where_it_is_known(tmp_path: Path) -> None:
    run, cache = tmp_path / "runs" / "a b", tmp_path / "models--org--name"
    checkpoint = run / "checkpoints" / "step-000002"
    for file in (run / "config.yaml", checkpoint / "manifest.json", cache / "snapshots" / "abc" / "config.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    for name in ("weights", "ema"):
        write_weights(checkpoint / f"{name}.safetensors")
    made = f"`flowbp export {quoted(run)}` makes a model or an adapter"
    for folder, said in (
        (run, f"; of a run of flowbp {made}"),
        (checkpoint, f"; of a checkpoint of flowbp {made}"),
        (cache, f"; it is a cache of the hub: give the model in it, {cache}/snapshots/abc"),
    ):
        for act in (hub.resolve, lambda ref: hub.resolve_adapter(ref, "lora.init")):
            with pytest.raises(UserError, match=re.escape(said)):
                act(str(folder))
    with pytest.raises(UserError, match=r"^lora\.init: .*ema\.safetensors: not an adapter; of a checkpoint"):
        hub.resolve_adapter(str(checkpoint / "ema.safetensors"), "lora.init")
    # as other trainers leave their adapters
    (tmp_path / "config.yaml").write_text("job: extension\n")
    (tmp_path / "checkpoints").mkdir()
    write_weights(tmp_path / "my_lora.safetensors")
    assert hub.resolve_adapter(str(tmp_path / "my_lora.safetensors"), "lora.init").name == "my_lora.safetensors"


def test_a_description_is_fetched_without_weights(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (transformers_folder(fake.folder) / "model.safetensors").unlink()
    assert hub.resolve("org/name", weights=False) == fake.folder
    assert not any("safetensors" in pattern for pattern in fake.calls[-1]["allow_patterns"])
    (fake.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object \("):
        hub.resolve("org/name", weights=False)


def test_offline_asks_the_cache_only_and_says_what_to_run(fake: FakeHub) -> None:
    transformers_folder(fake.folder)
    hub.resolve("org/name")
    assert all(call["local_files_only"] for call in fake.calls)
    assert hub.prefetch("org/name") == fake.folder
    # a cache that another library filled lacks what only we would download, such as variants, and is complete
    assert {tuple(call["allow_patterns"]) for call in fake.calls} == {("model_index.json",)}
    for ask in (hub.resolve, hub.prefetch):
        with pytest.raises(UserError, match=r"`interleave prefetch org/other@main` with a network and without HF_HUB"):
            ask("org/other@main")


def answer(status: int, code: str, kind: type[HfHubHTTPError], said: str) -> HfHubHTTPError:
    """What the client raises for an answer of the hub: a first line of numbers, then what the hub says."""
    response = httpx2.Response(
        status, headers={"X-Error-Code": code}, request=httpx2.Request("GET", "http" + "://hub/x")
    )
    return kind(f"{status} Client Error. (Request ID: Root=1-2)\n\n{said}", response=response, server_message=said)


NETWORK = LocalEntryNotFoundError("An error happened while trying to locate the files\nPlease check your connection.")
NETWORK.__cause__ = ConnectionError("Name or service not known")
LATER = LocalEntryNotFoundError("no file")
LATER.__cause__ = answer(403, "GatedRepo", GatedRepoError, "Access to model org/gated is restricted.")
PORTAL = json.JSONDecodeError("Expecting value", "<html>", 0)
PORTAL.__context__ = StopIteration(0)
PORTAL.__suppress_context__ = True
ANSWERS: list[tuple[Exception, str]] = [
    (
        answer(401, "GatedRepo", GatedRepoError, "You must have access to it and be authenticated. Please log in."),
        r"gated: accept its license at \S+/org/gated, log in with `hf auth login` or set HF_TOKEN, then run this",
    ),
    (LATER, r"gated: accept its license"),
    (
        answer(403, "GatedRepo", GatedRepoError, "Please enable access to public gated repositories in your token."),
        r"then run this command again \(the hub says: Please enable access to public gated repositories",
    ),
    (PORTAL, r"answered something else than the hub does, as a proxy's page to log in: Expecting value"),
    (answer(401, "RepoNotFound", RepositoryNotFoundError, "Invalid username."), r"no org/gated that.*private, log in"),
    (
        answer(404, "RevisionNotFound", RevisionNotFoundError, "Invalid rev id"),
        r"no revision 'v9' of it; give a branch",
    ),
    (
        answer(403, "", HfHubHTTPError, "Enable access to public gated repositories in your token."),
        r"\(Enable access to",
    ),
    (
        answer(401, "", HfHubHTTPError, "Invalid credentials in Authorization header"),
        r"refuses the token that it was given \(Invalid credentials in .*\); log in with `hf auth login`",
    ),
    (answer(429, "", HfHubHTTPError, "Too many requests"), r"\(Too many requests\); check the name and the network"),
    (OSError(28, "No space left on device"), r"the disk of \S+ is full; make room, or set HF_HOME to another disk"),
    (
        PermissionError(13, "Permission denied", "/a/hub"),
        r"cache cannot be used \(.*/a/hub'\); set HF_HOME to a folder",
    ),
    (NotADirectoryError(20, "Not a directory", "a-file/token"), r"cache cannot be used \(.*a-file/token'\)"),
    (NETWORK, r"\(Name or service not known\); check the name and the network, then run"),
    (ValueError(), r"\(ValueError\)"),
]


def let_the_hub_fail(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, every download fails so."""

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize(("error", "said"), ANSWERS)
def test_the_hubs_refusal_says_what_to_do(
    error: Exception, said: str, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_hub_fail(error, monkeypatch)
    for ask in (hub.resolve, hub.prefetch):
        with pytest.raises(UserError, match=said) as found:
            ask("org/gated@v9")
        assert "prefetch" not in str(found.value)


def test_a_setting_that_hides_the_token_is_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    let_the_hub_fail(LATER, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(UserError, match=r"set HF_TOKEN and unset HF_HUB_DISABLE_IMPLICIT_TOKEN, then run this"):
        hub.resolve("org/gated")


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("HF_ENDPOINT", "mirror", httpx2.UnsupportedProtocol("Request URL is missing a protocol.")),
        ("HTTPS_PROXY", "http://me:hf_caf\xe9@127.0.0.1:1", httpx2.ProxyError("407 Proxy Authentication Required")),
    ],
)
def test_variables_that_the_hub_is_reached_by_are_named(
    variable: str, value: str, error: Exception, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_hub_fail(error, monkeypatch)
    names = "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"check the name, the variable {variable} and the network") as found:
        hub.resolve("org/name")
    assert "hf_caf" not in str(found.value)


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("http://user:hun#ter2@127.0.0.1:1", r"the proxy \.\.\.@127.0.0.1:1 of the environment: must be"),
        ("socks5h://user:hunter2@127.0.0.1:9", "needs the package socksio"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(
    proxy: str, said: str, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UserError, match=said) as found:
        hub.resolve("org/name")
    assert "hun" not in str(found.value)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LATER, r"accept its license at \.\.\.@mirror/org/name, log in"),
        (
            ValueError("502 Bad Gateway for http://me:hunter2@mirror/org/name"),
            r"502 Bad Gateway for http://\.\.\.@mirror/org",
        ),
        (
            answer(500, "", HfHubHTTPError, "no http://me:hunter2@mirror/org/name"),
            r"\(no http://\.\.\.@mirror/org/name\); check",
        ),
    ],
    ids=["gated", "client", "hub"],
)
def test_a_password_in_the_address_of_a_mirror_is_not_shown(
    error: Exception, said: str, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_hub_fail(error, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://me:hunter2@mirror")
    with pytest.raises(UserError, match=said) as found:
        hub.resolve("org/name")
    assert "hunter2" not in str(found.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            UnicodeEncodeError("ascii", "Bearer hf_caf\xe9", 13, 14, "ordinal not in range"),
            r"has characters that no token has; log in .* or set HF_TOKEN anew",
        ),
        (
            httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed"),
            "set SSL_CERT_FILE to the certificate of its authority",
        ),
    ],
    ids=["token", "certificate"],
)
def test_a_token_and_a_certificate_have_their_remedies(
    error: Exception, said: str, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_hub_fail(error, monkeypatch)
    with pytest.raises(UserError, match=said) as found:
        hub.resolve("org/name")
    assert "hf_caf" not in str(found.value)


def test_a_complete_cached_repository_resolves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "hub" / "models--org--name"
    diffusers_folder(root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub.resolve("org/name") == root / "snapshots" / ("a" * 40)


def test_half_a_snapshot_says_what_to_run(fake: FakeHub) -> None:
    (transformers_folder(fake.folder) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="flowbp prefetch org/name"):
        hub.resolve("org/name")


def test_a_folder_wins_over_a_repository(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers_folder(tmp_path / "org" / "name")
    assert hub.resolve("org/name") == Path("org/name")
    assert fake.calls == []


def test_a_name_that_transformers_had_for_a_while_is_told_with_the_one_it_has() -> None:
    words = (
        "Unrecognized image processor in m. Should have a `image_processor_type` key in its preprocessor_config.json"
    )
    with (
        pytest.raises(UserError, match=r"does not know .* Qwen2\.5-VL write Qwen2VLIm"),
        loading("m: cannot be loaded"),
    ):
        raise ValueError(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look above!", "; copy both"),
        (
            "Cannot load because a.weight expected shape torch.Size([2, 3]), but got torch.Size([1, 3]). Please pass "
            "`ignore_mismatched_sizes=True`.",
            "config.json: a.weight expected shape torch.Size([2, 3]), but got torch.Size([1, 3]); copy both",
        ),
    ],
)
def test_weights_of_another_shape_are_told_without_the_advice_of_libraries(words: str, said: str) -> None:
    with pytest.raises(UserError) as caught, loading("m: cannot be loaded"):
        raise RuntimeError(words)
    assert str(caught.value).startswith("m: cannot be loaded (weights do not fit its config.json")
    assert said in str(caught.value)
    assert "ignore_mismatched" not in str(caught.value)
