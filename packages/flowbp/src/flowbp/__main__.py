"""`python -m flowbp` and `torchrun -m flowbp`: the same as the command `flowbp`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory, whose random.py would be taken for Python's; the command has it not
    from flowbp.cli import main

    main()
