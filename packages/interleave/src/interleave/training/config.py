"""What `interleave sft` and `interleave grpo` are asked to do: ours here, TRL's and peft's options in mappings."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from imgen_common.config import Config
from interleave.agents.parsing import ParseMode
from interleave.agents.partial_parsing import FormatRule
from interleave.agents.scoring import JudgeConfig, VerifierJudgeConfig
from interleave.models.generators import GeneratorConfig
from interleave.models.generators.pipeline import PipelineConfig

Role = Literal["planner", "critic"]
Vision = Literal["frozen", "train", "reference"]


class TrainingConfig(Config):
    """What both trainings share."""

    model: str = "builtin:shapes/critic"
    """Vision-language model to start from: a folder, org/name[@revision] or builtin:shapes/NAME."""
    data: str = "data"
    """Folder that `interleave data build` or `import` wrote."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the order of rows, of adapters and of what is sampled."""
    vision: Vision = "frozen"
    """Vision tower: `frozen` whole, `train`, or `reference`: frozen but for position embedding and deepstack mergers,
    which the released code left trainable."""
    max_pixels: Annotated[int, Ge(1)] | None = None
    """Largest picture in pixels, a larger one is scaled down as by `chat.max_pixels` at run time; null: as the model's
    processor says."""
    max_length: Annotated[int, Ge(1)] | None = 16384
    """Longest example in tokens, prompt and answer; a longer one is left out, never cut; null: all are taken."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the weights in memory; auto: as the model's files say.  Arithmetic is `trl.bf16`."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Implementation of attention; the flash ones need their packages."""
    lora: Mapping[str, Any] | None = None
    """Options of peft's LoraConfig; null: all weights that are not frozen are trained."""
    trl: Mapping[str, Any] = {}
    """Options of TRL's SFTConfig or GRPOConfig, under their own names."""


class SftConfig(TrainingConfig):
    """Supervised training of one agent."""


class ScorerConfig(Config):
    """How answers are scored."""

    renamed: ClassVar = {"policy": "parse_mode"}

    concurrency: Annotated[int, Ge(1)] = 16
    """Answers that are with generator or judge at once, over all processes."""
    deadline: Annotated[float, Gt(0)] = 300.0
    """Seconds for picture and scores of one answer."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of every picture, as in the released code: equal prompts from one row give equal pictures."""
    rule: FormatRule = "strict"
    """What counts as well formed: `strict` parsing, or as in the `released` code."""
    parse_mode: ParseMode = "strict"
    """How answers are read under the strict rule."""
    skip_unchanged: bool = False
    """Whether a verdict of success with the prompt unchanged draws nothing and gets the reward of no change."""
    ceiling: Annotated[float, Ge(0), Le(1)] = 0.25
    """Share of the last `window` scored answers that may fail by generator or judge before training stops."""
    window: Annotated[int, Ge(4)] = 256
    """Answers of one process over which failures are counted."""


class PricesConfig(Config):
    """What a call costs, for `--dry-run`; in any currency."""

    renamed: ClassVar = {"picture": "image"}

    image: Annotated[float, Ge(0)] = 0.0
    """Of one picture."""
    judgement: Annotated[float, Ge(0)] = 0.0
    """Of one judgement, which is two questions to a chat model for each of its samples."""


class GrpoConfig(TrainingConfig):
    """Reinforcement of the critic, on single steps or on trajectories that begin at one."""

    template: str = "shapes_critic"
    """Template of the prompt, which must be the one of run time: a built-in name or a text file."""
    generator: GeneratorConfig = PipelineConfig()
    """Who draws with the critic's prompts."""
    judge: JudgeConfig = VerifierJudgeConfig()
    """Who scores what was drawn; not the model that is trained."""
    cache: str | None = "cache"
    """Folder of generated pictures and judgements, shared by all runs; null: none."""
    reward: Literal["released", "paper", "trajectory"] = "released"
    """`released`: 0.5 format + 0.1 accuracy + 0.3 semantics + 0.1 quality; `paper`: 0.5 format + 0.1 accuracy in
    {-1, 0} + 0.4 gain of the overall score; `trajectory`: the overall score of the last picture of the loop, in which
    the critic goes on from the recorded attempt (experimental)."""
    reward_weights: Mapping[str, Annotated[float, Ge(0)]] = {}
    """Other weights for parts of the reward, by name; the parts of `paper` are format, accuracy and step."""
    max_attempts: Annotated[int, Ge(2)] = 3
    """Pictures of one trajectory with `reward: trajectory`, the recorded one included."""
    scorer: ScorerConfig = ScorerConfig()
    """How answers are scored."""
    max_logp_difference: Annotated[float, Gt(0)] = 0.2
    """With vLLM: mean difference between its log-probabilities and the trainer's above which training stops."""
    prices: PricesConfig = PricesConfig()
    """For `--dry-run`."""
