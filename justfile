# `just` alone lists these.
default:
    @just --list

# install everything, and the commit hooks
setup:
    uv sync
    git update-index --skip-worktree uv.lock
    uv run pre-commit install

# format and mend what can be mended
fmt:
    uv run ruff format .
    uv run ruff check --fix .

lint:
    uv run ruff check .
    uv run ruff format --check .

type:
    uv run mypy

# fast tests; `just test -m slow`, `just test -n 0 tests/common` pass arguments on
test *arguments:
    uv run pytest {{arguments}}

# the documentation as a site in build/site; `uv run mkdocs serve` shows it while you write
docs:
    uv run python scripts/reference.py
    uv run mkdocs build --strict

# one benchmark of benchmarks/: `just bench perf/sweep_memory`
bench name *arguments:
    uv run python -m benchmarks.{{replace(name, "/", ".")}} {{arguments}}

# resolve anew and stage the portable form; commit before the next `uv run`, which writes the full form back
lock *arguments:
    git update-index --no-skip-worktree uv.lock
    uv lock {{arguments}}
    uv run --no-project python scripts/portable_lock.py
    git add uv.lock
    git update-index --skip-worktree uv.lock

# the version of all packages, here alone: `just version 0.2.0`
version new:
    for package in imgen imgen-common flowbp interleave; do uv version --frozen --package $package {{new}}; done
    sed -i 's/^version: .*/version: {{new}}/' CITATION.cff

# what CI runs, without the installation
check: lint type test
