"""Prompt embeddings, computed once: kept in memory, or on disk for the runs that follow."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flowbp.backbones.source_tokens import TOKENS, pack_sources
from flowbp.config import ModelConfig
from flowbp.core.types import Backbone, Cond
from flowbp.data.edits import Edit, Source, sources_of
from imgen_common.errors import UserError
from imgen_common.files import write_atomic, writing
from imgen_common.prompt_limits import text_encoder_names
from imgen_common.run_folder.data import sample_file

ENCODE_BATCH_SIZE = 16
"""Prompts per forward, always: the last batch is filled up, so that kernels round alike whatever is new."""
PROMPTS_PER_FILE = 64
"""Prompts that are stored together."""
UNRELATED = frozenset({"ref", "height", "width", "dtype", "embedded_guidance", "recompute", "attention", "vae"})
UNRELATED |= {"allow_distilled", "compile", "quantization", "working_copy"}
"""Keys of `model` that change no embedding; a new key is part of every fingerprint unless it is named here."""
LIBRARIES = ("torch", "transformers", "diffusers")


class EmbeddingStore:
    """Embeddings of single prompts by key, in a growing folder of memory-mapped safetensors files.

    The metadata of a file holds the checksum of each of its keys, which is compared when the key is first read.
    Embeddings without one, as earlier versions stored them, count as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._unverified: dict[str, str] = {}
        self._open: dict[Path, safe_open] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("[!.]*.safetensors")):
            self._index(file)

    def _index(self, file: Path) -> None:
        try:
            opened = self._open[file] = safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged ({error}); remove it, its prompts will be encoded again") from None
        checksums = opened.metadata() or {}
        self._files |= dict.fromkeys(checksums, file)
        self._unverified |= checksums

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        opened = self._open[self._files[key]]
        names = [name for name in opened.keys() if name.startswith(f"{key}/")]  # noqa: SIM118
        row = {name.split("/")[1]: opened.get_tensor(name) for name in names}
        expected = self._unverified.pop(key, None)
        if expected is not None and checksum(row) != expected:
            raise UserError(f"{self._files[key]}: damaged; remove it, its prompts will be encoded again")
        return row

    def update(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Adds a file, whole or not at all.  Raises UserError if it cannot be written."""
        checksums = {key: checksum(row) for key, row in rows.items()}
        tensors = {
            f"{key}/{name}": value.cpu().contiguous() for key, row in rows.items() for name, value in row.items()
        }
        file = self.folder / f"{digest(*sorted(rows))}.safetensors"
        write_atomic(file, save(tensors, metadata=checksums))
        self._index(file)


class SourceLatents:
    """Latents of source images, each encoded alone, so that they depend on nothing else; the last used ones are kept.

    max_bytes: of those that are kept, in the host's memory.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = 2**30) -> None:
        self._backbone, self._max_bytes, self._bytes = backbone, max_bytes, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, source: Source) -> Tensor:
        """Latents (c, rows, columns)."""
        if source.digest in self._kept:
            self._kept.move_to_end(source.digest)
            return self._kept[source.digest]
        latents = self._backbone.encode_source(self._backbone.prepare_source(source.load())).cpu()
        self._kept[source.digest] = latents
        self._bytes += latents.nbytes
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return latents


class PromptEmbeddings:
    """Conditioning of prompts and of the empty one, each embedded once; of edits with their sources.

    store: where embeddings are kept, by default in memory.  fingerprint: of all that embeddings depend on; part of
    every key.
    """

    def __init__(self, backbone: Backbone, store: EmbeddingStore | None = None, fingerprint: str = "") -> None:
        self._backbone, self._fingerprint = backbone, fingerprint
        self._store: EmbeddingStore | dict[str, dict[str, Tensor]] = {} if store is None else store
        self._latents = SourceLatents(backbone)

    def _key(self, prompt: str) -> str:
        read = sources_of(prompt) if self._backbone.reads_sources else ()
        return digest(self._fingerprint, prompt, *(source.digest for source in read))

    def add(self, prompts: Sequence[str]) -> None:
        """Embeds those prompts that are new, and what guidance compares them with.

        Raises UserError where an embedding is not finite, before it is stored.
        """
        wanted = [*prompts, *(negative_of(self._backbone, prompt) for prompt in prompts)]
        new = {key: prompt for prompt in wanted if (key := self._key(prompt)) not in self._store}
        size = 1 if self._backbone.reads_sources else ENCODE_BATCH_SIZE
        rows: dict[str, dict[str, Tensor]] = {}
        for start in range(0, len(new), size):
            keys = list(new)[start : start + size]
            texts = [new[key] for key in keys]
            if self._backbone.reads_sources:
                cond = encode_one(self._backbone, texts[0])
            else:
                cond = _finite(self._backbone.encode([*texts, *[""] * (size - len(texts))]))
            for i, key in enumerate(keys):
                # in the host's memory: those of a long run are larger than a GPU's
                rows[key] = {name: value[i].to("cpu", copy=True) for name, value in cond.items()}
            if len(rows) >= PROMPTS_PER_FILE or start + size >= len(new):
                self._store.update(rows)
                rows = {}

    def rows(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of the prompts, on the device of the network; shorter texts are filled up with zeros."""
        device = next(self._backbone.net.parameters()).device
        found = [self._store[self._key(p)] for p in prompts]
        return {name: _stack([row[name] for row in found]).to(device) for name in found[0]}

    def __call__(self, prompts: Sequence[str]) -> tuple[Cond, Cond]:
        """Conditioning of the prompts, and of the empty one: a single row, or with the sources of each edit."""
        self.add(prompts)
        sources = pack_sources([[self._latents(source) for source in sources_of(prompt)] for prompt in prompts])
        if not sources:
            return self.rows(prompts), self.rows([""])
        sources[TOKENS] = sources[TOKENS].to(next(self._backbone.net.parameters()).device)
        negatives = [negative_of(self._backbone, prompt) for prompt in prompts]
        return {**self.rows(prompts), **sources}, {**self.rows(negatives), **sources}


def negative_of(backbone: Backbone, prompt: str) -> str:
    """What guidance compares a prompt with: the empty one, with the same sources where the text encoder sees them."""
    return Edit("", sources_of(prompt)) if backbone.reads_sources else ""


def encode_one(backbone: Backbone, prompt: str) -> Cond:
    """Conditioning of a prompt, (1, ...), without the latents of its sources.  Raises UserError if it is not finite."""
    if not backbone.reads_sources:
        return _finite(backbone.encode([prompt]))
    return _finite(backbone.encode_edit(str(prompt), [source.load() for source in sources_of(prompt)]))


def _finite(cond: Cond) -> Cond:
    if not all(value.isfinite().all() for value in cond.values()):
        raise UserError("not finite: the embeddings of prompts; check the weights of the text encoders")
    return cond


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Rows as one tensor; those with fewer tokens, as texts with smaller sources, are filled up with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) if rows[0].dim() else torch.stack(list(rows))


def checksum(row: Mapping[str, Tensor]) -> str:
    """Of the names, data types and numbers of one prompt's embeddings."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(row.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest(*parts: str) -> str:
    """A short name for texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def fingerprint(folder: Path, backbone: Backbone, model: ModelConfig) -> str:
    """Of everything that the embeddings of a backbone depend on.

    The files of its text encoders and tokenizers and the configurations beside them; the encoders' precision, also
    that of their products, and kind of device; the settings of the model but `UNRELATED`; and the libraries that
    compute.
    """
    encoders = {name: backbone.pipe.components[name] for name in text_encoder_names(backbone.pipe)}
    found = [f"{name} {part.dtype} {part.device.type}" for name, part in encoders.items() if part is not None]
    if any(part is not None and part.dtype == torch.float32 for part in encoders.values()):
        found.append(torch.get_float32_matmul_precision())
    found += [model.model_dump_json(exclude=set(UNRELATED)), *(f"{name} {version(name)}" for name in LIBRARIES)]
    patterns = (
        "text_encoder*/**/*",
        "tokenizer*/**/*",
        "processor/**/*",
        "transformer/config.json",
        "model_index.json",
    )
    for file in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        found += [str(file.relative_to(folder)), str(file.stat().st_size), sample_file(file)]
    return digest(*found)
