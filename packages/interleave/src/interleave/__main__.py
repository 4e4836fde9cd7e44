"""`python -m interleave`: the same as the command `interleave`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory, whose random.py would be taken for Python's; the command has it not
    from interleave.cli import main

    main()
