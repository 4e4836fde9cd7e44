"""The models that are loaded here: whether they are there, and hashes of them, so that a resumed run cannot go on with
others."""

from collections.abc import Mapping

from imgen_common import hub
from imgen_common.run_folder.data import DataHash, hash_adapter, hash_file, hash_model
from interleave.models.chat.local import LocalChatConfig
from interleave.models.generators.loading import family_of
from interleave.models.generators.pipeline import PipelineConfig


def check_models(parts: Mapping[str, object]) -> None:
    """Raises UserError for a model or an adapter, of a reference or a configuration by its name, that is not there."""
    for name, part in parts.items():
        if isinstance(part, PipelineConfig):
            family_of(part.ref, hub.resolve(part.ref, weights=False))
        if isinstance(part, str | PipelineConfig | LocalChatConfig):
            hub.resolve(part if isinstance(part, str) else part.ref)
        if isinstance(part, PipelineConfig) and part.lora is not None:
            hub.resolve_adapter(part.lora, f"{name}.lora")


def hash_models(parts: Mapping[str, object]) -> dict[str, DataHash]:
    """Hashes of models, and of their adapters, of a reference or a configuration by its name; none of what is served.

    Raises UserError for a model that is not there.
    """
    found: dict[str, DataHash] = {}
    for name, part in parts.items():
        if isinstance(part, str | PipelineConfig | LocalChatConfig):
            found |= hash_model(name, part if isinstance(part, str) else part.ref)
        if isinstance(part, PipelineConfig):
            places = {name: hub.resolve(part.ref)}
            if part.lora is not None:
                adapter = hub.resolve_adapter(part.lora, f"{name}.lora")
                found |= hash_adapter(f"{name}.lora", adapter)
                places[f"{name}.lora"] = adapter.parent
            files = {key: place / hub.SAMPLING_FILE for key, place in places.items()}
            found |= {f"{file.name} of {key}": hash_file(file) for key, file in files.items() if file.exists()}
    return found
