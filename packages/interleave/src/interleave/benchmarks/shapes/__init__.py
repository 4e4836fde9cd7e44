"""The miniature's edition of the benchmarks: data of the shapes world, and its verifier as the judge."""
