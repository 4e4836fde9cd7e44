"""`python light.py PROGRAM`: runs mistaken commands, one JSON list a line of standard input, each in a fork.

Prints for each the exit code, the heavy libraries that were imported, and what was said.
"""

import contextlib
import importlib
import io
import json
import os
import sys

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "trl", "datasets", "deepspeed"}


def main(program: str) -> None:
    for light in ("pydantic", "numpy", "yaml", "PIL.Image", "rich.console", "huggingface_hub"):
        importlib.import_module(light)  # once, not in each fork
    cli = importlib.import_module(f"{program}.cli")
    for line in sys.stdin.read().splitlines():
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        said, code = io.StringIO(), None
        sys.argv = [program, *json.loads(line)]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                cli.main()
        except SystemExit as ended:
            code = ended.code
        print(json.dumps([code, sorted(HEAVY & set(sys.modules)), said.getvalue()]), flush=True)
        os._exit(0)


main(sys.argv[1])
