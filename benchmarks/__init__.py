"""Run by hand, print what they measure side by side in one run; `benchmarks/README.md` says how."""
