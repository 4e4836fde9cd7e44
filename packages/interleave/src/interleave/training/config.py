"""Configuration of `interleave sft` and `interleave grpo`; the options of TRL and peft go through as mappings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from imgen_common.config import NO_SECRETS, Config, UserPath
from imgen_common.errors import UserError
from imgen_common.judging.objects import ParseMode
from imgen_common.run_folder.find import free_path
from interleave.agents.judge import ModelJudgeConfig
from interleave.agents.partial_parsing import FormatRule
from interleave.agents.prompts import TemplateRef
from interleave.agents.scoring import JudgeConfig, VerifierJudgeConfig
from interleave.models.generators import GeneratorConfig
from interleave.models.generators.pipeline import PipelineConfig

Role = Literal["planner", "critic"]
Vision = Literal["frozen", "train", "reference"]


MODEL = "model"
"""Folder of a run that holds the trained model."""


def find_place(runs: Path, name: str | None, default_name: str, resume: Path | None) -> Path:
    """Where a training is: a new folder under `runs`, or the one to resume.

    default_name: where no `name` is given.  Raises UserError for a name that is taken, and a run that has ended.
    """
    if resume is None:
        return free_path(runs, name, default_name)
    if (resume / MODEL).exists():
        raise UserError(f"{resume}: is finished; its model is {resume / MODEL}")
    return resume


class TrainingConfig(Config):
    """The settings that both trainers share."""

    json_files: ClassVar = ("trl.deepspeed", "trl.fsdp_config", "trl.accelerator_config")
    renamed: ClassVar = {
        **{name: f"trl.{name}" for name in ("learning_rate", "max_steps", "num_train_epochs", "save_steps", "bf16")},
        **{name: f"trl.{name}" for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "report_to")},
    }  # of TRL, and often written as if they were ours
    places: ClassVar[Mapping[str, str]] = {
        **{"model": "model", "generator.lora": "generator.lora"},
        **{"generator.ref": "generator", "judge.model.ref": "judge.model"},
    }
    """What the hashes of models are called, by the keys that say where these lie."""

    model: str = "builtin:shapes/critic"
    """Vision-language model to start from: a folder, org/name[@revision] or builtin:shapes/NAME."""
    data: UserPath = "data"
    """Folder that `interleave data build` or `import` wrote."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the order of rows, the adapter's weights and sampling."""
    vision: Vision = "frozen"
    """Vision tower: `frozen`, `train`, or `reference`: frozen except for the position embedding and the deepstack
    mergers, which the released code leaves trainable."""
    max_pixels: Annotated[int, Ge(1)] | None = None
    """Largest image in pixels; a larger one is scaled down, as `max_pixels` of an agent's model does at
    run time.  null: the limit of the model's processor."""
    max_length: Annotated[int, Ge(1)] | None = 16384
    """Longest example in tokens, prompt and answer.  A longer one is dropped, never truncated.  null: no limit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Data type of the weights; auto: that of the model's files.  `trl.bf16` sets that of the computation."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention implementation; the flash ones need their packages."""
    lora: Annotated[Mapping[str, Any], NO_SECRETS] | None = None
    """Options of peft's LoraConfig; null: full fine-tuning of the weights that are not frozen.  Every entry of a list
    `target_modules` must match a layer.  On the vision tower (`vision: train`) not with re-entrant checkpointing."""
    trl: Annotated[Mapping[str, Any], NO_SECRETS] = {}
    """Options of TRL's SFTConfig or GRPOConfig under their own names."""

    @model_validator(mode="after")
    def _adapters_fit_the_vision_tower(self) -> "TrainingConfig":
        if self.lora is not None and self.vision == "reference":
            raise ValueError("vision: reference is of full training; with lora use frozen or train")
        if self.lora is not None and self.vision == "frozen" and "exclude_modules" in self.lora:
            raise ValueError("lora.exclude_modules: cannot be set with vision: frozen; set vision: train")
        return self


class SftConfig(TrainingConfig):
    """Supervised training of one agent."""

    reasoning: bool = True
    """Whether answers are learned with their `<think>`.  false: only what follows `</think>`, for a model that answers
    at once, which is configured with `parse_mode: direct`."""


class ScorerConfig(Config):
    """How answers are scored."""

    renamed: ClassVar = {"policy": "parse_mode", "ceiling": "max_unscored", "rule": "format_rule"}

    concurrency: Annotated[int, Ge(1)] = 16
    """Answers that the generator and the judge work on at once, over all processes."""
    deadline: Annotated[float, Gt(0)] = 300.0
    """Seconds for the image and the scores of one answer."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of every image, as in the released code: equal prompts of one row give equal images."""
    format_rule: FormatRule = "strict"
    """Which answers are well formed: those that `strict` parsing reads, or those that the `released` code accepts."""
    parse_mode: ParseMode = "strict"
    """How answers are parsed under `format_rule: strict`."""
    skip_unchanged: bool = False
    """Whether an answer of success with the prompt unchanged generates no image and gets the reward of no change."""
    max_unscored: Annotated[float, Ge(0), Le(1)] = 0.25
    """Training stops when the generator or the judge failed on more than this share of the last `window` answers."""
    window: Annotated[int, Ge(4)] = 256
    """Answers of one process over which this share is taken."""


class PricesConfig(Config):
    """Price of a call in any currency, for `--dry-run`."""

    renamed: ClassVar = {"picture": "image", "judgement": "judgment"}

    image: Annotated[float, Ge(0)] = 0.0
    """Price of one image."""
    judgment: Annotated[float, Ge(0)] = 0.0
    """Price of one judgment, which is two questions to a chat model for each of its samples."""


class GrpoConfig(TrainingConfig):
    """Reinforcement learning of the critic, on single steps or on trajectories that begin at one."""

    template: TemplateRef = "shapes_critic"
    """Prompt template, the same as at run time: a built-in name or a text file."""
    generator: GeneratorConfig = PipelineConfig()
    """The generator that is given the critic's prompts."""
    judge: JudgeConfig = VerifierJudgeConfig()
    """The judge that scores the images; not the model that is trained."""
    cache: UserPath | None = "cache"
    """Folder of generated images and judgments, shared by all runs; null: no cache."""
    reward: Literal["released", "paper", "trajectory"] = "released"
    """`released`: 0.5 format + 0.1 accuracy + 0.3 semantics + 0.1 quality; `paper`: 0.5 format + 0.1 accuracy in
    {-1, 0} + 0.4 gain of the overall score; `trajectory`: the overall score of the last image of the loop, which the
    critic continues from the recorded attempt (experimental)."""
    reward_weights: Mapping[str, Annotated[float, Ge(0)]] = {}
    """Other weights of the parts of the reward, by name; the parts of `paper` are format, accuracy and step."""
    max_attempts: Annotated[int, Ge(2)] = 3
    """Images of one trajectory with `reward: trajectory`, the recorded one included."""
    scorer: ScorerConfig = ScorerConfig()
    """How answers are scored."""
    max_logp_difference: Annotated[float, Gt(0)] = 0.2
    """With vLLM: training stops when its log-probabilities differ from the trainer's by more than this on average."""
    prices: PricesConfig = PricesConfig()
    """Prices for `--dry-run`."""

    @property
    def models(self) -> dict[str, object]:
        """What is trained, and what makes its rewards, by their keys."""
        judge = self.judge.model if isinstance(self.judge, ModelJudgeConfig) else None
        return {"model": self.model, "generator": self.generator, "judge.model": judge}
