"""The benchmarks by the name that the command line gives them; a new one is one more line."""

from interleave.benchmarks.base import Benchmark
from interleave.benchmarks.official.comm import Comm
from interleave.benchmarks.official.rise import Rise
from interleave.benchmarks.official.ueval import Ueval
from interleave.benchmarks.official.wise import WiseLegacy, WiseVerified

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Ueval(),
        WiseVerified(),
        WiseLegacy(),
        Rise(),
        Comm(),
    )
}
