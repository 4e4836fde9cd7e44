"""Training sets of planner and critic: built from the engine's trajectories, imported, checked, shown."""
