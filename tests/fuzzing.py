"""Seeded mutations of valid inputs: what users, files and networks may hand to a reader."""

import random
import string
from collections.abc import Iterator, Sequence

TOKENS: Sequence[bytes] = [
    *(b"\0", b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85"),
    *(b"\xe2\x80\xae", b"\x1b[2J", b"\r\n", b"\n", b"\r", b"\t", b" ", b"\xc3\xa9", b"\xf0\x9f\x98\x80"),
    *(
        b"9" * 5000,
        b"1e999",
        b"-1e999",
        b"NaN",
        b"Infinity",
        b"-0",
        b"1e-400",
        b"0x10",
        b"1_0",
        b"18446744073709551616",
    ),
    *(b"[" * 200, b"]" * 200, b"{" * 200, b'{"a":' * 100, b"- " * 200, b"[[], " * 50, b"? " * 100, b"(" * 200),
    *(b"~", b"~~", b"~root/", b"null", b"true", b"no", b"<<: ", b"<<", b"&a ", b"*a ", b"!!int ", b"!!timestamp "),
    *(b"!!python/object:os.system ", b"!!binary ", b"!<> ", b"%YAML 9.9\n", b"---\n", b"...\n", b"|\n ", b"#", b"'"),
    *(b'"', b"\\", b'"\\', b",", b":", b": ", b"=", b".", b"..", b"../../", b"/", b"//", b"@", b"?", b";", b"%00"),
    *(b"kind: ", b"preset: ", b"extends: ", b"9999-99-99", b"2026-01-01T00:00:00+99:99", b"a" * 3000, b"builtin:"),
    *(
        b"\xff\xda",
        b"\xff\xd9",
        b"\xff\xff",
        b"\xff\x00",
        b"IDAT",
        b"IEND",
        b"eXIf",
        b"Exif\0\0II*\0",
        b"ANMF",
        b"\x7f" * 4,
    ),
    *(
        b"Content-Length: 1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"0\r\n\r\n",
        b"ffffffff\r\n",
        b"HTTP/1.1",
        b"HTTP/9.9",
    ),
]


def mutations(seeds: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` inputs, each a seed with one to five changes; the same for the same arguments."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
            _change(data, rng, seeds)
        yield bytes(data)


def _change(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    start = rng.randint(0, len(data))
    end = min(len(data), start + rng.choice((0, 1, 4, 16, 1000)))
    match rng.randrange(8):
        case 0:
            data[start:start] = rng.choice(TOKENS)
        case 1:
            data[start:end] = rng.choice(TOKENS)
        case 2:
            del data[start:end]
        case 3:
            data[start:start] = data[start:end] * rng.choice((1, 2, 50))
        case 4:
            del data[start:]
        case 5 if start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        case 6:
            other = rng.choice(seeds)
            data[start:] = other[rng.randint(0, len(other)) :]
        case _:
            data[start:end] = bytes(rng.choice(string.printable.encode()) for _ in range(end - start + 1))
