"""The two evaluation protocols of the papers: HPDv2 prompts with reward models, and GenEval.

Each benchmark folder can be resumed and tabulated.
"""
