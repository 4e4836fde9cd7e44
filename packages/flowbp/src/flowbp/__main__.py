"""`python -m flowbp` and `torchrun -m flowbp`: the same as the command `flowbp`."""

from flowbp.cli import main

if __name__ == "__main__":
    main()
