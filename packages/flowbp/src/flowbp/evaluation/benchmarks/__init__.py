"""The papers' two evaluation protocols, HPDv2 prompts with reward models and GenEval, as folders and tables."""
