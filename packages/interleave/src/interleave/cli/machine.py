"""What a machine has and gets before a run: `interleave doctor` and `interleave prefetch`."""

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.doctor.commands import build_doctor

if TYPE_CHECKING:
    from imgen_common.doctor.findings import Finding


def findings() -> "Iterator[Finding]":
    """What interleave uses beyond what every program does."""
    from imgen_common.doctor.findings import Finding, extras
    from interleave.serve.config import ServeConfig

    port = ServeConfig().port
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    remedy = "stop what listens there, or give --set port=N to interleave serve" if taken else ""
    yield Finding("port", "warning" if taken else "ok", f"{port} is {'in use' if taken else 'free'}", remedy)
    yield from extras({"deepspeed": "ZeRO", "ray": "serve --engine ray", "vllm": "grpo", "gradio": "demo"})


doctor = build_doctor("interleave", findings)


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
    from imgen_common.shutdown import ended_at_once

    with ended_at_once("stopped; the same command continues the download"):
        for ref in refs:
            print(hub.prefetch(ref))
