"""Vision-language models of the Qwen-VL family as rewards: what is asked, the model, and three ways to read a score.

Knows nothing of backbones or training.
"""
