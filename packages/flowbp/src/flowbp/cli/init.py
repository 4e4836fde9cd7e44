"""`flowbp init`."""

from pathlib import Path
from typing import Annotated

import typer

from imgen_common.errors import UserError, quoted


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the file is NAME.yaml.")],
    family: Annotated[str, typer.Option(metavar="FAMILY", help="Folder of configs/flowbp, such as sd3_5_medium.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of a GPU, such as 24GiB or 80GB.")],
    reward: Annotated[
        str,
        typer.Option(metavar="REWARD", help="hpsv2, pickscore, clipscore, imagereward, aesthetic or hpsv3."),
    ] = "hpsv2",
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 1,
) -> None:
    """Write NAME.yaml, a configuration to start from: the recipe of a model family that fits the memory of your GPUs,
    as one file with an explanation above each key, and the reward of your choice. If that is not the recipe's own, the
    recipe's becomes a held-out one. The file says where weights and prompts come from. An existing file is left alone.

    Example:

    \b
      flowbp init my-run --family sd3_5_medium --reward pickscore --memory 24GiB
      flowbp init my-run-8 --family flux1_dev --memory 80GB --gpus 8
    """
    from flowbp.config.sizes import parse_memory_size
    from flowbp.config.starter import find_starter, write_starter
    from imgen_common.files import write_atomic

    name = name.removesuffix(".yaml")
    file = Path(f"{name}.yaml")
    if file.name != str(file) or name in ("", ".", ".."):
        raise UserError(f"name {name!r}: must be a plain name without folders; the file goes into this folder")
    if file.exists():
        raise UserError(f"{file}: exists already; choose another name, or remove it")
    starter = find_starter(family, parse_memory_size(memory), gpus)
    write_atomic(file, write_starter(name, starter, reward))
    several = f" --gpus {starter.gpus}" if starter.gpus > 1 else ""
    launcher = f"torchrun --nproc_per_node {starter.gpus} -m " if starter.gpus > 1 else ""
    print(f"{file}: {family}/{starter}; reward {reward}")
    print("its first lines name the weights and prompts that it needs; then:")
    word = quoted(file)
    print(f"  flowbp estimate {word} --memory {quoted(memory)}{several}\n  {launcher}flowbp train {word}")
