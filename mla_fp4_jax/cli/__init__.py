"""The command `mla-fp4`, also `python -m mla_fp4_jax`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mla_fp4_jax.checkpoint.convert import RULES
from mla_fp4_jax.checkpoint.plan import NIBBLE_ORDERS
from mla_fp4_jax.checkpoint.quantization_out import METHODS
from mla_fp4_jax.cli import processes
from mla_fp4_jax.cli.convert import run_convert
from mla_fp4_jax.cli.demo import run_demo
from mla_fp4_jax.cli.info import run_info
from mla_fp4_jax.cli.inspect import run_inspect
from mla_fp4_jax.cli.text import CliError
from mla_fp4_jax.ops.implementations import NAMES

USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message: str):
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for what cannot be done, 130 when interrupted."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mla-fp4: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0
    except (
        CliError,
        ValueError,
        TypeError,
        NotImplementedError,
        OSError,
        RuntimeError,
        MemoryError,
    ) as error:
        if args.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"mla-fp4 {args.command}: error: {text}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mla-fp4", description="DeepSeek's latent attention from one exact MXFP4 pack, in JAX.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser(
        "demo",
        help="load a layer, prefill, decode; report memory, error and time",
        description="Load one attention layer, prefill, decode step by step; report memory, error against "
        "float64, and time. Without arguments it runs on a tiny checkpoint that comes with the package.",
    )
    demo.set_defaults(run=run_demo)
    demo.add_argument("--checkpoint", type=Path, metavar="DIR", help="a Hugging Face safetensors checkpoint")
    demo.add_argument("--layer", type=_at_least(0), metavar="N", help="its layer, from 0 (default 0)", default=0)
    demo.add_argument("--prefix", help="where the layer's tensors are, if not found")
    demo.add_argument("--batch", type=_at_least(1), metavar="B", help="sequences (default 2)")
    demo.add_argument("--prompt-length", type=_at_least(1), metavar="T", help="tokens to prefill (default 17)")
    demo.add_argument("--steps", type=_at_least(1), metavar="N", help="tokens to decode (default 64)")
    demo.add_argument("--page-size", type=int, choices=(1, 16, 64, 128), help="page the cache")
    demo.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default bfloat16)")
    demo.add_argument("--implementation", choices=NAMES, help="of the FP4 products; see mla-fp4 info")
    demo.add_argument("--plot", type=Path, metavar="FILE.png", help="draw error and memory")
    processes.add_arguments(demo, _at_least(1))

    info = commands.add_parser("info", help="versions, devices, and which implementations can run and why")
    info.set_defaults(run=run_info)

    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint's attention weights are, and what loading does to each",
        description="Format, shape, bytes and scales of every attention projection, what the config says of it, what "
        "is kept exact and what would have to be converted. Reads headers and scales only.",
    )
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("path", type=Path, metavar="PATH", help="a Hugging Face safetensors checkpoint")
    inspect.add_argument("--json", action="store_true", help="all of it, layer by layer")

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint whose attention projections are MXFP4",
        description="Convert shard by shard; every other tensor keeps its bytes. Interrupted, it goes on where it "
        "stopped. Says how large the error is, per weight and per layer.",
    )
    convert.set_defaults(run=run_convert)
    convert.add_argument("source", type=Path, metavar="SRC", help="a Hugging Face safetensors checkpoint")
    convert.add_argument("target", type=Path, metavar="DST", help="a directory that is new, empty, or unfinished")
    convert.add_argument("--kv-b", choices=("mxfp4", "keep"), default="mxfp4", help="kv_b_proj (default mxfp4)")
    convert.add_argument("--linears", choices=("mxfp4", "keep"), default="keep", help="the others (default keep)")
    convert.add_argument("--scale-rule", choices=RULES, default="even", help="see quantize_mxfp4 (default even)")
    convert.add_argument(
        "--config", choices=METHODS, help="whose names and config to write (default: the source's, else quark)"
    )
    convert.add_argument(
        "--no-layer-errors", dest="layer_errors", action="store_false", help="do not compare the layers' outputs"
    )
    for command in (inspect, convert):
        command.add_argument(
            "--nibble-order",
            choices=NIBBLE_ORDERS,
            default="linear",
            help="of packed codes: gguf where they lie as in GGUF's blocks, which no file tells (default linear)",
        )
    for command in (demo, info, inspect, convert):
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _at_least(low: int):
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}; got {value}")
        return value

    parse.__name__ = "integer"  # what argparse calls it: "invalid integer value"
    return parse
