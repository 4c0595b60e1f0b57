"""Entry point: parses, runs one command, prints its result, and turns bad input into one line."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from hf_gradiend.cli import (
    adapt,
    build_data,
    compare,
    decode,
    encode,
    evaluate,
    export,
    join,
    push,
    quickstart,
    train,
)
from hf_gradiend.errors import GradiendError

COMMANDS = (
    quickstart, build_data, train, join, encode, decode, compare, evaluate, adapt, export, push
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; `None` for those of the process.

    Returns:
        Exit code: 0 after success, 2 after bad input, 130 after Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.json:
        transformers_logging.disable_progress_bar()
        datasets_logging.disable_progress_bar()
    try:
        result = args.run(args)
    except GradiendError as error:
        print(f"hf-gradiend {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-gradiend {args.command}: interrupted; what was saved stays.", file=sys.stderr)
        return 130
    if args.json and result is not None:  # which it is where another process of a training speaks
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-gradiend",
        description="Find, learn, read and dial a feature of a language model.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
        command.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object as the last line of standard output, and no bars",
        )
        command.set_defaults(run=module.run)
    return parser
