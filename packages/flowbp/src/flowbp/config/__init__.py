"""What `flowbp train` is asked to do.  The defaults are the miniature: minutes on a CPU."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, Field, field_validator, model_validator

from flowbp.config.rollout import RolloutConfig
from flowbp.config.trained import LoraConfig as LoraConfig
from flowbp.config.trained import OptimConfig as OptimConfig
from flowbp.core.settings import Combination, Guidance, GuidanceOptions, GuidanceScale, NoiseLevels
from flowbp.methods import METHODS, Method
from flowbp.rewards import RewardConfig
from flowbp.rewards.losses import Hinge, LogSigmoid, Sigmoid
from imgen_common.config import Config, Presets, UserPath

ExportFormat = Literal["diffusers", "comfyui", "merged"]
ExportedWeights = Literal["ema", "last"]


class WatchdogConfig(Config):
    """What counts as hacking, judged at every quick evaluation against the base model at equal seeds."""

    enabled: bool = True
    """Whether to watch; needs quick evaluations."""
    shift: Annotated[float, Gt(0)] = 1.0
    """How far the mean of an image statistic may move, in standard deviations over the base's images."""
    lead: Annotated[float, Gt(0)] = 1.0
    """How far a reward may run ahead of every held-out one, in standard deviations over the base's images."""
    drift: Annotated[float, Gt(0)] | None = 0.2
    """How unlike the base's images at equal prompts and seeds the model's may become, brightness and contrast aside:
    0, the same; 1, as unlike as the base's images of different prompts.  null: any."""
    stop: bool = False
    """Whether an alert ends the training."""


def _check_different(values: tuple[float | str, ...]) -> tuple[float | str, ...]:
    if twice := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"names {', '.join(twice)} more than once; write each once")
    return values


Different = AfterValidator(_check_different)
PositiveInt = Annotated[int, Ge(1)]
NumImages = Annotated[int, Ge(1), Le(10**6)]
"""Of one update or evaluation; far more are a slip, and would fill the memory before anything is trained."""
Attention = Literal[
    "native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn", "flash", "xformers"
]
"""Attention kernels of diffusers that have a backward pass."""
Recompute = Literal["none", "selective", "all"]


OLD_RECOMPUTE = "gradient_checkpointing"


class VaeConfig(Config):
    """The autoencoder: memory against time."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of its weights and arithmetic; null: `bfloat16` under adapters of a network in `model.dtype:
    bfloat16`, else `float32`.  Images differ by rounding."""
    gradient_checkpointing: bool = False
    """Whether blocks of the decoder are recomputed in the backward pass: the same gradient in less memory."""
    slicing: bool = False
    """Whether images are decoded one after the other: less memory in evaluations; in training `reward_batch_size`
    does more."""
    tile: Annotated[int, Ge(8)] | None = None
    """Side, in pixels, of tiles that overlap by a quarter and are decoded one after the other; null: whole images.
    Tiles do not see each other's statistics, so images differ a little; in training it saves memory only together
    with `gradient_checkpointing`."""
    preview: str | None = None
    """Tiny decoder that decodes the images of quick evaluations: a diffusers folder of an `AutoencoderTiny` (taesd3 for
    Stable Diffusion 3, taef1 for FLUX.1 and Z-Image), or the safetensors file of taef2 for FLUX.2, local or on the hub
    as in `model.ref`.  Their scores are those of other images, and named `eval_preview/...` instead of `eval/...`.
    Training, the evaluations before and after and all other commands never use it.  null: the autoencoder decodes."""


class ModelConfig(Config):
    """The generator."""

    ref: str = "builtin:shapes/generator"
    """Diffusers folder: `builtin:...`, a path, or `org/name@revision`."""
    height: Annotated[int, Ge(8), Le(4096)] = 32
    """Height of the images in pixels."""
    width: Annotated[int, Ge(8), Le(4096)] = 32
    """Width of the images in pixels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's arithmetic, and of frozen weights under adapters; trained weights and the states
    between steps stay float32."""
    embedded_guidance: Annotated[float, Ge(0), Le(100)] | None = None
    """Guidance input of a guidance-distilled model; null: the default of its pipeline, 3.5 for FLUX.1-dev and 4 for
    FLUX.2-dev.  Others have no such input."""
    allow_distilled: bool = False
    """Whether the model may be step-distilled (klein without base, schnell, Turbo).  Such a model is made to generate
    in few steps: trained or sampled at more of them it can lose that, and what it generates then is not what was
    measured."""
    max_sequence_length: Annotated[int, Ge(1), Le(512)] | None = None
    """Tokens to which T5 (Stable Diffusion 3, FLUX.1) or the text encoder of the other families pads and cuts a
    prompt, under diffusers' name; null: the default of the model's pipeline, 256 for Stable Diffusion 3, else 512.
    Images depend on it, but for Z-Image, Krea 2 and Qwen-Image, which see no padding: there fewer only save time.
    Tokens of source images, which Qwen-Image-Edit reads beside the prompt, do not count."""
    recompute: Recompute = "none"
    """What the backward pass computes again, block by block, instead of keeping it: `all`, the least memory, about a
    third more time; `selective`, all but products of matrices and attention, which are kept; `none`."""
    working_copy: bool = True
    """Whether all weights that are trained in bfloat16 are cast once per update, into a copy of 2 bytes per weight,
    instead of in every evaluation: the same update bit for bit.  With `ddp`, without `compile`; fsdp2 gathers its
    shards in bfloat16 anyway, under zero2 and zero3 every evaluation casts."""
    attention: Attention | None = None
    """Attention kernel by its name in diffusers, for FLUX; null: torch chooses.  `flash` and `xformers` must be
    installed; those that quantize or fetch code are refused."""
    compile: bool = False
    """Whether the repeated blocks are compiled (inductor), one kind after the other: the first steps take minutes,
    later ones less; equal to rounding."""
    quantization: Literal["int8"] | None = None
    """`int8`: the blocks' frozen weights as 8-bit integers with a scale per output, under adapters; needs torchao, and
    `recompute: all` to save much."""
    vae: VaeConfig = VaeConfig()
    """The autoencoder."""

    @classmethod
    def with_old_keys(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """`gradient_checkpointing: true` and `false` are `recompute: all` and `none`."""
        if not isinstance(given.get(OLD_RECOMPUTE), bool) or "recompute" in given:
            return given
        rest = {key: value for key, value in given.items() if key != OLD_RECOMPUTE}
        return {**rest, "recompute": "all" if given[OLD_RECOMPUTE] else "none"}

    @model_validator(mode="after")
    def _keeps_what_it_can(self) -> "ModelConfig":
        if self.recompute == "selective" and (self.compile or self.quantization):
            raise ValueError("recompute selective: not with compile or quantization; set it to all or none")
        return self

    @field_validator("attention", mode="before")
    @classmethod
    def _attention_trains(cls, value: object) -> object:
        name = str(value).lower()
        if "sage" in name:
            raise ValueError(f"{value}: its kernel is quantized and has no backward pass, so it cannot train")
        if name.endswith("_hub"):
            raise ValueError(f"{value}: would fetch a kernel from the hub and run it; install flash-attn, use flash")
        return value


class VelocityRegulariser(Config):
    """loss + weight * mean over active steps of (v - v_base)^2: holds the model near its base."""

    kind: Literal["velocity"] = "velocity"
    weight: Annotated[float, Gt(0)]
    """Its part in the loss, beside that of the rewards."""


class Scorer(RewardConfig):
    """A reward model and what its scores are called."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = "reward"
    """Name of the score in metrics, evaluations and the report: lower-case letters, digits, underscores."""


class TrainedReward(Scorer):
    """A reward that is maximized."""

    weight: Annotated[float, Gt(0)] = 1.0
    """Its part in the gradient, as `combine` says."""
    loss: Annotated[Hinge | LogSigmoid | Sigmoid, Field(discriminator="kind")] = Hinge()
    """From score to loss."""


class DataConfig(Config):
    """The prompts to train on."""

    prompts: str = "builtin:shapes/train"
    """`builtin:shapes/SPLIT` or, for edits, `builtin:shapes/edits/SPLIT`; a file: .txt (one prompt a line), .jsonl,
    .json (an array), .csv or .tsv (with names of columns); or a folder of `datasets.save_to_disk`."""
    key: str = "prompt"
    """Name of the prompt's column in .jsonl, .json, .csv and .tsv files and dataset folders."""
    images: str | None = "images"
    """Name of the column of source images, where prompts are edits: a path, counted from the file's folder, or a list;
    in dataset folders images too.  null: rows have none, also where a column has that name."""
    caption: str = "caption"
    """Name of the column with what the result of an edit should show, for rewards that do not see its sources; where
    rows have none, these read the instruction."""
    source_caption: str = "source_caption"
    """Name of the column with what the source images of an edit show, for `edit_clip`."""
    answer: str | None = None
    """Name of the column with the answer whose likelihood a `vlm` reward with an answer that is `given` scores.  null:
    rows have none."""
    embeddings: Literal["memory", "disk", "live"] = "memory"
    """When prompts are embedded: `memory`, all that the run needs before it begins, text encoders freed afterwards;
    `disk`, the same, kept in `cache` for later runs; `live`, when their turn comes, text encoders stay loaded."""
    cache: UserPath = "cache/embeddings"
    """Folder of embeddings on disk, shared by all runs; entries of other text encoders do not disturb."""


class EvalConfig(Config):
    """Images at fixed seeds, before, during and after the training."""

    renamed: ClassVar = {"guidance": "guidance_scale", "steps": "num_inference_steps"}

    model: str | None = None
    """Model whose transformer and noise levels draw the images of evaluations, with the trained adapter on it, as
    `model.ref`: a distilled sibling of the same family and shapes.  It takes the memory of a second transformer.  Set
    `guidance_scale` and `num_inference_steps` to its own.  null: the trained one."""
    prompts: str = "builtin:shapes/test"
    """Prompts of the evaluation before and after, as `data.prompts`."""
    num_prompts: NumImages = 504
    """How many of them."""
    guidance_scale: Annotated[tuple[Annotated[float, Gt(0), Le(100)], ...], MinLen(1), Different] = (1.0, 2.0)
    """Guidance scales of the evaluation before and after, which is also made at the training's; with `model` at these
    alone, and quick evaluations at the first."""
    num_inference_steps: Annotated[int, Ge(1), Le(1000)] = 25
    """Denoising steps."""
    seed: int = 1
    """Seed of the noise; prompt i has its own stream whatever the batch."""
    batch_size: PositiveInt = 126
    """Images drawn at once, in `flowbp sample` too."""
    every: Annotated[int, Ge(0)] = 40
    """Updates between quick evaluations; 0: none."""
    quick_prompts: str = "builtin:shapes/tune"
    """Prompts of the quick evaluations, as `data.prompts`."""
    quick_num_prompts: NumImages = 60
    """How many of them."""


class CheckpointConfig(Config):
    """States from which `--resume` goes on exactly."""

    every: PositiveInt = 50
    """Updates between checkpoints; the last update always has one."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""


class DistributedConfig(Config):
    """How several processes (torchrun, accelerate launch) share the weights."""

    kind: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """`ddp`: every process holds all weights; `fsdp2`, and DeepSpeed's `zero3`: weights, gradients and the optimizer
    are sharded over them; `zero2`: gradients and the optimizer."""
    sync: Literal["update", "step"] = "update"
    """When sharded gradients are added up: once per `update`, every process holding a whole gradient until then; or
    after every swept `step`, in the memory of a part."""


class TrainConfig(Config):
    """One run of reward backpropagation."""

    renamed: ClassVar = {
        "num_updates": "max_train_steps",
        "num_steps": "num_inference_steps",
        "batch_size": "total_batch_size",
        "micro_batch_size": "per_device_batch_size",
        "reward_chunk": "reward_batch_size",
        "chunk": "active_steps_per_forward",
        "regularize": "regularise",
    }

    name: str = "{method}"
    """Run folder under `runs/`; `{method}` stands for the method's name.  A number is added if it exists."""
    seed: int = 0
    """Seed of prompts' order, noise, plans and adapters."""
    model: ModelConfig = ModelConfig()
    """The generator."""
    method: Annotated[Method, Presets(METHODS)] = METHODS["flowbp_bridge"]
    """Which velocities receive which multiple of the reward gradient."""
    rewards: Annotated[tuple[TrainedReward, ...], MinLen(1)] = (
        TrainedReward(ref="builtin:shapes/reward", loss=LogSigmoid(center=22.3)),
    )
    """What is maximized."""
    combine: Combination = "weighted"
    """How the gradients of several rewards at the image become one: `weighted` sum; `normalized` to equal length
    first; `pcgrad`, without the parts that point against each other."""
    heldout: tuple[Scorer, ...] = (Scorer(name="heldout", ref="builtin:shapes/heldout"),)
    """Rewards that are only watched, as a check against reward hacking."""
    regularise: VelocityRegulariser | None = None
    """An anchor to the base model (as a KL penalty): the mean squared difference, in units of velocity, between the
    guided velocities of the trained network and of the base at the active steps.  The base is the network without
    adapters, or a copy of it in float32 where all weights are trained (with `ddp` only).  null: none."""
    guidance_scale: GuidanceScale = 1.0
    """Scale of classifier-free guidance in the training rollouts; 1 runs the positive branch alone."""
    guidance: GuidanceOptions = GuidanceOptions()
    """How guidance is computed and differentiated."""
    num_inference_steps: Annotated[int, Ge(2), Le(1000)] = 25
    """Denoising steps N of the training rollouts."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """How a training multiplies float32 matrices (`torch.set_float32_matmul_precision`): `highest`, in float32; `high`,
    on a GPU in TF32; `medium`, in bfloat16 where torch can.  It matters where networks or rewards are float32."""
    train_sigmas: NoiseLevels = "pipeline"
    """Noise levels of the training rollouts: `pipeline`, those at which the model's pipeline samples; `linear`,
    linspace(1, 1/N, N) with the model's shift, as the code of FlowBP trains.  They differ for Stable Diffusion 3 only:
    the last level of SD3.5 at 25 steps is 0.0089 or 0.111.  Evaluations always sample at those of the pipeline."""
    max_train_steps: PositiveInt = 105
    """Optimizer updates."""
    total_batch_size: NumImages = 16
    """Images per update, over all processes and micro-batches."""
    per_device_batch_size: PositiveInt | None = None
    """Images per process at a time; null: all of the process's share at once."""
    active_steps_per_forward: PositiveInt = 1
    """Uncoupled active steps that share one forward: memory for speed, the same gradient."""
    keep_graphs: Annotated[int, Ge(0)] = 0
    """Up to so many active steps keep the graph of their evaluation in the rollout until the sweep, instead of being
    evaluated again: memory for speed, the same gradient.  With a detached negative they run both branches one after the
    other, as `guidance.batched: false` does for all.  With `ddp` only."""
    rollout: RolloutConfig = RolloutConfig()
    """How the rollouts compute."""
    reward_batch_size: PositiveInt | None = None
    """Images per decode-and-reward graph; null: the micro-batch."""
    offload_trajectory: bool = False
    """Whether kept states of the rollout wait in the host's memory, pinned, and come back step by step: the same
    update bit for bit.  On a CPU they are there anyway."""
    distributed: DistributedConfig = DistributedConfig()
    """Several processes."""
    lora: LoraConfig | None = None
    """Adapters; null: all weights of the transformer are trained."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    ema: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of the average of the trained weights, which is what is evaluated and saved; 0: the weights themselves."""
    data: DataConfig = DataConfig()
    """The prompts."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Watches for reward hacking."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    trackers: Annotated[tuple[Literal["wandb", "trackio"], ...], Different] = ()
    """Where metrics go beside `metrics.jsonl` and TensorBoard."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _tensorboard_is_there(cls, trackers: Any) -> Any:
        if isinstance(trackers, list | tuple) and "tensorboard" in trackers:
            raise ValueError("tensorboard: leave it out, its files are always written")
        return trackers

    @model_validator(mode="after")
    def _names_differ(self) -> "TrainConfig":
        names = [scorer.name for scorer in self.scorers]
        if twice := sorted({name for name in names if names.count(name) > 1 or name in RESERVED}):
            raise ValueError(f"names of rewards must differ from each other and from {', '.join(RESERVED)}: {twice}")
        return self

    @model_validator(mode="after")
    def _switches_agree(self) -> "TrainConfig":
        kind, quantization = self.distributed.kind, self.model.quantization
        if quantization is not None and (self.lora is None or kind != "ddp"):
            raise ValueError(
                f"model.quantization {quantization} goes with adapters and whole weights only: set lora, and "
                "distributed.kind to ddp"
            )
        if self.eval.model is not None and (self.lora is None or kind != "ddp"):
            raise ValueError("eval.model takes adapters and whole weights only: set lora, and distributed.kind to ddp")
        if self.regularise is not None and self.lora is None and kind != "ddp":
            raise ValueError(
                f"regularise: its base would be a second whole network on each process of distributed.kind {kind}; "
                "set lora, whose base is the network without adapters, or distributed.kind to ddp"
            )
        against = [f"distributed.kind {kind}"] if kind != "ddp" else []
        if self.active_steps_per_forward > 1:
            against.append(f"active_steps_per_forward {self.active_steps_per_forward}")
        against += ["regularise"] if self.regularise is not None else []
        if self.keep_graphs and against:
            raise ValueError(f"keep_graphs {self.keep_graphs}: not with {', '.join(against)}; set one to its default")
        if self.model.compile and kind != "ddp":
            raise ValueError(f"model.compile: not under distributed.kind {kind}; set it to false, or the kind to ddp")
        if self.rollout.changes_network and kind != "ddp":
            raise ValueError(f"rollout: not under distributed.kind {kind}; set its keys to null, or the kind to ddp")
        low = self.rollout.dtype
        if low is not None and (quantization is not None or low == self.model.dtype):
            other = f"model.quantization {quantization}" if quantization else f"model.dtype {low}, which it is then"
            raise ValueError(f"rollout.dtype {low}: not with {other}; set it to null")
        return self

    @property
    def classifier_free_guidance(self) -> Guidance:
        """Scale and options together."""
        return Guidance(scale=self.guidance_scale, **dict(self.guidance))

    @property
    def eval_guidance_scales(self) -> tuple[float, ...]:
        """Guidance scales of the evaluations before and after, first that of quick evaluations and single images."""
        own = (self.guidance_scale,) if self.eval.model is None else ()
        return tuple(dict.fromkeys((*own, *self.eval.guidance_scale)))

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """All rewards, the trained ones first."""
        return (*self.rewards, *self.heldout)


RESERVED = (
    "verifier loss regularise learning_rate seconds grad_norm gradient_forwards peak_memory_gib tflops mfu "
    "seconds_data seconds_rollout seconds_decoder seconds_reward seconds_sweep seconds_optimizer"
).split()
"""Names that metrics and evaluations use for something else."""
