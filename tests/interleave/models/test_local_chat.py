"""A local vision-language model: batches answer as single messages do, seeds decide, memory and length are bounded."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import drop_weight, tiny_folder

from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from interleave.models.chat.local import LocalChat, LocalChatConfig
from interleave.protocols import BackendError, HashedImage, Message, Reply

RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (32, 32), colour)) for colour in ("red", "blue"))
MESSAGES: list[Message] = [
    ("plan: draw a red circle",),
    (RED, BLUE, "was: a red circle used: a red circle"),
    (BLUE, "make it green, please, and add a square on the left of the circle"),
    ("plan: x",),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("vlm"))


def model(folder: Path, **settings: Any) -> LocalChat:
    return LocalChat(LocalChatConfig(**{"ref": str(folder), "max_new_tokens": 12, "device": "cpu"} | settings))


def answers(of: LocalChat, messages: Sequence[Message], seeds: Sequence[int]) -> list[str]:
    async def ask() -> list[str]:
        found = await asyncio.gather(*(of.chat(m, s) for m, s in zip(messages, seeds, strict=True)))
        await of.close()
        return [reply.text for reply in found]

    return asyncio.run(ask())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(folder: Path, temperature: float) -> None:
    alone = [answers(model(folder, temperature=temperature, max_batch=1), [m], [i])[0] for i, m in enumerate(MESSAGES)]
    together = answers(model(folder, temperature=temperature), MESSAGES, range(4))
    assert together == alone
    assert len(set(alone)) > 1


def test_its_name_tells_other_weights_apart(folder: Path, tmp_path: Path) -> None:
    before = model(folder).id
    (copy := tmp_path / "trained").mkdir()
    for file in folder.iterdir():
        shutil.copy(file, copy)
    assert model(copy).id == before.replace(str(folder), str(copy))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3f")
    assert model(copy).id != before.replace(str(folder), str(copy))


def test_its_name_tells_what_it_sees_apart(folder: Path) -> None:
    ids = [model(folder, **given).id for given in ({}, {"max_pixels": 4096}, {"dtype": "bfloat16"})]
    assert len(set(ids)) == 3
    assert ids[0].replace(" w=", " px=4096 w=") == ids[1]


def test_an_end_of_turn_that_only_the_tokenizer_names_ends_an_answer(tmp_path: Path) -> None:
    critic = shutil.copytree(hub.resolve("builtin:shapes/critic"), tmp_path / "critic")
    (critic / "generation_config.json").unlink()
    about = json.loads((critic / "config.json").read_text())
    del about["text_config"]["eos_token_id"]
    (critic / "config.json").write_text(json.dumps(about))
    chat = LocalChat(LocalChatConfig(ref=str(critic), max_new_tokens=100, device="cpu"))
    reply = asyncio.run(chat.chat((RED, RED, "was: a red circle used: a red circle"), 0))
    assert (reply.truncated, reply.text.endswith("</answer>")) == (False, True)


def test_a_model_s_own_repetition_penalty_changes_answers_and_no_probabilities(folder: Path, tmp_path: Path) -> None:
    penalized = shutil.copytree(folder, tmp_path / "penalized")
    about = penalized / "generation_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"repetition_penalty": 5.0}))
    plain, other = (asyncio.run(model(one).chat(MESSAGES[1], 0)) for one in (folder, penalized))
    assert plain.text != other.text
    assert plain.token_probabilities[0][1] == other.token_probabilities[0][1]


def test_seeds_decide_what_is_sampled(folder: Path) -> None:
    message = [MESSAGES[0]] * 3
    sampled = answers(model(folder, temperature=1.0), message, [1, 2, 1])
    assert sampled[0] == sampled[2] != sampled[1]
    greedy = answers(model(folder), message, [1, 2, 1])
    assert len(set(greedy)) == 1


def test_gumbel_noise_samples_the_models_own_distribution(folder: Path) -> None:
    """First tokens of many seeds against the probabilities the model gives."""
    of = model(folder, temperature=1.0, max_new_tokens=1, top_logprobs=5, max_batch=500, top_k=2)
    replies = of.answer([(MESSAGES[0], seed) for seed in range(500)])
    first = replies[0]
    assert not isinstance(first, BaseException)
    ranked = sorted(first.token_probabilities[0][1].items(), key=lambda item: -item[1])[:2]
    expected = ranked[0][1] / (ranked[0][1] + ranked[1][1])
    tokens = [r.token_probabilities[0][0] for r in replies if not isinstance(r, BaseException)]
    share = sum(token == ranked[0][0] for token in tokens) / 500
    assert set(tokens) <= {ranked[0][0], ranked[1][0]}
    assert abs(share - expected) < 4 * (0.25 / 500) ** 0.5


def test_counts_and_truncation(folder: Path) -> None:
    (reply,) = model(folder, max_new_tokens=3).answer([(MESSAGES[1], 0)])
    assert not isinstance(reply, BaseException)
    assert reply.truncated
    assert reply.num_completion_tokens == 3
    assert reply.num_prompt_tokens > 2 * 16
    assert len(reply.token_probabilities) == 3
    for token, alternatives in reply.token_probabilities:
        assert token in alternatives
        assert 0.99 > sum(alternatives.values()) > 0


def test_answers_end_where_the_models_positions_do(folder: Path) -> None:
    """The tiny model has 512 positions: a prompt that leaves a few has a short answer, one that fills them is refused,
    and neither touches its neighbour."""
    of = model(folder, max_new_tokens=1)
    once, twice = (
        reply.num_prompt_tokens
        for reply in of.answer([(("red circle " * n,), 0) for n in (1, 2)])
        if isinstance(reply, Reply)
    )
    long, too_long = (("red circle " * n,) for n in (1 + (500 - once) // (twice - once), 400))
    alone = model(folder, max_new_tokens=30).answer([(MESSAGES[0], 0)])
    found = model(folder, max_new_tokens=30).answer([(MESSAGES[0], 0), (long, 0), (too_long, 0)])
    assert isinstance(alone[0], Reply)
    assert isinstance(found[0], Reply)
    assert found[0].text == alone[0].text
    assert isinstance(found[1], Reply)
    assert found[1].truncated
    assert found[1].num_prompt_tokens + found[1].num_completion_tokens == 512
    assert isinstance(found[2], BackendError)
    assert (found[2].kind, "takes 511" in str(found[2])) == ("refused", True)


def test_large_images_are_made_smaller(folder: Path, tmp_path: Path) -> None:
    """The tiny processor makes a token of 8x8 pixels, and every image 32x32; here it is told to take larger ones."""
    shutil.copytree(folder, tmp_path / "large")
    config = json.loads((tmp_path / "large" / "processor_config.json").read_text())
    config["image_processor"]["size"]["longest_edge"] = 128 * 128
    (tmp_path / "large" / "processor_config.json").write_text(json.dumps(config))
    large = HashedImage.from_pil(Image.radial_gradient("L").resize((96, 64)))
    replies = [
        model(tmp_path / "large", max_pixels=pixels).answer([((large, "x"), 0)])[0] for pixels in (None, 64 * 64, 1024)
    ]
    tokens = [reply.num_prompt_tokens for reply in replies if isinstance(reply, Reply)]
    assert tokens[0] - tokens[1] >= (96 * 64 - 64 * 64) // 64
    assert tokens[1] - tokens[2] >= 30
    with pytest.raises(UserError, match=r"max_pixels 1023: the processor of .* give more, or null"):
        model(tmp_path / "large", max_pixels=1023)


def test_a_template_that_opens_the_thinking(folder: Path) -> None:
    of = model(folder)
    plain = of.answer([(MESSAGES[0], 0)])[0]
    template = of._processor.chat_template
    of._processor.chat_template = template.replace("assistant\n", "assistant\n<think>\n")
    opened = of.answer([(MESSAGES[0], 0)])[0]
    assert isinstance(plain, Reply)
    assert isinstance(opened, Reply)
    assert not plain.text.startswith("<think>")
    assert opened.text.startswith("<think>")


@pytest.mark.parametrize("marks", [("[THINK]", "[/THINK]"), ("<|channel>", "<channel|>"), ("<think>", "</think>")])
def test_marks_of_thinking_that_are_special_tokens_are_kept(folder: Path, marks: tuple[str, str]) -> None:
    of = model(folder)
    tokenizer = of._processor.tokenizer
    tokenizer.add_tokens([*marks, "<|other|>"], special_tokens=True)
    begin = marks[0] + ("thought\n" if marks[0] == "<|channel>" else "")
    said = tokenizer(f"{begin}plan: x{marks[1]}plan: y<|other|>", add_special_tokens=False).input_ids
    text = of._reply("", said, 1, []).text
    assert (text.startswith("<think>"), text.count("</think>"), "<|other|>" in text) == (True, 1, False)


def test_memory_that_runs_out_halves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(folder)
    real, sizes = of._generate, list[int]()

    def limited(asked: Any) -> Any:
        sizes.append(len(asked))
        if len(asked) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(asked)

    monkeypatch.setattr(of, "_generate", limited)
    assert answers(of, MESSAGES, range(4)) == answers(model(folder), MESSAGES, range(4))
    assert sizes == [4, 2, 1, 1, 1, 1]


def test_one_that_does_not_fit_alone_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(folder)
    real = of._generate

    def limited(asked: Any) -> Any:
        if any(len(message) == 3 for message, _ in asked):
            raise torch.OutOfMemoryError("no room")
        return real(asked)

    monkeypatch.setattr(of, "_generate", limited)
    found = of.answer([(m, 0) for m in MESSAGES])
    assert [type(r).__name__ for r in found] == ["Reply", "BackendError", "Reply", "Reply"]
    assert isinstance(found[1], BackendError)
    assert found[1].kind == "out_of_memory"


@pytest.mark.slow
def test_what_is_no_such_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        model(tmp_path / "none")
    with pytest.raises(UserError, match=r"not a vision-language model"):
        LocalChatConfig(ref="builtin:shapes/reward", device="cpu").build()


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_of_a_variant_are_loaded(folder: Path, variant: str, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    (changed / "model.safetensors").rename(changed / f"model.{variant}.safetensors")
    assert answers(model(changed), MESSAGES[:1], [0]) == answers(model(folder), MESSAGES[:1], [0])


@pytest.mark.parametrize("name", ["embed_tokens", "mlp"])
def test_a_weight_that_no_file_holds_is_not_made_up(folder: Path, name: str, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    drop_weight(changed / "model.safetensors", name)
    with pytest.raises(UserError, match=rf"changed: \d weights are missing, the first is .*({name}|lm_head)"):
        model(changed)


def test_a_typo_in_a_setting_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        load(LocalChatConfig, [], ["ref=x", "temprature=1"])
