"""`python -m interleave`: the same as the command `interleave`."""

from interleave.cli import main

if __name__ == "__main__":
    main()
