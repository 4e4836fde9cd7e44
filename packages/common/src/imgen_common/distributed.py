"""What torchrun and accelerate launch leave in the environment."""

from collections.abc import Mapping

from imgen_common.errors import UserError


def check_launcher(environment: Mapping[str, str], command: str, ours: Mapping[str, str]) -> None:
    """Raises UserError if accelerate launch started one process where several were asked for, or if its own
    configuration asks for sharding.

    command: what was launched, for example "flowbp train".  ours: our settings that shard weights, under FSDP and
    DEEPSPEED.
    """
    # where accelerate sees no GPU it starts a single process without a word, and these variables give that away
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and "RANK" not in environment:
        raise UserError(
            "accelerate launch: several processes were asked for and one was started, as it does on a CPU; add "
            f"--multi_gpu, which works without a GPU too, or use torchrun --nproc_per_node N -m {command} ..."
        )
    for name, said in ours.items():
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate's own configuration asks for {name}; {command.partition(' ')[0]} shards "
                "weights itself: launch "
                f"with plain multi-GPU and --set {said}"
            )
