"""From HPSv3's checkpoint to transformers' Qwen2-VL and a head."""

import ast
import re
from pathlib import Path
from string import Formatter

import torch
from safetensors.torch import save_file
from transformers import AddedToken, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel

from flowbp.rewards import PROMPT_SOURCE
from flowbp.rewards.convert.checkpoints import StateDict
from flowbp.rewards.hpsv3 import IMAGE_AREA, REWARD_TOKEN, TEMPLATE_FILE, PromptTemplate, ranking_head
from imgen_common.errors import UserError
from imgen_common.weights import HEAD_FILE

MAX_SOURCE = 2**18


def read_prompt_template(source: Path) -> PromptTemplate:
    """The text around a prompt in the published source file, which is parsed, not run.  Raises UserError without it."""
    strings = _string_constants(source)
    try:
        before, after = _split_template("text_prompt", strings["INSTRUCTION"])
        ending, _ = strings["prompt_with_special_token"].split(REWARD_TOKEN)
        return PromptTemplate(before=before, after=after + ending)
    except (KeyError, ValueError):
        raise UserError(
            f"{source}: must set INSTRUCTION to a plain string with {{text_prompt}} in it once, and "
            f"prompt_with_special_token to one with {REWARD_TOKEN}; give {PROMPT_SOURCE}"
        ) from None


def _string_constants(source: Path) -> dict[str, str]:
    """The plain strings to which a Python file sets names, outside of functions and classes."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; give {PROMPT_SOURCE}")
    with source.open("rb") as file:
        content = file.read(MAX_SOURCE + 1)
    if len(content) > MAX_SOURCE:
        raise UserError(f"{source}: is larger than {MAX_SOURCE} bytes; give {PROMPT_SOURCE}")
    try:
        body = ast.parse(content).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: cannot be read as Python ({error}); give {PROMPT_SOURCE}") from None
    assigned = [(target, one.value) for one in body if isinstance(one, ast.Assign) for target in one.targets]
    last = {target.id: value for target, value in assigned if isinstance(target, ast.Name)}
    constants = {name: value.value for name, value in last.items() if isinstance(value, ast.Constant)}
    return {name: value for name, value in constants.items() if isinstance(value, str)}


def _split_template(field: str, template: str) -> tuple[str, str]:
    """The text before and after the only field of a `str.format` template.  Raises ValueError if it has others."""
    pieces = list(Formatter().parse(template))
    places = [i for i, (_, name, _, _) in enumerate(pieces) if name is not None]
    if [pieces[i][1:] for i in places] != [(field, "", None)]:
        raise ValueError(template)
    texts, end = [piece[0] for piece in pieces], places[0] + 1
    return "".join(texts[:end]), "".join(texts[end:])


def save_hpsv3(
    state: StateDict, config: Qwen2VLConfig, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, folder: Path
) -> None:
    """Writes a folder that `HPSv3.load` reads, in the precision of the checkpoint.

    Raises UserError if the configuration and the tokenizer are not those of the model that the checkpoint extends.
    """
    rows, width = state["model.embed_tokens.weight"].shape
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)], special_tokens=True)
    if (config.text_config.hidden_size, tokenizer.convert_tokens_to_ids(REWARD_TOKEN)) != (width, rows - 1):
        raise UserError(
            f"the checkpoint has {rows} tokens, {width} wide; the model given to complete it has "
            f"{len(tokenizer)}, {config.text_config.hidden_size} wide: give Qwen2-VL-7B-Instruct"
        )
    config.text_config.vocab_size = rows
    with torch.device("meta"):
        model, head = Qwen2VLModel(config), ranking_head(width)
    # the checkpoint was written by an older transformers, in which the language model was `model`
    names = {name: re.sub(r"^language_model\.", "model.", name) for name in model.state_dict()}
    model.load_state_dict({name: state[old] for name, old in names.items()}, assign=True)
    processor = Qwen2VLImageProcessor(
        patch_size=config.vision_config.patch_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        size={"shortest_edge": IMAGE_AREA, "longest_edge": IMAGE_AREA},
    )
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    save_file({name: state[f"rm_head.{name}"].float().contiguous() for name in head.state_dict()}, folder / HEAD_FILE)
    (folder / TEMPLATE_FILE).write_text(template.model_dump_json(indent=1) + "\n", encoding="utf-8")
