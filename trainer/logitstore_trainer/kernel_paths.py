"""`logitstore kernels`: which path each operation takes on this machine, and why."""

import argparse
import importlib.util
import json
from importlib.metadata import version
from typing import Any

from logitstore_trainer.devices import choose_device
from logitstore_trainer.report import format_table

EPILOG = """\
examples:
  logitstore kernels
  logitstore kernels --device cpu --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore kernels`."""
    parser.epilog = EPILOG
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest there is)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the paths; returns 0. Raises ValueError for a device that is not there."""
    facts = kernel_facts(args.device)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"device {facts['device']}, torch {facts['torch']}, triton {facts['triton'] or 'not installed'}\n")
    print(format_table(["operation", "path", "why"], [list(path.values()) for path in facts["operations"]]))
    return 0


def kernel_facts(device_name: str | None) -> dict[str, Any]:
    """device, versions of torch and triton (None where it is absent), and operation, path and reason of each one."""
    import torch
    from logitstore_kernels.dispatch import paths_on

    device = choose_device(device_name or "auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": f"{device} ({name})" if name else str(device),
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "operations": [path._asdict() for path in paths_on(device)],
    }
