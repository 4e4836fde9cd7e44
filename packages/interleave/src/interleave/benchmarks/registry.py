"""The benchmarks by the name that the command line gives them; a new one is one more line."""

from interleave.benchmarks.base import Benchmark
from interleave.benchmarks.comm import Comm
from interleave.benchmarks.rise import Rise
from interleave.benchmarks.ueval import Ueval
from interleave.benchmarks.wise import WiseLegacy, WiseVerified

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (Ueval(), WiseVerified(), WiseLegacy(), Rise(), Comm())
}
