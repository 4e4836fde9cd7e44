"""Planner, critic and judge: prompts, answers, and the models behind them.  Knows nothing of the loop."""
