"""The command line: ``python -m pyro_aevb demo``."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from pyro_aevb.errors import AEVBError

__all__ = ["main"]

DESCRIPTION = "Auto-Encoding Variational Bayes for Pyro models. See 'python -m pyro_aevb demo --help'."
DEMO = (
    "Trains the variational auto-encoder of Kingma & Welling (arXiv 1312.6114), a Pyro model and guide, on real digits; draws the "
    "posterior of unseen digits, holds it against Hamiltonian Monte Carlo and estimates their log p(x); trains a second model with "
    "two latents; and writes one page about it, DIR/index.html, that needs nothing but itself. About one minute for digits and "
    "several for MNIST on two cores."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line, by default those of the process.

    Returns:
        Exit code: 0 if all went well, 2 for an error of ours, told in one line, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except AEVBError as error:
        print(f"pyro_aevb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npyro_aevb: interrupted, no page was written.", file=sys.stderr)
        return 130


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m pyro_aevb", description=DESCRIPTION)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train on real digits and write a page about it",
        description=DEMO,
    )
    demo.add_argument(
        "--data",
        choices=("digits", "mnist"),
        default="digits",
        help="1,797 digits that come with scikit-learn, or MNIST, which is looked for in the folder named by PYRO_AEVB_DATA and "
        "else downloaded; digits by default",
    )
    demo.add_argument("--out", metavar="DIR", default="report", help="folder of the page; report by default")
    demo.add_argument(
        "--epochs", metavar="N", type=int, help="passes over the data; 500 for digits and 20 for MNIST by default"
    )
    demo.add_argument(
        "--latent",
        metavar="D",
        type=int,
        help="latents of the first model; 10 for digits and 20 for MNIST by default",
    )
    demo.add_argument(
        "--seed", metavar="S", type=int, default=0, help="seed of weights, shuffles and draws; 0 by default"
    )
    demo.add_argument("--pictures", metavar="DIR", help="folder for the page's pictures as PNG files; none by default")
    demo.add_argument("--quiet", action="store_true", help="show no progress and say nothing")
    return parser


def _demo(options: Namespace) -> int:
    """Run the demo and say where its page is."""
    from pyro_aevb.demo.job import run

    result = run(
        options.data,
        options.out,
        num_epochs=options.epochs,
        latent=options.latent,
        seed=options.seed,
        pictures=options.pictures,
        progress=not options.quiet,
    )
    if not options.quiet:
        for name, value in result.trials[0].numbers().items():
            print(f"{name:40} {value}")
        print(f"The page is {result.page} ({result.seconds:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
