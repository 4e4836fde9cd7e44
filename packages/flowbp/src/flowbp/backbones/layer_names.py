"""Names of layers in the original models, which ComfyUI and kohya's scripts use, and those of diffusers for them."""

from collections.abc import Collection, Mapping

Inner = Mapping[str, tuple[str, ...]]
"""Layer of a block by its original name: the layers of diffusers whose outputs it stacks."""


def _flux_double(first: str, second: str) -> Inner:
    """A block of FLUX with image and text side by side; `first`, `second`: diffusers' names in its MLP."""
    image = ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1")
    text = ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context")
    found: dict[str, tuple[str, ...]] = {}
    for side, qkv, projection, mlp, norm in (image, text):
        found[f"{side}_attn.qkv"] = tuple(f"attn.{name}" for name in qkv)
        found[f"{side}_attn.proj"] = (f"attn.{projection}",)
        found[f"{side}_mlp.0"], found[f"{side}_mlp.2"] = (f"{mlp}.{first}",), (f"{mlp}.{second}",)
        found[f"{side}_mod.lin"] = (f"{norm}.linear",)
    return found


FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
SD3_JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
Z_IMAGE = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    **{name: (name,) for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
FLUX: Mapping[str, tuple[str, Inner]] = {
    "transformer_blocks": ("double_blocks", _flux_double("net.0.proj", "net.2")),
    "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
}
FLUX2: Mapping[str, tuple[str, Inner]] = {
    "transformer_blocks": ("double_blocks", _flux_double("linear_in", "linear_out")),
    "single_transformer_blocks": (
        "single_blocks",
        {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""A layer of which diffusers has the halves of the outputs in the other order."""
FLUX_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": SWAPPED,
    **{
        f"{ours}.linear_{i}": f"{theirs}.{layer}_layer"
        for i, layer in ((1, "in"), (2, "out"))
        for ours, theirs in (
            ("time_text_embed.timestep_embedder", "time_in"),
            ("time_text_embed.guidance_embedder", "guidance_in"),
            ("time_text_embed.text_embedder", "vector_in"),
            ("time_guidance_embed.timestep_embedder", "time_in"),
            ("time_guidance_embed.guidance_embedder", "guidance_in"),
        )
    },
    **{
        f"{name}.linear": f"{name}.lin"
        for name in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
    },
}
"""Layers of FLUX.1 and FLUX.2 outside of blocks by their names in diffusers: the original ones."""
ENDS = dict.fromkeys(("FluxPipeline", "FluxKontextPipeline", "Flux2KleinPipeline", "Flux2Pipeline"), FLUX_ENDS)
ORIGINAL: Mapping[str, Mapping[str, tuple[str, Inner]]] = {
    "FluxPipeline": FLUX,
    "FluxKontextPipeline": FLUX,
    "Flux2KleinPipeline": FLUX2,
    "Flux2Pipeline": FLUX2,
    "ZImagePipeline": {name: (name, Z_IMAGE) for name in ("layers", "noise_refiner", "context_refiner")},
    "StableDiffusion3Pipeline": {"transformer_blocks": ("joint_blocks", SD3_JOINT)},
}
"""By pipeline and by diffusers' name of a list of blocks: its original name, and the layers of a block."""


def original_layers(layers: Collection[str], pipeline: str) -> dict[str, list[str]]:
    """Every layer, by its original name, of the blocks that `layers` are in, and the diffusers layers it consists of;
    with those of `layers` outside of blocks.

    layers: names in diffusers.  pipeline: class name of the family's pipeline.  Some of what is named may not be there:
    the last block of Stable Diffusion 3 has less.
    """
    ends = ENDS.get(pipeline, {})
    names = {ends[name]: [name] for name in layers if name in ends}
    for block in sorted({".".join(name.split(".")[:2]) for name in layers}):
        kind, _, number = block.partition(".")
        theirs, inner = ORIGINAL.get(pipeline, {}).get(kind, ("", {}))
        names |= {f"{theirs}.{number}.{name}": [f"{block}.{own}" for own in ours] for name, ours in inner.items()}
    return names
