"""Which weights are trained, and whether each of them gets a gradient."""

from typing import TYPE_CHECKING, Any

from imgen_common.errors import UserError, check_gradients
from interleave.training.config import Vision
from interleave.training.trl_options import VISION_PARTS

if TYPE_CHECKING:
    from torch import nn

REFERENCE_FROZEN = ("patch_embed", "blocks", "merger")
"""Parts of the vision tower whose names the released code's filter matches."""
NOT_FINITE = "update {}: {} is not finite; check the weights of the model, or start anew with a lower trl.learning_rate"


def is_frozen(name: str, vision: Vision) -> bool:
    """Whether a weight of that dotted name, which may have peft's prefixes, is not trained."""
    parts = name.split(".")
    tower = next((place for place, part in enumerate(parts) if part in VISION_PARTS), None)
    if vision == "train" or tower is None:
        return False
    return vision == "frozen" or any(part in REFERENCE_FROZEN for part in parts[tower + 1 : tower + 2])


def freeze_vision(model: "nn.Module", vision: Vision) -> None:
    """Turns off the gradient of what `vision` freezes.  Raises UserError where no vision tower is found, or `reference`
    would freeze none of it, since its parts have other names."""
    named = list(model.named_parameters())
    if vision != "train" and not any(is_frozen(name, "frozen") for name, _ in named):
        raise UserError(
            f"vision: {vision}: no vision tower found in {type(model).__name__} (none of {', '.join(VISION_PARTS)} "
            "among its parts); set vision: train"
        )
    if vision == "reference" and not any(is_frozen(name, vision) for name, _ in named):
        raise UserError(
            f"vision: reference is of Qwen's models, and would train the whole tower of {type(model).__name__}; set "
            "vision: frozen or train"
        )
    for name, weight in named:
        weight.requires_grad_(not is_frozen(name, vision))


def check_trainable(model: "nn.Module", vision: Vision) -> None:
    """Raises RuntimeError if a frozen weight would be trained, or if no weight would be."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained:
        raise RuntimeError("no weight would be trained")
    frozen = [name for name in trained if is_frozen(name, vision)]
    if frozen:
        raise RuntimeError(f"{len(frozen)} weights of the vision tower would be trained, {frozen[0]} among them")


def build_gradient_check(model: Any) -> Any:
    """A callback that ends the run, before a weight changes, where a trained weight got no gradient, or NaN.

    A module that an update does not call is not asked, as those of the vision tower are not on rows without images; it
    is checked after the first update that does.  Zeros are a gradient: A of an adapter gets no other while B is zero.
    DeepSpeed and FSDP keep gradients elsewhere and are not checked.
    """
    from transformers import TrainerCallback

    called: dict[Any, str] = {}

    def watch(path: str, module: Any) -> Any:
        def on_call(*_: object) -> None:
            if module.training:
                called[module] = path

        return module.register_forward_hook(on_call)

    hooks = {
        module: watch(path, module)
        for path, module in model.named_modules()
        if any(weight.requires_grad for weight in module.parameters(recurse=False))
    }

    class GradientCheck(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            own = {path: module.named_parameters(recurse=False) for module, path in called.items()}
            found = [(f"{path}.{name}", weight) for path, weights in own.items() for name, weight in weights]
            if not (args.deepspeed or args.fsdp):
                check_gradients([name for name, weight in found if weight.requires_grad and weight.grad is None])
            for name, weight in () if args.fp16 else found:  # fp16 skips such updates itself
                if weight.grad is not None and weight.grad.isnan().any():
                    raise UserError(NOT_FINITE.format(state.global_step + 1, f"the gradient of {name}"))
            for module in called:
                hooks.pop(module).remove()
            called.clear()

    return GradientCheck()
