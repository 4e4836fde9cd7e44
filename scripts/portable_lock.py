"""Reduces uv.lock to pins: names, versions, markers and edges, without addresses, files or hashes.

    python scripts/portable_lock.py [FILE]           rewrite FILE (uv.lock where none is given) in portable form
    python scripts/portable_lock.py --check [FILE]   exit 1 if FILE (standard input where none is given) is not portable

uv reads the portable form, resolves every pin with the index that it is configured for, and adds the rest locally.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

LEAKS = {
    "an address": re.compile(r"://"),
    "a file": re.compile(r"\bfile:|\.whl\b|\.tar\.(gz|bz2|xz)\b|\.zip\b"),
    "a hash": re.compile(r"\b(sha256|sha512|md5|blake2b)[:=]"),
    "a local build": re.compile(r"\+(cpu|cu\d+|rocm\S*|xpu)\b"),
}


def make_portable(lock: str) -> str:
    """`lock` without its `sdist`, `wheels` and `[package.metadata]` parts, every registry named "."."""
    kept: list[str] = []
    until: str | None = None
    for line in lock.splitlines():
        if until is not None:
            if not line.startswith(until):
                continue
            closing, until = until, None
            if closing == "]":
                continue
        if line == "wheels = [":
            until = "]"
        elif line.startswith("[package.metadata"):
            until = "["
            continue
        elif not line.startswith("sdist = "):
            kept.append(re.sub(r'registry = "[^"]*"', 'registry = "."', line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).rstrip("\n") + "\n"


def find_leaks(lock: str) -> list[str]:
    """The lines of `lock` that tie it to one index or one machine, with their numbers."""
    lines = list(enumerate(lock.splitlines(), start=1))
    return [f"line {number}: {what}" for number, line in lines for what, form in LEAKS.items() if form.search(line)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Reduce uv.lock to pins.")
    parser.add_argument("--check", action="store_true", help="only check whether FILE is portable")
    parser.add_argument("file", nargs="?", type=Path)
    options = parser.parse_args()
    if options.check and options.file is None:
        lock = sys.stdin.read()
    else:
        lock = (options.file or Path("uv.lock")).read_text(encoding="utf-8")
    result = lock if options.check else make_portable(lock)
    found = find_leaks(result)
    try:
        packages = len(tomllib.loads(result).get("package", []))
    except tomllib.TOMLDecodeError as error:
        packages, found = 0, [str(error)]
    if not packages:
        found = [*found, "it contains no package"]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        remedy = "run `just lock` and commit that form" if options.check else "correct pyproject.toml"
        sys.exit(f"uv.lock is not portable: {found[0]}{more}; {remedy}")
    if not options.check:
        (options.file or Path("uv.lock")).write_text(result, encoding="utf-8")
    print(f"{packages} packages, portable")


if __name__ == "__main__":
    main()
