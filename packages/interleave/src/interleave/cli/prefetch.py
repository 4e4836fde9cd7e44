"""The command `interleave prefetch`."""

from typing import Annotated

import typer


def prefetch(
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="org/name[@revision], a folder or builtin:...")],
) -> None:
    """Download models so that they can be used without a network. The command checks that they are complete and prints
    the folder of each; with HF_HUB_OFFLINE=1 it only checks. Gated repositories need `hf auth login` or HF_TOKEN.

    Example:

    \b
      interleave prefetch Qwen/Qwen3-VL-8B-Instruct black-forest-labs/FLUX.2-klein-4B
      HF_HUB_OFFLINE=1 interleave prefetch Qwen/Qwen3-VL-8B-Instruct
    """
    from imgen_common import hub

    for ref in refs:
        print(hub.prefetch(ref))
