"""Command line: ``python -m benchmarks.paper figure2 figure3 ... [--samples N] [--quick] [--state DIR] [--out DIR]``."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.paper import after, figure2, figure3, full_bayes, manifolds, page, variance
from benchmarks.paper.settings import INITIAL_SD, INITIAL_SDS, SEEDS, Job

__all__ = ["PARTS", "main"]

PARTS: dict[str, Callable[[Job], None]] = {
    "figure2": figure2.run,
    "figure3": figure3.run,
    "figure4": manifolds.run_manifolds,
    "figure5": manifolds.run_samples,
    "variance": variance.run,
    "full_vb": full_bayes.run,
    "after": after.run,
    "page": page.run,
}
"""Every part, in the order of the page."""


_INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts; each writes its tables and pictures.

    Returns:
        0, or 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Train what arXiv 1312.6114 trains, and write tables, pictures and a page. Runs that the state directory "
        "holds go on from where they ended.",
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="PART", help=f"{', '.join(PARTS)} or all")
    parser.add_argument(
        "--samples", type=float, help="training samples of each curve, such as 1e6; by default the part's own"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small networks, few rows: shows that it runs, and nothing else"
    )
    parser.add_argument("--state", type=Path, default=Path("build/paper"), help="runs to go on from; %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="tables and pictures; by default beside this file"
    )
    parser.add_argument("--draw", action="store_true", help="train nothing, write what the state holds")
    parser.add_argument("--rows", type=int, help="rows whose log p(x) is estimated; by default the part's own")
    parser.add_argument("--seed", type=int, default=0, choices=SEEDS, help="seed of figure 2's curves; pictures show 0")
    parser.add_argument(
        "--initial-sd",
        type=float,
        default=INITIAL_SD,
        choices=INITIAL_SDS,
        help='what "N(0, 0.01)" is taken for in figure 2: a standard deviation of 0.01, or with 0.1 a variance',
    )
    options = parser.parse_args(arguments)
    if options.quick and options.out == parser.get_default("out"):
        parser.error("a quick run says nothing about the paper: give it an --out of its own")
    samples = None if options.samples is None else int(options.samples)
    job = Job(
        options.state,
        options.out,
        samples,
        options.quick,
        trains=not options.draw,
        num_rows=options.rows,
        seed=options.seed,
        initial_sd=options.initial_sd,
    )
    for name in PARTS if "all" in options.parts else options.parts:
        begin = time.perf_counter()
        try:
            PARTS[name](job)
        except KeyboardInterrupt:
            sys.stderr.write(f"{name}: stopped; the same command goes on from here\n")
            return _INTERRUPTED
        sys.stderr.write(f"{name}: {time.perf_counter() - begin:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
