"""Asking a chat model for judgments: questions, what was answered, what it costs, how far two judges agree.

Knows no benchmark and no model: an item's questions come from the caller, and so does what asks them.
"""
