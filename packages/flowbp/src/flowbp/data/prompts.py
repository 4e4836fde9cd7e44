"""Prompts: where they come from and in which order they are used."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flowbp.config import DataConfig, EvalConfig, ModelConfig
from flowbp.data.edits import caption_of, sources_of
from flowbp.data.rows import read_dataset, read_prompts, set_key, shapes_edits
from flowbp.rewards import RewardConfig
from imgen_common.errors import UserError, is_blank, nearest
from imgen_common.files import check_no_address, local_path
from imgen_common.shapes.vocabulary import describe_unknown_words
from imgen_common.streams import numpy_generator
from imgen_common.tables import TABLE_SUFFIXES, describe_type, read_table

if TYPE_CHECKING:
    from imgen_common.shapes.scene import Split

ENTITY = re.compile(r"&(?:quot|amp|lt|gt|nbsp|apos|#x?[0-9A-Fa-f]{2,6});")
"""A letter as HTML writes it, which captions that were taken from pages have."""
BUILTIN = "builtin:shapes/"
EDITS = BUILTIN + "edits"
BUILTIN_COUNT = 3000


def is_shapes_source(source: str) -> bool:
    """Whether a source's prompts are captions of the shapes world, which its verifier can judge."""
    return source.startswith(BUILTIN)


def load_prompts(source: str, data: DataConfig | None = None, limit: int | None = None) -> list[str]:
    """The prompts of a source (see `DataConfig.prompts`), in order, at most `limit`; those with images are `Edit`s.

    `builtin:shapes/SPLIT` gives captions with the categories in turn, `builtin:shapes/edits` and
    `builtin:shapes/edits/SPLIT` edits with their kinds in turn; 3000 unless `limit` says otherwise.
    data: names of the columns.  Blank prompts are left out.
    Raises UserError if the source is missing, empty or not UTF-8, and naming the row whose prompt is missing or no
    text, or whose image cannot be read.
    """
    data = data or DataConfig()
    if source.startswith("builtin:"):
        prompts = _builtin(source, limit or BUILTIN_COUNT)
    else:
        path = local_path(source)
        if not _exists(path):
            check_no_address(source)
            place = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"{source}: no such prompt file or dataset folder{place}; give a {', '.join(TABLE_SUFFIXES)} or a "
                "folder made by datasets' save_to_disk"
            )
        rows = read_dataset(path, data) if path.is_dir() else read_table(path, data.key)
        filled = [(where, row) for where, row in rows if _text(row, data.key, where)]
        prompts = read_prompts(filled[:limit], data, path if path.is_dir() else path.parent)
    if not prompts:
        raise UserError(f"{source}: holds no prompt; give at least one")
    return prompts[:limit]


def load_quick_prompts(config: EvalConfig, data: DataConfig) -> list[str]:
    """The prompts of the quick evaluations; none where none is made.  Raises UserError as `load_prompts`."""
    return load_prompts(config.quick_prompts, data, config.quick_num_prompts) if config.every else []


def shapes_split(source: str, *, edits: bool = False) -> "Split":
    """The split that `builtin:shapes/SPLIT` or, with `edits`, `builtin:shapes/edits/SPLIT` names.

    Raises UserError for another source.
    """
    from imgen_common.shapes.scene import Split

    splits: dict[str, Split] = {BUILTIN + split: split for split in get_args(Split)}
    if edits:
        splits |= {EDITS: "train"} | {f"{EDITS}/{split}": split for split in get_args(Split)}
    if source not in splits:
        raise UserError(f"{source}: unknown prompts{nearest(source, splits)}; allowed: {', '.join(splits)}")
    return splits[source]


def _builtin(source: str, count: int) -> list[str]:
    from imgen_common.shapes.scene import balanced_specs

    split = shapes_split(source, edits=True)
    if source.startswith(EDITS):
        return list(shapes_edits(split, count))
    return [spec.caption for spec in balanced_specs(count, numpy_generator(0, f"prompts-{split}"), split)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False  # no name of a file, as a prompt in its place is


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        found = ", ".join(row) or "nothing"
        is_table = where.rpartition(":")[0].lower().endswith((".csv", ".tsv"))
        names = "; the first line of the file must name its columns" if is_table else ""
        remedy = set_key(key) + names
        raise UserError(f"{where}: no text under {key!r} (there is: {found}){nearest(key, row)}; {remedy}")
    value = row[key]
    if not isinstance(value, str):
        found = describe_type(value) + (", whose keys are not read" if isinstance(value, dict) else "")
        raise UserError(f"{where}: no text under {key!r} (there is: {found}); write a text, or remove the row")
    return "" if is_blank(value) else value.strip()


def describe_unread_prompts(
    prompts: Sequence[str], model: ModelConfig, rewards: Mapping[str, RewardConfig]
) -> list[str]:
    """A sentence for each text encoder of a model, and each reward, that does not read all of some prompts; one where
    edits lack the captions that rewards read, or prompts are coded for HTML; and one where prompts have words that the
    built-in model, or built-in rewards of another model, do not know.

    No weights are read; equal texts count once.  Of edits, text encoders read the instructions, rewards with a limit
    the captions.
    """
    from flowbp import backbones
    from flowbp.backbones.options import apply_model_options

    backbone = backbones.init_empty_weights(model.ref, distilled=model.allow_distilled)
    apply_model_options(backbone, model)
    distinct = list(dict.fromkeys(prompts))
    readers = [(name, limit, "prompts", distinct) for name, limit in backbone.prompt_limits().items()]
    of_captions = []
    for name, config in rewards.items():
        reward = config.load("meta")
        if (limit := getattr(reward, "prompt_limit", None)) is not None:
            captions = [caption_of(prompt) for prompt in prompts]
            if getattr(reward, "sees_sources", False):
                captions += [getattr(prompt, "source_caption", "") for prompt in prompts]
            else:
                of_captions.append(name)
            what = "captions and source captions" if len(captions) > len(prompts) else "prompts"
            readers.append((f"reward {name}", limit, what, list(dict.fromkeys(captions))))
    cut = [
        f"{count} of {len(texts)} {what} {'is' if count == 1 else 'are'} longer than the {limit.max_tokens} tokens "
        f"that {reader} reads; the rest of each is ignored"
        for reader, limit, what, texts in readers
        if (count := limit.num_longer(texts))
    ]
    edits = [prompt for prompt in prompts if sources_of(prompt)]
    bare = sum(caption_of(edit) == edit for edit in edits)
    if bare and of_captions:
        which = f"{'has' if bare == 1 else 'have'} no caption (data.caption)"
        cut.append(f"{bare} of {len(edits)} edits {which}; {', '.join(of_captions)} will score the instruction instead")
    return [*cut, *_describe_entities(distinct), *_describe_unknown_words(" ".join(distinct), model, rewards)]


def _describe_entities(prompts: Sequence[str]) -> list[str]:
    coded = [match[0] for text in prompts if (match := ENTITY.search(text))]
    holds = f"{len(coded)} of {len(prompts)} prompts hold entities of HTML"
    return [f"{holds}, such as {coded[0]}; decode them (html.unescape of Python)"] if coded else []


def _describe_unknown_words(words: str, model: ModelConfig, rewards: Mapping[str, RewardConfig]) -> list[str]:
    if (unknown := describe_unknown_words(model.ref, words)) is not None:
        return [f"{unknown}; images of such prompts mean nothing"]
    found = {name: describe_unknown_words(config.ref, words) for name, config in rewards.items()}
    return [f"reward {name}: {text}; its scores mean nothing" for name, text in found.items() if text is not None]


def prompt_indices(count: int, seed: int, first: int, number: int) -> list[int]:
    """Prompts of samples `first` ... `first + number - 1`: endless epochs over `count` prompts, each reshuffled."""
    samples = range(first, first + number)
    epochs = {sample // count for sample in samples}
    orders = {epoch: numpy_generator(seed, "prompt-order", epoch).permutation(count).tolist() for epoch in epochs}
    return [orders[sample // count][sample % count] for sample in samples]
