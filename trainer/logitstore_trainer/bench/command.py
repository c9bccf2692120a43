"""`logitstore bench storage | throughput | kernels`: the sub-commands by name."""

import argparse

from logitstore_trainer.bench import kernels, storage, throughput

_MEASUREMENTS = {
    "storage": (storage, "bytes a token, fidelity and speed of every codec, next to what people store today"),
    "throughput": (throughput, "how fast a store feeds a training step, stage by stage"),
    "kernels": (kernels, "time and memory of the loss on this device, next to eager PyTorch"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `logitstore bench`: those of each measurement."""
    subparsers = parser.add_subparsers(dest="measurement", metavar="WHAT", required=True)
    for name, (module, help_text) in _MEASUREMENTS.items():
        description = help_text[0].upper() + help_text[1:] + "."
        module.add_arguments(subparsers.add_parser(name, help=help_text, description=description))


def run(args: argparse.Namespace) -> int:
    """Runs the measurement that was asked for; returns the exit code."""
    module, _ = _MEASUREMENTS[args.measurement]
    return module.run(args)
