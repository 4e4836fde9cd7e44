"""`interleave sft`: which weights and tokens learn, which rows come when, what is refused; and that a run goes on."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed_training import assert_kills_change_nothing
from launching import ACCELERATE, SHARDS, forked, launched, lines, losses
from sets import WHITE, critic_row, planner_row, write
from tiers import tiers
from tiny import drop_weight

from imgen_common import hub
from imgen_common.config import load, to_yaml
from imgen_common.errors import UserError
from imgen_common.run_folder.data import hash_rows, record_data
from interleave.datasets.rows import SftRow
from interleave.models.chat.local import to_conversation
from interleave.protocols import HashedImage
from interleave.storage.images import ImageStore
from interleave.training.batch_plan import plan_sft_batches
from interleave.training.config import GrpoConfig, SftConfig
from interleave.training.grpo import check_grpo
from interleave.training.memory import (
    build_meta_model,
    check_adapters,
    estimate_static_memory,
    layers_of_targets,
    zero_options,
)
from interleave.training.rows import (
    chat_turns,
    check_chat_template,
    num_tokens,
    order_by_kind,
    read_rows,
    select_by_length,
)
from interleave.training.run import load_model
from interleave.training.sft import check_sft, warn_of_unreadable_answers
from interleave.training.trained_weights import freeze_vision, is_frozen
from interleave.training.trl_options import (
    BOUNDS,
    CHOICES,
    RESERVED_GRPO,
    RESERVED_LORA,
    RESERVED_SFT,
    OptionsRefusedError,
    check_arguments,
    check_evaluation,
    check_keys,
    check_options,
    check_reserved,
    check_trackers_installed,
    check_values,
)
from scripts.miniature.agents import models

CONFIGS = Path(__file__).parents[3] / "configs" / "interleave"
SFT_RECIPES = sorted(CONFIGS.glob("sft_*.yaml"))
WIDE, BROKEN = HashedImage.white(300, 1), "b" * 64
GRPO_RECIPES = sorted(CONFIGS.glob("grpo_*.yaml"))


@pytest.fixture(scope="module")
def rows(root: Path) -> list[SftRow]:
    return read_rows(root / "set", "critic_sft", SftRow)


# --- options ---------------------------------------------------------------------------------------------------------


def test_a_typo_in_the_mappings_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"max_steps=5: no key here; write trl\.max_steps"):
        load(GrpoConfig, [], ["max_steps=5"])
    with pytest.raises(UserError, match=r"trl.learing_rate: unknown option of X; did you mean 'learning_rate'"):
        check_keys("trl", {"learing_rate": 1}, {"learning_rate", "save_steps"}, "X")


class Speed(Enum):
    SLOW, FAST = "slow", "fast"


@dataclasses.dataclass
class Options:
    """As TRL's options are typed."""

    learning_rate: float = 1e-5
    save_steps: int | None = None
    bf16: bool | None = None
    speed: Speed | str = "slow"
    report_to: str | list[str] | None = None
    fsdp: str | None = None
    adam_beta1: float = 0.9
    dataloader_num_workers: int = 0
    top_p: float = 1.0
    loss_type: str = dataclasses.field(default="nll", metadata={"choices": ["nll", "dft"]})
    scale_rewards: str = "group"
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    deepspeed: dict | str | None = None  # type: ignore[type-arg]
    run_name: str | None = None
    pad_to_multiple_of: int | None = None
    max_completion_length: int | None = 256
    generation_kwargs: dict[str, Any] | None = None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": math.nan}, "learning_rate: must be a finite number, got nan"),
        ({"learning_rate": "high"}, "learning_rate: must be a finite number, got 'high'"),
        ({"learning_rate": True}, "learning_rate: must be a finite number, got True"),
        ({"learning_rate": -1}, "learning_rate: must be at least 0, got -1"),
        ({"save_steps": 1.5}, "save_steps: must be a whole number or null, got 1.5"),
        ({"bf16": "maybe"}, "bf16: must be true or false or null, got 'maybe'"),
        ({"bf16": 1}, "bf16: must be true or false or null, got 1"),
        ({"speed": "fst"}, r"speed: is 'fst'; did you mean 'fast'\?; allowed: slow, fast"),
        ({"adam_beta1": 2.0}, r"adam_beta1: must be at least 0 and below 1, got 2.0"),
        ({"adam_beta1": 1}, r"adam_beta1: must be at least 0 and below 1, got 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: must be at least 0, got -1"),
        ({"top_p": 0}, "top_p: must be above 0 and at most 1, got 0"),
        ({"loss_type": "zzz"}, "loss_type: is 'zzz'; allowed: nll, dft"),
        ({"scale_rewards": "grup"}, r"scale_rewards: is 'grup'; did you mean 'group'\?; allowed: .*, true, false"),
        ({"gradient_checkpointing_kwargs": "x"}, "gradient_checkpointing_kwargs: must be a mapping, got 'x'"),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": "no"}},
            "gradient_checkpointing_kwargs.use_reentrant: must be true or false or null, got 'no'",
        ),
        ({"deepspeed": ["x"]}, r"deepspeed: must be a mapping, got \['x'\]"),
        ({"run_name": 3}, "run_name: must be a text, got 3"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: must be at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length: must be at least 1, got 0"),
        (
            {"generation_kwargs": {"repetiton_penalty": 1.1}},
            r"generation_kwargs.repetiton_penalty: unknown option of .*; did you mean 'repetition_penalty'",
        ),
        ({"generation_kwargs": {"stop_strings": ["x"]}}, "generation_kwargs.stop_strings: cannot be set, TRL gives"),
        ({"speed": ["slow"]}, r"speed: is \['slow'\].*; allowed: slow, fast"),
        *(
            pytest.param({"report_to": given}, f"report_to: is {said}.*; allowed: none, all, ", marks=pytest.mark.slow)
            for given, said in ((["nope"], "'nope'"), (3, "3"))
        ),
        pytest.param(
            {"report_to": ["wandb", "tensorboard"], "run_name": "x"},
            "run_name: cannot be set with wandb; use --name .* WANDB_PROJECT",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_value_that_an_option_of_trl_cannot_have_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=f"^trl.{said}"):
        check_values(given, Options)
    whole = {"learning_rate": 1, "save_steps": 3, "bf16": None, "speed": "fast", "fsdp": True}
    check_values(whole, Options)
    check_values({"generation_kwargs": {"suppress_tokens": [1], "min_p": 0.1, "do_sample": True}}, Options)
    check_values({"deepspeed": "a.json", "gradient_checkpointing_kwargs": {}, "scale_rewards": False}, Options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy: best: nothing would be saved"),
        ({"eval_strategy": "steps", "metric_for_best_model": "accuracy"}, "metric_for_best_model: is 'accuracy'"),
    ],
)
def test_options_about_evaluations_that_there_are_not(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^trl.{said}"):
        check_evaluation(given)
    check_evaluation(given | {"eval_strategy": "epoch", "metric_for_best_model": "eval_loss"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trl", "said"),
    [
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers > 0"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: needs"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end requires"),
        ({"debug": "zigzag"}, "zigzag is not a valid DebugOption"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs: TRL"),
        ({"lr_scheduler_kwargs": {"num_cycles": 1}}, "lr_scheduler_kwargs: TRL refuses"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"optim": "adamw_torch", "loss_type": "zzz"}, "loss_type: is 'zzz'"),
        ({"save_total_limit": -1}, "save_total_limit: must be at least 0"),
        ({"label_smoothing_factor": 5}, "label_smoothing_factor: must be from 0 to 1"),
        ({"logging_steps": -5}, "logging_steps: must be above 0"),
        ({"warmup_steps": -3}, "warmup_steps: must be at least 0"),
    ],
)
@pytest.mark.parametrize("kind", ["SFTConfig", "GRPOConfig"])
def test_options_that_trl_refuses_are_found_before_anything_is_started(
    kind: str, trl: dict[str, Any], said: str
) -> None:
    import trl as library

    def check(cls: Any) -> None:
        check_values(trl, cls)
        check_arguments(trl, cls, 2)

    with pytest.raises(UserError, match=f"^trl.*{said}"):
        check(getattr(library, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFTConfig", "GRPOConfig"])
def test_our_choices_and_bounds_allow_the_defaults_of_trl(kind: str) -> None:
    import trl as library

    cls = getattr(library, kind)
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    check_values({name: known[name] for name in {*BOUNDS, *CHOICES} & known.keys()}, cls)
    gpu = {"bf16": True, "tf32": True, "deepspeed": "none.json", "torch_compile": True}
    check_arguments(gpu | ({"use_vllm": True} if kind == "GRPOConfig" else {}), cls, 8)


@pytest.mark.parametrize("section", ["trl", "lora"])
@pytest.mark.parametrize("kind", [SftConfig, GrpoConfig])
@pytest.mark.parametrize(
    "given",
    [
        {"hub_token": "pass-word"},
        {"run_name": "hf_pass-word"},
        {"a": {"api_key": "pass-word"}},
        {"vllm_server_base_url": "http://me:pass-word@host:8000"},
    ],
)
def test_secrets_in_the_mappings_are_refused_and_not_shown(kind: Any, section: str, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{section}\.{next(iter(given))}.*environment, such as HF_TOKEN") as caught:
        kind(**{section: given})
    assert "pass-word" not in str(caught.value)
    assert kind(trl={"eos_token": "<end>", "pad_token": "<pad>", "hub_token": None})


@pytest.mark.parametrize("key", ["push_to_hub", "hub_model_id", "hub_strategy"])
@pytest.mark.parametrize("owned", [RESERVED_SFT, RESERVED_GRPO])
def test_uploads_are_refused_with_what_to_do(owned: dict[str, str], key: str) -> None:
    with pytest.raises(UserError, match=rf"^trl\.{key}: cannot be set, nothing is uploaded .*model/.*HF_TOKEN"):
        check_options("trl", {key: "x"}, Options, owned)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["learning_rate", "bf16", "optim", "lr_scheduler_type", "save_strategy", "report_to"])
@pytest.mark.parametrize("trains", [check_sft, check_grpo])
def test_values_of_trl_are_checked_before_anything_is_read(trains: Callable[..., object], key: str) -> None:
    roles = ("critic",) if trains is check_sft else ()
    kind = SftConfig if trains is check_sft else GrpoConfig
    config = kind(model="none", data="none", trl={key: "zigzag"})
    with pytest.raises(UserError, match=rf"^trl\.{key}: .*'zigzag'"):
        trains(*roles, config, 1)


def test_weights_that_do_not_fit_are_found_before_a_run(root: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(root / "model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    given = quick(root).model_copy(update={"model": str(model)})
    with pytest.raises(UserError, match=r"\d+ weights are missing, the first is .*layers"):
        check_sft("critic", given, 1)
    check_sft("critic", given, 1, needs_weights=False)


@pytest.mark.parametrize("owned", [RESERVED_SFT, RESERVED_GRPO, RESERVED_LORA])
def test_what_interleave_sets_itself_is_refused_with_the_reason(owned: dict[str, str]) -> None:
    for key, reason in owned.items():
        with pytest.raises(UserError) as error:
            check_reserved("trl", {key: 1}, owned)
        assert reason in str(error.value)


@pytest.mark.parametrize("recipe", SFT_RECIPES + GRPO_RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind = SftConfig if recipe in SFT_RECIPES else GrpoConfig
    config = load(kind, [recipe])
    assert load(kind, [], [f"trl={json.dumps(dict(config.trl))}"]).trl == config.trl
    assert (config.trl.get("deepspeed") is None) == (zero_options(config.trl) == {})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SFT_RECIPES + GRPO_RECIPES, ids=lambda path: path.stem)
def test_recipes_name_options_that_trl_and_peft_have(recipe: Path) -> None:
    from trl import GRPOConfig, SFTConfig

    from interleave.training.trl_options import build_lora_config, check_options

    config = load(SftConfig if recipe in SFT_RECIPES else GrpoConfig, [recipe])
    check_values(config.trl, SFTConfig if recipe in SFT_RECIPES else GRPOConfig)
    if recipe in SFT_RECIPES:
        check_options("trl", config.trl, SFTConfig, RESERVED_SFT)
    else:
        check_options("trl", config.trl, GRPOConfig, RESERVED_GRPO)
    if config.lora is not None:
        assert build_lora_config(config).task_type == "CAUSAL_LM"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft_critic_qwen3vl", "grpo_critic_qwen3vl"])
def test_the_recipe_of_fsdp_goes_over_others_and_names_layers_that_there_are(recipe: str) -> None:
    from transformers.models.qwen3_vl import modeling_qwen3_vl
    from trl import GRPOConfig, SFTConfig

    from interleave.training.trl_options import check_options

    files = [CONFIGS / f"{recipe}.yaml", CONFIGS / "fsdp" / "fsdp2.yaml"]
    trl = load(SftConfig if recipe.startswith("sft") else GrpoConfig, files).trl
    assert trl["deepspeed"] is None
    cls, reserved = (SFTConfig, RESERVED_SFT) if recipe.startswith("sft") else (GRPOConfig, RESERVED_GRPO)
    check_options("trl", trl, cls, reserved)
    for name in trl["fsdp_config"]["transformer_layer_cls_to_wrap"]:
        assert name in vars(modeling_qwen3_vl)


@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config", "accelerator_config"])
def test_a_file_that_a_recipe_names_is_found_beside_it_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    beside = tmp_path / "recipes" / "shared" / "zero.json"
    beside.parent.mkdir(parents=True)
    beside.write_text('{"a": 1e9}')
    (tmp_path / "recipes" / "base.yaml").write_text(f"trl: {{{key}: shared/zero.json}}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.yaml").write_text("extends: ../recipes/base.yaml\nseed: 1")
    monkeypatch.chdir(tmp_path / "run")
    config = load(SftConfig, [Path("mine.yaml")])
    assert config.trl[key] == {"a": 1e9}
    monkeypatch.chdir(tmp_path / "recipes")
    for name in ("shared/zero.json", "gone.json", str(beside)):  # from the working directory, nowhere, absolute
        expected = name if name == "gone.json" else {"a": 1e9}
        (tmp_path / "run" / "other.yaml").write_text(f"trl: {{{key}: {name}}}")
        assert load(SftConfig, [tmp_path / "run" / "other.yaml"]).trl[key] == expected
        assert load(SftConfig, [], [f"trl.{key}={name}"]).trl[key] == expected
    base = tmp_path / "recipes" / "base.yaml"
    assert load(SftConfig, [base], [f"trl.{key}=null"]).trl[key] is None
    beside.write_bytes(b'\xef\xbb\xbf{"a": 1e9, "b": {"c": 1, "d": 2}}')  # as PowerShell writes it
    changed = {"a": 1e9, "b": {"c": 3, "d": 2}}
    assert load(SftConfig, [base], [f"trl.{key}.b.c=3"]).trl[key] == changed
    (tmp_path / "run" / "more.yaml").write_text(f"trl: {{{key}: {{b: {{c: 3}}}}}}")
    assert load(SftConfig, [base, tmp_path / "run" / "more.yaml"]).trl[key] == changed


@pytest.mark.parametrize("section", [None, True, {"stage": "auto"}, {"stage": 4}])
def test_a_section_of_deepspeed_that_is_none_is_named(section: Any) -> None:
    with pytest.raises(UserError, match=r"trl.deepspeed.zero_optimization: must be a mapping with a stage from 0 to 3"):
        zero_options({"deepspeed": {"zero_optimization": section}})


def test_a_file_of_a_recipe_may_lie_in_the_home_folder_and_have_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "zero.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load(SftConfig, [], ["trl.deepspeed=~/zero.json"]).trl["deepspeed"] == {"a": 1}
    with pytest.raises(
        UserError, match=r"a=2: trl.deepspeed: changes a part of the JSON file ~/z.json, which cannot be"
    ):
        load(SftConfig, [], ["trl.deepspeed=~/z.json", "trl.deepspeed.a=2"])
    (tmp_path / "mine.yaml").write_text("trl: {deepspeed: ~/zero.json}")
    assert load(SftConfig, [tmp_path / "mine.yaml"]).trl["deepspeed"] == {"a": 1}


def test_a_run_keeps_the_content_of_the_files_of_its_recipe(tmp_path: Path) -> None:
    from imgen_common.run_folder.folder import RunFolder

    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    given = load(SftConfig, [], [f"trl.deepspeed={file}"])
    run = tmp_path / "run"
    RunFolder.create(run, given, ["t"]).close()
    moved = file.rename(tmp_path / "moved.json")
    for sets in ([], [f"trl.deepspeed={moved}"]):
        config = load(SftConfig, [run / "config.yaml"], sets)
        assert config == given
        RunFolder.open(run, config, ["t"]).close()
    (run / "config.yaml").write_text(f"trl:\n  deepspeed: {moved}\n")  # as earlier versions wrote it
    RunFolder.open(run, load(SftConfig, [run / "config.yaml"]), ["t"]).close()
    moved.write_text('{"zero_optimization": {"stage": 2}}')
    (run / "config.yaml").write_text(to_yaml(given))
    other = load(SftConfig, [run / "config.yaml"], [f"trl.deepspeed={moved}"])
    with pytest.raises(UserError, match=r"has trl.deepspeed.zero_optimization.stage = 3, now 2"):
        RunFolder.open(run, other, ["t"])


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda line: line[:-5], "Invalid JSON"),
        (lambda line: line.replace(b'"completion":"', b'"completion":" ","x":"'), "Extra inputs"),
        (lambda line: line.replace(b"want", b"w\xff"), "not UTF-8"),
        (lambda line: b'{"texts":["a","b"],"image_ids":[],"completion":"c"}', "1 places for 0 images"),
        (lambda line: b'{"texts":["a"],"image_ids":[],"completion":" "}', "answer is empty"),
        (
            lambda line: b'{"texts":["",""],"image_ids":["' + b"0" * 64 + b'"],"completion":"c"}',
            "000000000000... is not",
        ),
        (lambda line: line.replace(b"want", b"w<|im_end|>"), "the text holds <|im_end|>"),
        (lambda line: line.replace(b'"texts":[""', b'"texts":["<|vision_start|><|image_pad|>"'), "<|vision_start|>"),
        (lambda line: line.replace(WHITE.id.encode(), WIDE.id.encode()), "is 300x1; models take at most 200 times"),
        (lambda line: line.replace(WHITE.id.encode(), BROKEN.encode()), "not an image that can be read"),
    ],
)
def test_a_bad_row_is_named(root: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    store = ImageStore(root / "set" / "images")
    store.put(WIDE)
    store.path(BROKEN).parent.mkdir(parents=True, exist_ok=True)
    store.path(BROKEN).write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = (root / "set" / "critic_sft.jsonl").read_bytes().splitlines()
    lines[2] = spoil(lines[2])
    (tmp_path / "critic_sft.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "images").symlink_to(root / "set" / "images")
    with pytest.raises(UserError, match=r"critic_sft\.jsonl:3: ") as error:
        read_rows(tmp_path, "critic_sft", SftRow)
    assert said in str(error.value)


def test_answers_that_cannot_be_read_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(root / "set", "critic_sft", SftRow)
    config = SftConfig(model="m", data=str(root / "set"))
    warn_of_unreadable_answers("critic", rows, config)
    assert capsys.readouterr().err == ""
    wrong = rows[1].model_copy(update={"completion": "<think>so</think><answer>maybe</answer>"})
    warn_of_unreadable_answers("critic", [rows[0], wrong, rows[2], wrong], config)
    said = capsys.readouterr().err
    assert f"{root / 'set'}: 2 of 4 answers cannot be read as those of a critic (first in row 2: " in said
    warn_of_unreadable_answers("planner", rows, config)
    assert f"{len(rows)} of {len(rows)} answers cannot be read as those of a planner" in capsys.readouterr().err


def test_a_missing_or_empty_set_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'critic_sft'"):
        read_rows(root / "set", "critic_stf", SftRow)
    with pytest.raises(UserError, match=r"is a file; give the folder of the set that has it, .*set$"):
        read_rows(root / "set" / "critic_sft.jsonl", "critic_sft", SftRow)
    (tmp_path / "critic_sft.jsonl").touch()
    with pytest.raises(UserError, match="holds no rows"):
        read_rows(tmp_path, "critic_sft", SftRow)


def test_the_length_is_that_of_the_processor_and_long_rows_are_left_out(
    root: Path, rows: list[SftRow], capsys: pytest.CaptureFixture[str]
) -> None:
    store = ImageStore(root / "set" / "images")
    mixed = [*rows[:2], planner_row(1)]
    lengths = []
    for row in mixed:
        processor = models.processor()
        said = {"role": "assistant", "content": [{"type": "text", "text": row.completion}]}
        talk = [*to_conversation(row.message(store.get)), said]
        whole = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
        lengths.append(num_tokens(row, processor, store))
        assert lengths[-1] == len(whole["input_ids"][0])
    limit = sorted(lengths)[1]
    kept = select_by_length(mixed, models.processor(), store, limit)
    assert kept == [i for i, length in enumerate(lengths) if length <= limit]
    said = f"1 of 3 rows have more than max_length {limit} tokens and are left out; the longest has {max(lengths)}"
    assert said in capsys.readouterr().err
    assert select_by_length(mixed, models.processor(), store, limit, answer=1) != kept
    with pytest.raises(UserError, match=f"the shortest has {min(lengths)} tokens"):
        select_by_length(mixed, models.processor(), store, 5)


def test_a_limit_on_pixels_shrinks_images_as_at_run_time() -> None:
    from interleave.training import run as launch

    processor = launch.load_processor(SftConfig(max_pixels=40 * 40))
    assert processor.image_processor.size["longest_edge"] == 40 * 40
    with pytest.raises(UserError, match=r"max_pixels 1023: the processor of builtin:shapes/critic takes .*; give more"):
        launch.load_processor(SftConfig(max_pixels=1023))


def real_template() -> str:
    """The chat template of Qwen3-VL, which TRL carries."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / "qwen3_vl.jinja").read_text()


@pytest.mark.parametrize("own", [True, False])
def test_think_survives_the_chat_template(rows: list[SftRow], own: bool) -> None:
    processor = models.processor()
    if own:
        processor.chat_template = real_template()
    check_chat_template(processor, rows[0])
    said = {"role": "assistant", "content": rows[0].completion}
    text = processor.apply_chat_template([chat_turns(rows[0])[0], said], tokenize=False)
    assert "<think>want red</think><answer>" in text


def test_a_template_that_drops_thoughts_is_refused(rows: list[SftRow]) -> None:
    processor = models.processor()
    processor.chat_template = processor.chat_template.replace("{{ c.text }}", "{{ c.text.split('</think>')[-1] }}")
    with pytest.raises(UserError, match="changes the answer"):
        check_chat_template(processor, rows[0])


@pytest.mark.parametrize("role", ["planner", "critic"])
def test_without_reasoning_every_check_sees_the_answer_alone(role: Any, root: Path, tmp_path: Path) -> None:
    """A row that is too long with its thought is kept without it, and a template that drops thoughts is none's end."""
    shutil.copytree(root / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ c.text }}", "{{ c.text.split('</think>')[-1] }}"))
    shutil.copytree(root / "set", tmp_path / "set")
    row = planner_row(0) if role == "planner" else critic_row(0, ImageStore(tmp_path / "set" / "images"))
    assert row.completion.startswith("<think>")
    said = row.completion.partition("</think>")[2]
    given = [said, f" {said}", f"<think>{'keep ' * 400}</think>\n{said}", f"</think>{said}"]
    lines = [row.model_copy(update={"completion": answer}).model_dump_json() for answer in given]
    for name in (f"{role}_sft", f"{role}_sft.val"):
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(lines))
    config = quick(tmp_path)
    with pytest.raises(UserError, match="changes the answer"):
        check_sft(role, config.model_copy(update={"data": str(root / "set")}), 1, needs_weights=False)
    job = check_sft(role, config.model_copy(update={"reasoning": False}), 1, needs_weights=False)
    assert [row.completion for row in job.rows] == [said, f" {said}", said, said]
    assert job.rows == job.val_rows
    lines[1] = row.model_copy(update={"completion": "<think>a</think> "}).model_dump_json()
    (tmp_path / "set" / f"{role}_sft.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"_sft\.jsonl:2: the answer is empty"):
        check_sft(role, config.model_copy(update={"reasoning": False}), 1, needs_weights=False)


@given(
    kinds=st.lists(st.booleans(), min_size=1, max_size=60),
    batch=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.none() | st.integers(0, 99),
)
def test_every_batch_is_of_one_kind_and_every_row_comes(
    kinds: list[bool], batch: int, epochs: int, seed: int | None
) -> None:
    order = order_by_kind(kinds, batch, epochs, seed)
    assert len(order) % (batch * epochs) == 0
    for start in range(0, len(order), batch):
        assert len({kinds[i] for i in order[start : start + batch]}) == 1
    size = len(order) // epochs
    for epoch in range(epochs):
        assert set(order[epoch * size : (epoch + 1) * size]) == set(range(len(kinds)))
    assert size - len(kinds) < 2 * batch
    assert order == order_by_kind(kinds, batch, epochs, seed)


def test_passes_differ_in_order() -> None:
    order = order_by_kind([True] * 40, 4, 2, 0)
    assert order[:40] != order[40:]


# --- weights ---------------------------------------------------------------------------------------------------------


def test_which_weights_learn() -> None:
    size = models.ModelSize(width=64, layers=1, vision_width=32, vision_layers=2)
    model = models.build_model(size, models.tokenizer())
    names = [name for name, _ in model.named_parameters()]

    def learning(vision: Any) -> set[str]:
        freeze_vision(model, vision)
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    assert learning("train") == set(names)
    assert learning("frozen") == {name for name in names if ".visual." not in name}
    quirk = learning("reference") - learning("frozen")
    assert quirk == {name for name in names if ".visual.pos_embed." in name or ".visual.deepstack_merger_list." in name}
    assert len(quirk) > 1


TARGETS = {
    "a typo": (["q_proj", "v_prj"], "frozen", "'v_prj'; did you mean 'v_proj'"),
    "part of a name": (["q_proj", "proj"], "frozen", "'proj'"),
    "one within the frozen tower": (["q_proj", "qkv"], "frozen", "outside the frozen vision tower .* 'qkv'"),
    "names of another model": (["query_key_value", "dense"], "train", "'query_key_value'.*, 'dense'"),
    "none": ([], "train", "any of them"),
    "a pattern": (r".*self_attention\.q_proj", "train", "lora: "),
    "a layer without weights to adapt": (["norm"], "frozen", "lora: Target module"),
    "a module of layers": (["self_attn"], "frozen", r"lora: Target module \w+ is not supported.*give names of linear"),
}


@pytest.mark.parametrize("case", tiers(TARGETS, default=["a typo", "one within the frozen tower", "none"]))
def test_target_modules_that_match_no_layer_are_named(root: Path, case: str) -> None:
    targets, vision, said = TARGETS[case]
    with pytest.raises(UserError, match=said):
        check_adapters(quick(root, {"r": 2, "target_modules": targets}, vision))


@pytest.mark.parametrize(
    ("lora", "refused"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["language_model.embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": "all-linear"}, False),
    ],
)
def test_adapters_on_embeddings_that_are_the_output_layer_too(root: Path, lora: dict[str, Any], refused: bool) -> None:
    said = pytest.raises(UserError, match=r"one weight with the output layer .* put embed_tokens into lora.modules_to")
    with said if refused else contextlib.nullcontext():
        check_adapters(quick(root, {"r": 2} | lora))


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (False, None),
        *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in ((False, True), (True, None), (True, False))),
    ],
)
def test_the_outer_configuration_says_whether_embeddings_are_the_output_layer(
    tmp_path: Path, outer: bool, inner: bool | None
) -> None:
    """As in the published ones of Qwen3-VL: that of 8B has the key outside only."""
    folder = shutil.copytree(hub.resolve("builtin:shapes/critic"), tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    described["tie_word_embeddings"] = outer
    described["text_config"].pop("tie_word_embeddings", None)
    described["text_config"] |= {} if inner is None else {"tie_word_embeddings": inner}
    (folder / "config.json").write_text(json.dumps(described))
    said = pytest.raises(UserError, match="one weight with the output layer")
    with said if outer else contextlib.nullcontext():
        check_adapters(SftConfig(model=str(folder), lora={"r": 2, "target_modules": ["embed_tokens"]}))


UNMATCHED: dict[str, tuple[dict[str, Any], str]] = {
    "a module to save": (
        {"modules_to_save": ["lm_hed"]},
        r"lora.modules_to_save: no layer .*'lm_hed'; did you mean 'lm_head'",
    ),
    "a parameter": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "lora.target_parameters: no parameter"),
    "a rank": ({"rank_pattern": {"q_prj": 4}}, "lora: .*rank_pattern.*q_prj"),
    "an exclusion": ({"exclude_modules": ["k_proj", "v_prj"]}, "lora.exclude_modules: no layer .*'v_prj'; did you"),
    "an alpha": ({"alpha_pattern": {"layers.99.q_proj": 4}}, "lora: .*alpha_pattern.*layers.99"),
    "a layer's number": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 40]},
        r"lora.layers_to_transform: no adapted layer has the number 40; there are 0 to 0",
    ),
    "a pattern that is none": ({"target_modules": "("}, "^lora: "),
    "a choice that peft does not have": ({"bias": "alll"}, "^lora: .*alll"),
}


@pytest.mark.parametrize("case", tiers(UNMATCHED, default=list(UNMATCHED)[:6]))
def test_other_entries_of_lora_that_match_nothing_are_named(root: Path, case: str) -> None:
    lora, said = UNMATCHED[case]
    with pytest.raises(UserError, match=said):
        check_adapters(quick(root, {"r": 2} | lora, "train" if "exclude_modules" in lora else "frozen"))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": "16"}, r"lora\.r: must be a whole number, got '16'"),
        ({"r": 0}, r"lora\.r: must be above 0, got 0"),
        ({"lora_alpha": 0}, r"lora\.lora_alpha: must be above 0, got 0; adapters would change nothing"),
        ({"lora_alpha": True}, r"lora\.lora_alpha: must be a whole number, got True"),
        ({"use_rslora": "no"}, r"lora\.use_rslora: must be true or false, got 'no'"),
        ({"lora_dropout": "0.1"}, r"lora\.lora_dropout: must be a finite number, got '0\.1'"),
        *(
            (
                {"init_lora_weights": start},
                rf"lora\.init_lora_weights: '?{start}'? cannot be trained from; allowed: true",
            )
            for start in ("eva", "pissa_niter_16", "loftq", "lora_ga", False)
        ),
        ({"lora_bias": True}, r"lora\.lora_bias: cannot be set, the adapters are merged into the model at the end"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: cannot be set, the adapters are merged"),
        ({"peft_type": "IA3"}, r"lora\.peft_type: cannot be set, it is LORA"),
        ({"trainable_token_indices": [1]}, r"lora\.trainable_token_indices: cannot be set"),
    ],
)
def test_values_that_no_option_of_lora_has_are_refused(lora: dict[str, Any], said: str) -> None:
    from interleave.training.trl_options import build_lora_config

    with pytest.raises(UserError, match=said):
        build_lora_config(SftConfig(lora={"r": 2} | lora))
    assert build_lora_config(SftConfig(lora={"r": 2, "lora_alpha": 1, "lora_dropout": 0})).r == 2
    assert build_lora_config(SftConfig(lora={"r": 2, "init_lora_weights": "pissa"})).init_lora_weights == "pissa"


def test_entries_of_lora_that_match_are_taken(root: Path) -> None:
    lora = {
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 2},
    }
    check_adapters(quick(root, {"r": 2, "target_modules": ["q_proj"]} | lora))
    some = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    check_adapters(quick(root, {"r": 2} | some))


@pytest.mark.parametrize("given", ["wandb", ["tensorboard", "trackio"]])
def test_a_tracker_that_is_not_installed_is_found_before_a_run_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch, given: str | list[str]
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"trl.report_to: (wandb|trackio) is not installed; run: pip install"):
        check_trackers_installed([given] if isinstance(given, str) else given)
    check_trackers_installed(["tensorboard"])


@pytest.mark.parametrize("checkpoint", [None, "checkpoint-1"])
def test_a_tracker_that_does_not_start_is_named(checkpoint: str | None) -> None:
    from interleave.training import run as launch

    class MlflowException(Exception):
        __module__ = "mlflow.exceptions"

    def train(resume_from_checkpoint: str | None) -> None:
        raise MlflowException("API request failed:\nConnection refused")

    trainer = SimpleNamespace(args=SimpleNamespace(report_to=["mlflow"]), model=torch.nn.Linear(1, 1), train=train)
    trainer.pop_callback = trainer.add_callback = lambda callback: None
    callback = SimpleNamespace(shutdown=contextlib.nullcontext(), began=False)
    said = (
        r"^trl.report_to: mlflow does not start \(API request failed: Connection refused\); correct that, or leave it"
    )
    with pytest.raises(OptionsRefusedError, match=said):
        launch.run_training(trainer, callback, checkpoint)
    callback.began = True
    with pytest.raises(MlflowException):
        launch.run_training(trainer, callback, checkpoint)


def test_a_resumed_run_is_one_run_of_its_tracker(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interleave.training.run import open_run

    begun: list[dict[str, Any]] = []

    def init(**given: Any) -> SimpleNamespace:
        begun.append(given)
        return SimpleNamespace(id="id-1", project=given["project"])

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__name__="wandb", init=init, finish=lambda: None))
    for resume in (None, tmp_path / "sft"):
        arguments = SimpleNamespace(device="cpu", report_to=["tensorboard", "wandb"], output_dir="")
        where = {"runs": tmp_path, "name": None, "default_name": "sft", "resume": resume}
        with open_run(quick(root), arguments, ["interleave", "sft"], **where):
            assert arguments.report_to == ["tensorboard"]
    assert [(one["resume"], one.get("id")) for one in begun] == [("never", None), ("allow", "id-1")]


def test_how_to_continue_names_the_last_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from interleave.training.run import message_how_to_continue

    for name, is_whole in (("checkpoint-2", True), ("checkpoint-2-backup", True), ("checkpoint-4", False)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if is_whole:
            (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), message_how_to_continue(SimpleNamespace(path=tmp_path), "sft critic"):
        raise KeyboardInterrupt
    assert "saved up to update 2; continue with: interleave sft critic --resume" in capsys.readouterr().err


def test_layers_are_counted_by_target_module(root: Path) -> None:
    count = {}
    for targets in (["q_proj", "layers.0.self_attn.v_proj"], "all-linear"):
        model = build_meta_model(quick(root, {"r": 2, "target_modules": targets}))
        count |= layers_of_targets(model, targets)
    assert count == {"q_proj": 2, "layers.0.self_attn.v_proj": 1, "all-linear": 14}


REENTRANT: dict[str, dict[str, Any]] = {
    "asked for": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "torch's default": {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
    "under its new name": {"gradient_checkpointing": False, "activation_checkpointing": True}
    | {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    "as TRL does under ZeRO-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


@pytest.mark.parametrize("case", tiers(REENTRANT, default=["asked for", "as TRL does under ZeRO-3"]))
def test_adapters_on_the_vision_tower_exclude_reentrant_checkpointing(root: Path, case: str) -> None:
    trl = {"gradient_checkpointing": True, **REENTRANT[case]}
    with pytest.raises(UserError, match=r"gets no gradient under re-entrant .*; set vision: frozen, or trl\.gradient_"):
        check_adapters(quick(root, {"r": 2}, "train", **trl))
    allowed = [({"r": 2}, "frozen"), ({"r": 2, "target_modules": ["q_proj"]}, "train"), (None, "train")]
    for lora, vision in allowed[: 1 if case == "asked for" else None]:
        check_adapters(quick(root, lora, vision, **trl))


@pytest.mark.parametrize(
    ("lora", "vision"),
    [
        ({"target_modules": r".*(qkv|q_proj)"}, "train"),
        ({"target_modules": r".*visual.*(qkv|proj)"}, "train"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["merger"]}, "train"),
    ],
)
def test_a_vision_tower_is_not_adapted_on_rows_without_images(root: Path, lora: Any, vision: str) -> None:
    config = quick(root, {"r": 2} | lora, vision)
    with pytest.raises(
        UserError, match=r"lora adapts the vision tower, but no row of .* has an image, .*; set vision: frozen"
    ):
        check_adapters(config, has_images=False)
    check_adapters(config)
    for left_out in ({"r": 2, "target_modules": ["q_proj"]}, None):
        check_adapters(quick(root, left_out, "train"), has_images=False)


@pytest.mark.parametrize("targets", [r".*visual.*(qkv|proj)", ["qkv"]])
def test_adapters_of_a_frozen_vision_tower_are_refused(root: Path, targets: Any) -> None:
    with pytest.raises(UserError, match="lora"):
        check_adapters(quick(root, {"r": 2, "target_modules": targets}, "frozen"), has_images=False)


@pytest.mark.parametrize("lora", [{"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_other_weights_of_a_frozen_vision_tower_are_not_trained(root: Path, lora: dict[str, Any]) -> None:
    config = quick(root, {"r": 2, "target_modules": ["q_proj"]} | lora)
    with pytest.raises(UserError, match=r"lora trains \d+ weights of the vision tower, .*visual.* with vision: frozen"):
        check_adapters(config)
    check_adapters(config.model_copy(update={"vision": "train"}))
    check_adapters(quick(root, {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}))


def test_peft_does_not_change_a_configuration(root: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    config = quick(root, lora)
    build_meta_model(config)
    assert config.lora is not None
    assert config.lora["modules_to_save"] == ["embed_tokens"]


@pytest.mark.parametrize("needs_weights", [True, False])
def test_words_without_embeddings_are_found_before_a_run(root: Path, tmp_path: Path, needs_weights: bool) -> None:
    from transformers import AutoProcessor

    shutil.copytree(root / "model", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    processor.tokenizer.add_tokens([f"word{number}" for number in range(200)])
    processor.save_pretrained(tmp_path / "model")
    said = r"its tokenizer has \d+ words, its Qwen3VLForConditionalGeneration embeddings of \d+"
    given = {"model": str(tmp_path / "model")}
    with pytest.raises(UserError, match=said):
        check_sft("critic", quick(root).model_copy(update=given), 1, needs_weights=needs_weights)
    with pytest.raises(UserError, match=said):
        check_grpo(GrpoConfig(data=str(root / "set"), **given), 1, needs_weights=needs_weights)


def test_a_run_goes_on_with_the_agent_that_it_trains(root: Path, tmp_path: Path) -> None:
    from interleave.training import sft

    record_data(tmp_path, {name: hash_rows([]) for name in ("planner_sft", "planner_sft.val", "model")})
    said = rf"{tmp_path}: trains the planner; resume it with interleave sft planner --resume {tmp_path}$"
    with pytest.raises(UserError, match=said):
        sft.train_sft("critic", quick(root), ["t"], resume=tmp_path)
    assert sft.trained_agent(tmp_path) == "planner"
    assert sft.trained_agent(root) is None


@pytest.mark.parametrize("case", tiers(["asked for", "torch's default"], slow=["asked for"]))
def test_weights_without_gradient_end_the_run_by_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Where nothing refused them; on a mixed set, whose rows without images give the vision tower no gradient."""
    from interleave.training import sft

    config = quick(root, {"r": 2}, "train", gradient_checkpointing=True, **REENTRANT[case])
    monkeypatch.setattr(sft, "check_adapters", lambda config, has_images: None)
    with pytest.raises(UserError, match=r"no gradient reaches \S+visual\.blocks\.0\.\S+lora_A\S+, .* and \d+ more"):
        sft.train_sft("critic", config, ["t"], runs=tmp_path)
    assert sft.train_sft("planner", quick(root, {"r": 2}, "train"), ["t"], runs=tmp_path).is_dir()


def test_names_of_other_vision_towers_and_of_adapters() -> None:
    assert is_frozen("model.vision_tower.encoder.layers.0.weight", "frozen")
    assert is_frozen("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight", "frozen")
    assert not is_frozen("model.language_model.layers.0.self_attn.q_proj.weight", "frozen")
    assert is_frozen("model.multi_modal_projector.linear_1.weight", "frozen")


def test_a_model_without_a_vision_tower_is_refused() -> None:
    import torch

    with pytest.raises(UserError, match="no vision tower found in Linear"):
        freeze_vision(torch.nn.Linear(2, 2), "frozen")
    other = torch.nn.ModuleDict({"vision_tower": torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})})
    freeze_vision(other, "frozen")
    with pytest.raises(UserError, match="vision: reference is of Qwen's models, and would train the whole tower"):
        freeze_vision(other, "reference")


@pytest.mark.parametrize("name", ["visual", "mlp"])
def test_a_weight_that_no_file_holds_is_not_made_up(root: Path, name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "model", tmp_path / "changed"))
    drop_weight(folder / "model.safetensors", name)
    with pytest.raises(UserError, match=rf"changed: 1 weights are missing, the first is .*{name}"):
        load_model(SftConfig(model=str(folder), data="none"))


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_of_a_variant_are_loaded(root: Path, variant: str, tmp_path: Path) -> None:
    changed = shutil.copytree(root / "model", tmp_path / "model")
    (changed / "model.safetensors").rename(changed / f"model.{variant}.safetensors")
    found, expected = (
        load_model(SftConfig(model=str(folder), data="none")).state_dict() for folder in (changed, root / "model")
    )
    assert all((found[name] == value).all() for name, value in expected.items())


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_sums_of_the_papers_recipe() -> None:
    trl = load(SftConfig, [CONFIGS / "sft_critic_qwen3vl.yaml"]).trl
    sums = plan_sft_batches(trl, 112_000, 3, 8)
    assert (sums.rows_per_update, sums.updates_per_epoch, sums.updates) == (16, 7000, 14_000)
    assert plan_sft_batches({"max_steps": 5}, 10, 0, 1).updates == 5
    mixed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    sums = plan_sft_batches(mixed, 10, 0, 2, num_with_images=3)  # batches of 4: one with images, two without
    assert (sums.repeated, sums.updates_per_epoch, sums.updates) == (2, 1, 2)
    dropped = {"per_device_train_batch_size": 3, "num_train_epochs": 2, "dataloader_drop_last": True}
    assert plan_sft_batches(dropped, 8, 0, 1).updates == 4
    assert plan_sft_batches(dropped, 8, 0, 1, num_with_images=4).updates == 8
    with pytest.raises(UserError, match=r"8 rows do not fill a batch of 9; .* leave out trl.dataloader_drop_last"):
        plan_sft_batches(dropped, 8, 0, 3)
    order = order_by_kind([True] * 3 + [False] * 7, 4, 1, 0)
    assert len(order) - 10 == sums.repeated
    with pytest.raises(UserError, match=r"trl.per_device_train_batch_size: must be a positive whole number, got 0"):
        plan_sft_batches({"per_device_train_batch_size": 0}, 10, 0, 1)


def test_what_a_process_holds() -> None:
    whole = estimate_static_memory(100, 100, size=4, master=False, stage=0, processes=8)
    assert (whole.weights, whole.gradients, whole.optimizer) == (400, 400, 800)
    zero2 = estimate_static_memory(800, 800, size=2, master=True, stage=2, processes=8)
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (1600, 200, 1200)
    zero3 = estimate_static_memory(800, 400, size=2, master=True, stage=3, processes=8)
    assert (zero3.weights, zero3.gradients, zero3.optimizer, zero3.static) == (200, 100, 600, 900)


def test_a_launcher_that_did_not_do_what_was_asked_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from interleave.training import run as launch

    cases = {
        "one was started.* torchrun --nproc_per_node N -m interleave grpo": {
            "ACCELERATE_MIXED_PRECISION": "no",
            "MASTER_ADDR": "127.0.0.1",
        },
        "asks for DEEPSPEED; interleave shards weights itself": {"RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"},
        r"asks for FSDP; .*fsdp2\.yaml": {"RANK": "0", "ACCELERATE_USE_FSDP": "1"},
        "asks for MEGATRON_LM; .* launch with plain multi-GPU$": {"ACCELERATE_USE_MEGATRON_LM": "true"},
        "asks for mixed_precision fp8; .*--mixed_precision no": {"ACCELERATE_MIXED_PRECISION": "fp8"},
    }
    for said, environment in cases.items():
        monkeypatch.setattr(launch.os, "environ", environment)
        with pytest.raises(UserError, match=said):
            launch.num_processes("interleave grpo")
    place = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.setattr(launch.os, "environ", {"WORLD_SIZE": "3", "RANK": "0", **place})
    assert launch.num_processes("interleave grpo") == 3


# --- training (slow) -------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def quick(root: Path, lora: Any = None, vision: Any = "frozen", **trl: Any) -> SftConfig:
    return SftConfig(
        model=str(root / "model"), data=str(root / "set"), vision=vision, lora=lora, max_length=512, trl=QUICK | trl
    )


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def killer(step: int) -> Any:
    """A callback that stops everything after an update, as a kill would, before anything is saved for it."""
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    return Killer()


@pytest.mark.slow
def test_our_defaults_are_trls() -> None:
    from dataclasses import fields

    from trl import GRPOConfig, SFTConfig

    from interleave.training.batch_plan import TrlBatchOptions

    given = {f.name: f.default for cls in (SFTConfig, GRPOConfig) for f in fields(cls)}
    for field in fields(TrlBatchOptions):
        default = given[field.name]
        assert field.default == getattr(default, "value", default), field.name


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_only_the_answer_is_learnt(root: Path, rows: list[SftRow], own: bool) -> None:
    """Of TRL's collator: labels begin with the answer, end with the end of turn, hold no image token; the prompt is
    that of run time."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from interleave.training.rows import sft_example

    processor = models.processor()
    if own:
        processor.chat_template = real_template()
    store = ImageStore(root / "set" / "images")
    batch = [rows[0], rows[1]]
    items = [sft_example(row, store.get) for row in batch]
    made = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(items)
    words = processor.tokenizer
    for i, row in enumerate(batch):
        prompt = processor.apply_chat_template(
            to_conversation(row.message(store.get)), tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"][0]
        ids = made["input_ids"][i][made["attention_mask"][i] == 1].tolist()
        labels = made["labels"][i][made["attention_mask"][i] == 1].tolist()
        assert ids[: len(prompt)] == prompt
        assert labels[: len(prompt)] == [-100] * len(prompt)
        learnt = labels[len(prompt) :]
        assert learnt == ids[len(prompt) :]
        assert words.decode(learnt) == row.completion + "<|im_end|>\n"
        assert words.convert_tokens_to_ids("<|image_pad|>") not in learnt
    assert (made["labels"][made["attention_mask"] == 0] == -100).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_and_the_chat_loads_them(root: Path, tmp_path: Path) -> None:
    from interleave.models.chat.local import LocalChat, LocalChatConfig
    from interleave.training import sft

    config = quick(root)
    straight = sft.train_sft("critic", config, ["test"], runs=tmp_path, name="straight")
    for moment in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            sft.train_sft("critic", config, ["test"], runs=tmp_path, name=f"k{moment}", callbacks=[killer(moment)])
        torn = tmp_path / f"k{moment}" / "checkpoints" / "checkpoint-9"
        torn.mkdir(parents=True)
        again = sft.train_sft("critic", config, ["test"], resume=tmp_path / f"k{moment}")
        assert digest(again) == digest(straight)
        assert not torn.exists()
        assert losses(again.parent) == losses(straight.parent)
        assert len(losses(straight.parent)) == 4
    before, after = weights(root / "model"), weights(straight)
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed == {name for name in before if ".visual." not in name}
    assert not list(straight.rglob("*.bin"))
    chat = LocalChat(LocalChatConfig(ref=str(straight), device="cpu", max_new_tokens=4))
    store = ImageStore(root / "set" / "images")
    (reply,) = chat.answer([(critic_row(0, store).message(store.get), 0)])
    assert not isinstance(reply, BaseException)
    with pytest.raises(UserError, match="is finished"):
        sft.train_sft("critic", config, ["test"], resume=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        sft.train_sft("critic", config, ["test"], runs=tmp_path, name="other", callbacks=[killer(1)])
    with pytest.raises(UserError, match=r"trl.learning_rate = 0.001, now 0.1"):
        sft.train_sft("critic", quick(root, learning_rate=0.1), ["test"], resume=tmp_path / "other")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "moment"), [(signal.SIGTERM, 2), (signal.SIGHUP, 1), (signal.SIGINT, 3)])
def test_a_signal_ends_the_update_and_saves_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, moment: int
) -> None:
    from transformers import TrainerCallback

    from interleave.training import sft

    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == moment - 1:
                signal.raise_signal(number)

    config = quick(root, save_steps=100)
    straight = sft.train_sft("critic", config, ["test"], runs=tmp_path, name="straight")
    with pytest.raises(KeyboardInterrupt):
        sft.train_sft("critic", config, ["test"], runs=tmp_path, name="stopped", callbacks=[Signal()])
    run = tmp_path / "stopped"
    said = f"stopped; saved up to update {moment}; continue with: interleave sft critic --resume {run}"
    assert said in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{moment}"]
    again = sft.train_sft("critic", config, ["test"], resume=run)
    assert digest(again) == digest(straight)


@pytest.mark.exhaustive
@pytest.mark.parametrize("role", ["critic", "planner"])
def test_processes_killed_at_random_moments_lose_nothing_and_do_nothing_twice(
    root: Path, tmp_path: Path, role: str
) -> None:
    """The planner's rows are mixed, and laid out in batches of one kind."""
    config = quick(root, max_steps=60)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    straight = assert_kills_change_nothing(tmp_path / "runs", ["sft", role, str(tmp_path / "c.yaml")], num_updates=60)
    assert len(losses(straight)) == 60
    assert digest(straight / "model") != digest(root / "model")


@pytest.mark.slow
def test_an_adapter_is_trained_beside_the_vision_tower_and_added_to_the_weights(root: Path, tmp_path: Path) -> None:
    from interleave.training import sft

    model = sft.train_sft("critic", quick(root, lora={"r": 4}), ["test"], runs=tmp_path)
    before, after = weights(root / "model"), weights(model)
    assert set(after) == set(before)
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed
    assert not any(".visual." in name or "norm" in name for name in changed)
    assert (model.parent / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_text_alone_and_mixed_sets_train(root: Path, tmp_path: Path) -> None:
    from interleave.training import sft

    assert (sft.train_sft("planner", quick(root, max_steps=-1, num_train_epochs=2), ["t"], runs=tmp_path)).is_dir()
    sums = sft.check_sft("planner", quick(root, max_steps=-1, num_train_epochs=2), 1).batch_plan
    assert max(line["step"] for line in lines(tmp_path / "sft_planner")) == sums.updates == 8
    plain = root / "plain"
    plain.mkdir()
    write(plain / "planner_sft.jsonl", [planner_row(i) for i in range(4)])
    config = quick(root).model_copy(update={"data": str(plain)})
    assert sft.train_sft("planner", config, ["t"], runs=tmp_path, name="plain").is_dir()


@pytest.mark.slow
def test_accumulation_changes_nothing(root: Path, tmp_path: Path) -> None:
    """Answers differ in length, so that a mean over micro-batches would not be the mean over tokens."""
    from interleave.training import sft

    found = []
    for batch, steps in ((4, 1), (1, 4)):
        config = quick(root, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=2)
        found.append(losses(sft.train_sft("critic", config, ["t"], runs=tmp_path, name=f"{batch}x{steps}").parent))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_bad_options_are_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    from interleave.training import sft

    cases = {
        "did you mean 'learning_rate'": {"learing_rate": 1},
        "output_dir: cannot be set": {"output_dir": "x"},
        "eval_strategy": {"eval_strategy": "steps"},
        "eval_on_start.*missing": {"eval_on_start": True},
        "activation_offloading: .*leave it out": {"activation_offloading": True},
        "cannot be read": {"deepspeed": "none.json"},
        "No such file or directory: 'none.json'": {"accelerator_config": "none.json"},
        "ZeRO-3 needs": {"deepspeed": {"zero_optimization": {"stage": 3}}},
        "does not shard weights on a CPU": SHARDS["fsdp2"],
    }
    for said, trl in cases.items():
        with pytest.raises(UserError, match=said):
            sft.train_sft("critic", quick(root, **trl), ["t"], runs=tmp_path)
    with pytest.raises(UserError, match="did you mean 'lora_alpha'"):
        sft.train_sft("critic", quick(root, lora={"lora_alfa": 1}), ["t"], runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("__init__", ValueError("no such\nloss")),
        ("__init__", ConnectionError("the vLLM server is gone")),
        ("create_optimizer", TypeError("betas")),
        ("get_train_dataloader", KeyError("x")),
    ],
)
def test_a_trainer_that_refuses_its_options_leaves_one_line_and_no_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    from transformers import Trainer

    from interleave.training import sft

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, place, refuse)
    with pytest.raises(UserError, match=r"^trl: TRL refuses these options: ") as caught:
        sft.train_sft("critic", quick(root), ["t"], runs=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_of_an_update_keeps_its_traceback_and_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    from interleave.training import sft

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(ValueError, match="a mistake"):
        sft.train_sft("critic", quick(root), ["t"], runs=tmp_path, name="run")
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process on a mixed set."""
    runs = tmp_path_factory.mktemp("alone")
    (runs / "c.yaml").write_text(to_yaml(quick(root, max_steps=6)))
    forked(1, "sft", "planner", str(runs / "c.yaml"), "--runs", str(runs), log=runs / "log")
    return losses(runs / "sft_planner")


@pytest.mark.parametrize("shard", tiers(SHARDS, slow=["fsdp2"]))
def test_two_processes_give_the_losses_of_one_and_go_on_exactly(
    root: Path, alone: list[float], tmp_path: Path, shard: str
) -> None:
    """On a mixed set, which would hang ZeRO-3 and FSDP if processes differed in whether they run the vision tower."""
    from interleave.models.chat.local import LocalChat, LocalChatConfig

    config = quick(root, **{"max_steps": 6, "per_device_train_batch_size": 1, **SHARDS[shard]})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    begin, go_on = ("sft", "planner", str(tmp_path / "c.yaml"), "--runs", str(tmp_path)), ("sft", "planner", "--resume")
    if shard == "zero2":
        launched(2, *begin)
    else:
        forked(2, *begin, log=tmp_path / "log", shard=shard)
    run = tmp_path / "sft_planner"
    assert losses(run) == pytest.approx(alone, abs=1e-3)
    assert len(alone) == 6
    straight = digest(run / "model")
    LocalChat(LocalChatConfig(ref=str(run / "model"), device="cpu"))
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "checkpoint-6" / "manifest.json").unlink()  # as if killed while it was written
    if shard == "zero2":
        launched(2, *go_on, str(run), launcher=ACCELERATE)
    else:
        forked(2, *go_on, str(run), log=tmp_path / "log", shard=shard)
    assert digest(run / "model") == straight


@pytest.mark.slow
def test_a_plan_counts_what_fsdp_shares_out(root: Path) -> None:
    from interleave.training import sft

    (_, one, first), (_, two, _) = (
        sft.plan_sft("critic", quick(root, **SHARDS["fsdp2"]), processes) for processes in (1, 2)
    )
    rows = (Path(quick(root).data) / "critic_sft.jsonl").read_text().splitlines()
    assert first.completion == json.loads(rows[0])["completion"]
    assert first.lines()[-3:] == ["the answer that is learned:", f"  {first.completion}", ""]
    assert two.static == pytest.approx(one.static / 2, rel=1e-3)
    assert two.activation == one.activation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "vision", "trl"),
    [
        (None, "frozen", {}),
        pytest.param(None, "train", {"gradient_checkpointing": True}, marks=pytest.mark.exhaustive),
        pytest.param(None, "train", {"bf16": True}, marks=pytest.mark.exhaustive),
        ({"r": 4, "target_modules": "all-linear"}, "frozen", {"gradient_checkpointing": True}),
    ],
    ids=["frozen", "whole", "bf16", "lora"],
)
def test_an_update_holds_what_the_plan_says(root: Path, tmp_path: Path, lora: Any, vision: Any, trl: Any) -> None:
    """Within 15 %, of the storages that live between the beginning of an update of TRL's trainer and its end."""
    from transformers import TrainerCallback

    from imgen_common.memory import LiveBytes
    from interleave.training import sft

    peaks: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.live = LiveBytes([*model.parameters(), *model.buffers()])
            self.live.__enter__()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.live.__exit__(None, None, None)
            peaks.append(self.live.peak)

    config = quick(root, lora, vision, **{"per_device_train_batch_size": 8, "max_steps": 2, **trl})
    _, held, _ = sft.plan_sft("critic", config, 1)
    assert held.activation
    assert held.peak == held.static + held.activation
    sft.train_sft("critic", config, ["t"], runs=tmp_path, callbacks=[Watch()])
    assert max(peaks) == pytest.approx(held.gradients + held.activation, rel=0.15)
