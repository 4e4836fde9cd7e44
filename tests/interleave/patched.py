"""Changes to other libraries, for tests of several processes on a CPU; each is for a process of its own."""

from collections.abc import Sequence
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from interleave.agents.prompts import render_verdict
from interleave.records import Verdict

ANSWERS = (
    render_verdict(Verdict(success=True, refined_prompt="draw a red circle", reasoning="want red keep")),
    render_verdict(Verdict(success=False, refined_prompt="draw a blue circle", reasoning="want blue")),
    "want green keep keep",
    render_verdict(Verdict(success=False, refined_prompt="draw a green circle", reasoning="want green")),
    "red",
)


def shard() -> None:
    """From now on accelerate shards weights with FSDP2 on a CPU too, which it else does on accelerators alone."""
    made = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def replay(updates: int) -> None:
    """From now on the first `updates` updates of GRPO learn from given answers, which do not depend on how rows are
    shared out over processes; later ones sample, as without this."""
    from trl import GRPOTrainer

    sampled = GRPOTrainer._generate_single_turn

    def given(self: Any, prompt_ids: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= updates:
            return sampled(self, prompt_ids, *args, **kwargs)
        words = self._tokenizer
        chosen = [sum(ids) + place % self.num_generations for place, ids in enumerate(prompt_ids)]
        return [[*words(ANSWERS[n % len(ANSWERS)]).input_ids, words.eos_token_id] for n in chosen], None

    GRPOTrainer._generate_single_turn = given
