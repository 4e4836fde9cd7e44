"""The miniature's planner and critic: their words, their data from the shapes world, their training."""
