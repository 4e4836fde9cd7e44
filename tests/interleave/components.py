"""One of every kind of generator, chat model and judge, small enough for a test; the contract suite runs on each."""

import base64
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from hosting import InProcess, hosted
from pydantic import TypeAdapter
from tiny import tiny_folder

from interleave.agents.scoring import JudgeConfig
from interleave.models.chat import ChatConfig
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.models.generators import GeneratorConfig
from interleave.models.generators.images_api import ImagesApiConfig, ImagesApiGenerator
from interleave.models.generators.scripted import ScriptedGenerator, color_bands
from interleave.models.generators.service import ServiceConfig, ServiceGenerator
from interleave.models.remote import encode_png
from interleave.protocols import ChatModel, GenerationRequest, Generator, HashedImage
from tests.interleave.editors import folder_of


def images_api(stack: ExitStack, place: Path) -> Generator:
    def answer(request: httpx.Request) -> httpx.Response:
        fields = json.loads(request.content)
        image = HashedImage.from_pil(color_bands(GenerationRequest(fields["prompt"], (), fields["seed"])))
        return httpx.Response(200, json={"data": [{"b64_json": base64.b64encode(encode_png(image)).decode()}]})

    config = ImagesApiConfig(url="http://example.test/v1", model="m", send_seed=True)
    return ImagesApiGenerator(config, httpx.MockTransport(answer))


def service(stack: ExitStack, place: Path) -> Generator:
    return ServiceGenerator.connect(ServiceConfig(urls=(stack.enter_context(hosted(InProcess(ScriptedGenerator()))),)))


def build(seam: Any, **config: Any) -> Any:
    """What a configuration of that kind builds."""
    return TypeAdapter(seam).validate_python(config).build()


def pipeline(stack: ExitStack, place: Path) -> Generator:
    ref = str(folder_of("flux2", place))
    return build(GeneratorConfig, kind="pipeline", ref=ref, num_inference_steps=2, height=32, width=32)


def endpoint(stack: ExitStack, place: Path) -> ChatModel:
    def answer(request: httpx.Request) -> httpx.Response:
        message = {"role": "assistant", "content": hashlib.sha256(request.content).hexdigest()}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}]})

    return EndpointChat(EndpointChatConfig(url="http://example.test/v1", model="m"), httpx.MockTransport(answer))


Maker = Callable[[ExitStack, Path], Any]
SCORES = '{"score": [7, 8], "reasoning": "fine"}'
GENERATORS: dict[str, Maker] = {
    "pipeline": pipeline,
    "service": service,
    "images_api": images_api,
    "scripted": lambda stack, place: build(GeneratorConfig, kind="scripted", height=8, width=8),
}
CHAT_MODELS: dict[str, Maker] = {
    "local": lambda stack, place: build(ChatConfig, kind="local", ref=str(tiny_folder(place)), max_new_tokens=8),
    "endpoint": endpoint,
    "scripted": lambda stack, place: build(ChatConfig, kind="scripted", answers=["yes"]),
}
JUDGES: dict[str, Maker] = {
    "model": lambda stack, place: build(JudgeConfig, model={"kind": "scripted", "answers": [SCORES]}, kind="model"),
    "shapes_verifier": lambda stack, place: build(JudgeConfig, kind="shapes_verifier"),
}
