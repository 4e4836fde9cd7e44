"""Prompt embeddings: once, exactly, in memory or on disk; text encoders are let go."""

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from families import size_of
from given import encode, prompt_for
from safetensors.torch import load_file, save_file

from flowbp import backbones
from flowbp.config import ModelConfig
from flowbp.core.types import Backbone
from flowbp.data import embeddings
from flowbp.data.embeddings import (
    ENCODE_BATCH_SIZE,
    PROMPTS_PER_FILE,
    EmbeddingStore,
    PromptEmbeddings,
    encode_one,
    fingerprint,
)
from imgen_common import hub
from imgen_common.devices import float32_matmul_precision
from imgen_common.errors import UserError
from imgen_common.run_folder import data

PROMPTS = ["a red circle", "two blue crosses", "", "a green square left of a red circle"]


def prompts_for(backbone: Backbone, texts: Sequence[str]) -> list[str]:
    return [prompt_for(backbone, text) for text in texts]


def test_a_prompt_embeds_alike_whatever_its_neighbours(backbone: Backbone) -> None:
    """Bit for bit: a resumed run embeds other prompts beside it than the run before did."""
    alone, crowd = PromptEmbeddings(backbone), PromptEmbeddings(backbone)
    prompts = prompts_for(backbone, PROMPTS)
    alone.add(prompts[:1])
    crowd.add(prompts_for(backbone, [f"{i} of the red circle" for i in range(ENCODE_BATCH_SIZE + 3)]) + prompts)
    for name, value in alone.rows(prompts[:1]).items():
        assert torch.equal(value, crowd.rows(prompts[:1])[name])


def test_they_are_what_the_backbone_says(backbone: Backbone) -> None:
    cond, negative = PromptEmbeddings(backbone)(prompts_for(backbone, PROMPTS))
    expected = encode(backbone, PROMPTS)
    for name, value in expected.items():
        assert torch.allclose(cond[name], value, atol=1e-5)
        assert torch.allclose(negative[name], value[2:3].expand_as(negative[name]), atol=1e-5)


class Counted:
    """A backbone that counts what it encodes, and forgets how to when its text encoders are gone."""

    def __init__(self, backbone: Backbone) -> None:
        self._whole, self.encoded = backbone, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.encoded += len(prompts)
        return dict(self._whole.encode(prompts))

    def encode_edit(self, *given: Any) -> dict[str, torch.Tensor]:
        self.encoded += 1
        return dict(self._whole.encode_edit(*given))

    def unload_text_encoders(self) -> None: ...


def test_the_next_run_reads_them_from_disk(backbone: Backbone, tmp_path: Path) -> None:
    first, second = Counted(backbone), Counted(backbone)
    many = prompts_for(backbone, PROMPTS + [f"{i} red circles" for i in range(PROMPTS_PER_FILE)])
    one = PromptEmbeddings(first, EmbeddingStore(tmp_path / "cache"), "mark")
    one.add(many)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    again = PromptEmbeddings(second, EmbeddingStore(tmp_path / "cache"), "mark")
    for name, value in one.rows(many).items():
        assert torch.equal(value, again.rows(many)[name])
    again(many)
    assert second.encoded == 0
    PromptEmbeddings(second, EmbeddingStore(tmp_path / "cache"), "another").add(many[: len(PROMPTS)])
    assert second.encoded == (len(PROMPTS) if backbone.reads_sources else ENCODE_BATCH_SIZE)
    assert not list((tmp_path / "cache").glob("*.new"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    class Spoilt(Counted):
        def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
            return {name: torch.full(one.shape, value) for name, one in super().encode(prompts).items()}

    spoilt: Any = Spoilt(backbones.load("builtin:shapes/generator"))
    with pytest.raises(UserError, match="not finite: the embeddings of prompts; check the weights of the text enc"):
        PromptEmbeddings(spoilt, EmbeddingStore(tmp_path / "cache")).add(["a red circle"])
    with pytest.raises(UserError, match="not finite: the embeddings of prompts"):
        encode_one(spoilt, "a red circle")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "._a.safetensors").write_bytes(b"what macOS leaves on other file systems")
    EmbeddingStore(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=r"a\.safetensors: damaged"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("place", [-1, -2000])
def test_a_flipped_bit_of_stored_embeddings_is_found(tmp_path: Path, place: int) -> None:
    backbone = backbones.load("builtin:shapes/generator")
    PromptEmbeddings(backbone, EmbeddingStore(tmp_path)).add(PROMPTS)
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name}: damaged; remove it, its prompts will be encoded again"):
        PromptEmbeddings(backbone, EmbeddingStore(tmp_path)).rows([*PROMPTS, ""])


def test_stored_embeddings_without_a_checksum_are_computed_anew(tmp_path: Path) -> None:
    counted: Any = Counted(backbones.load("builtin:shapes/generator"))
    PromptEmbeddings(counted, EmbeddingStore(tmp_path)).add(PROMPTS)
    (file,) = tmp_path.glob("*.safetensors")
    save_file(load_file(file), file)
    PromptEmbeddings(counted, EmbeddingStore(tmp_path)).add(PROMPTS)
    assert counted.encoded == 2 * ENCODE_BATCH_SIZE


def test_text_encoders_are_let_go(folder: Path) -> None:
    backbone = backbones.load(str(folder))
    conditions = PromptEmbeddings(backbone)
    prompts = prompts_for(backbone, PROMPTS)
    cond, _ = conditions(prompts)
    backbone.unload_text_encoders()
    assert not [name for name, part in backbone.pipe.components.items() if name.startswith("text_encoder") and part]
    again, _ = conditions(prompts)
    for name, value in cond.items():
        assert torch.equal(value, again[name])
    x = backbone.noise(len(PROMPTS), size_of(backbone), torch.Generator().manual_seed(0))
    assert backbone.velocity(x, torch.full((len(PROMPTS),), 0.5), cond).isfinite().all()


def test_a_fingerprint_is_that_of_the_text_encoders(folder: Path, backbone: Backbone) -> None:
    def mark(**changed: object) -> str:
        return fingerprint(folder, backbone, ModelConfig(**changed))  # type: ignore[arg-type]

    before = mark()
    assert mark(ref="elsewhere", height=64, width=8, recompute="all", working_copy=False) == before
    encoder = backbone.pipe.text_encoder
    with float32_matmul_precision("high"):
        assert mark() != before
    for dtype in (torch.bfloat16, torch.float16):
        encoder.to(dtype)
        assert mark() != before
    encoder.to(torch.float32)
    assert mark() == before
    (folder / "text_encoder" / "notes").mkdir()
    assert mark() == before
    (folder / "text_encoder" / "notes" / "a.txt").touch()
    assert mark() != before
    shutil.rmtree(folder / "text_encoder" / "notes")
    file = next((folder / "text_encoder").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\1")
    assert mark() != before
    file.write_bytes(whole)
    assert mark() == before


def test_a_fingerprint_has_the_length_of_prompts_and_the_libraries(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [ModelConfig(max_sequence_length=length) for length in (None, 77, 300)]
    marks = {fingerprint(tmp_path, backbone, model) for model in lengths}
    assert len(marks) == 3
    for name in ("torch", "transformers", "diffusers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                embeddings, "version", lambda library, name=name: "9.9" if library == name else version(library)
            )
            marks.add(fingerprint(tmp_path, backbone, lengths[0]))
    assert len(marks) == 6


@pytest.mark.parametrize("place", [0, 6000, 9999])
def test_a_change_anywhere_in_a_large_file_changes_its_fingerprint(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(data, "WHOLE_FILE", 1000)
    monkeypatch.setattr(data, "STRIDE", 500)
    monkeypatch.setattr(data, "BLOCK", 100)
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer" / "big.bin"
    file.write_bytes(bytes(10_000))
    before = fingerprint(tmp_path, backbone, ModelConfig())
    content = bytearray(10_000)
    content[place : place + 600] = b"x" * len(content[place : place + 600])  # a layer, longer than the stride
    file.write_bytes(content)
    assert fingerprint(tmp_path, backbone, ModelConfig()) != before


def test_embeddings_of_another_precision_are_not_taken(tmp_path: Path) -> None:
    """As a run in bfloat16 with adapters, then one in float32, and the other way round."""
    rows: dict[torch.dtype, torch.Tensor] = {}
    models = {dtype: backbones.load(ModelConfig().ref, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, miniature in [*models.items(), *models.items()]:
        mark = fingerprint(folder := hub.resolve(ModelConfig().ref), miniature, ModelConfig())
        with float32_matmul_precision("high"):
            assert (fingerprint(folder, miniature, ModelConfig()) == mark) == (dtype == torch.bfloat16)
        found = PromptEmbeddings(miniature, EmbeddingStore(tmp_path), mark)(PROMPTS)[0]["text"]
        assert found.dtype == dtype
        assert torch.equal(rows.setdefault(dtype, found), found)
