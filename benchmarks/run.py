"""Command line of the benchmarks: ``python -m benchmarks.run [--quick] [--out FILE] [NAME ...]``."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    build_time,
    calibration,
    checkpoints,
    compile_time,
    compiled_step,
    eight_schools,
    encoder_pass,
    evidence,
    growth,
    guides,
    hierarchical,
    large,
    leapfrog,
    linear_gaussian,
    many_rows,
    memory,
    mnist,
    processes,
    rivals,
    state_space,
    step_time,
)
from benchmarks.result import Result, environment, load, write_page

COMPARISONS: dict[str, Callable[..., Result]] = {
    "linear_gaussian": linear_gaussian.run,
    "mnist": mnist.run,
    "step_time": step_time.run,
    "compiled_step": compiled_step.run,
    "compile_time": compile_time.run,
    "growth": growth.run,
    "encoder_pass": encoder_pass.run,
    "many_rows": many_rows.run,
    "large": large.run,
    "processes": processes.run,
    "guides": guides.run,
    "hierarchical": hierarchical.run,
    "eight_schools": eight_schools.run,
    "state_space": state_space.run,
    "build_time": build_time.run,
    "evidence": evidence.run,
    "leapfrog": leapfrog.run,
    "memory": memory.run,
    "rivals": rivals.run,
    "calibration": calibration.run,
    "checkpoints": checkpoints.run,
}
"""Every comparison, in the order of the page; a new one is a module with ``run(*, quick) -> Result`` and a line here."""

PAGE = Path(__file__).parent / "RESULTS.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run comparisons, print their sections, rewrite the page after each.

    Returns:
        0, or 1 if a number missed its bar.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure, print, rewrite RESULTS.md.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"comparisons to run: {', '.join(COMPARISONS)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller setting; RESULTS.md is left alone")
    parser.add_argument(
        "--out", type=Path, help="write to this page instead; with --quick nothing is written without it"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(COMPARISONS):
        parser.error(f"unknown comparison {', '.join(sorted(unknown))}; known are {', '.join(COMPARISONS)}")
    page = options.out or (None if options.quick else PAGE)
    missed = [_run(name, page, quick=options.quick) for name in options.names or COMPARISONS]
    return int(any(missed))


def _run(name: str, page: Path | None, *, quick: bool) -> bool:
    """Run one comparison and tell whether a number missed its bar."""
    before, start = load(), time.perf_counter()
    result = COMPARISONS[name](quick=quick)
    command = f"python -m benchmarks.run {'--quick ' if quick else ''}{name}"
    seconds = time.perf_counter() - start
    where = f"{environment()}; load {before} before and {load()} after the run, which took {seconds:.0f} s."
    section = result.to_markdown(name, command, where)
    sys.stdout.write(section + "\n")
    if page is not None:
        write_page(page, {name: section}, list(COMPARISONS))
    return bool(result.missed)


if __name__ == "__main__":
    sys.exit(main())
