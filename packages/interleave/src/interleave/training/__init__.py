"""Training of planner and critic: `interleave sft` and `interleave grpo`, by TRL's trainers."""
