"""The official benchmarks, one small file each: their items, questions, parsers, figures and layouts of files."""
