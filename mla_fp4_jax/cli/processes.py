"""Joining the processes of one run, by jax.distributed, and ending with an error when one of them does."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
from jax.sharding import AxisType

from mla_fp4_jax.cli.text import CliError
from mla_fp4_jax.sharding import MLASharding

FAILED = 2
INTERRUPTED = 130
GRACE_SECONDS = 10  # what JAX, which ends the process without a word of ours, waits longer than we do
AXES = {"heads": "tensor_parallel", "batch": "data_parallel", "context": "context_parallel"}


def add_arguments(parser: argparse.ArgumentParser, positive) -> None:
    """The options that spread a run over devices and processes."""
    group = parser.add_argument_group("many devices")
    group.add_argument("--tensor-parallel", type=positive, metavar="K", help="split heads over K devices")
    group.add_argument("--data-parallel", type=positive, metavar="D", help="split sequences over D devices")
    group.add_argument(
        "--context-parallel", type=positive, metavar="C", help="split the cache's slots over C devices"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, in every process alike")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many are started")
    group.add_argument("--process-id", type=int, metavar="I", help="this one's number, 0 .. N - 1")
    group.add_argument("--cluster", action="store_true", help="take these three from Slurm, MPI or Kubernetes")
    group.add_argument("--timeout", type=positive, metavar="SECONDS", default=60, help="for all to join (default 60)")


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Run within: joins the other processes if the command line says so; then only process 0 prints.

    An exception inside ends this process at once, without JAX's orderly shutdown, which would wait for the others;
    they then get an error from what they next have to wait for.

    Raises:
        CliError: options that do not go together.
    """
    if not _asked(args):
        yield
        return
    _join(args)
    silent = open(os.devnull, "w") if jax.process_index() else None  # noqa: SIM115
    try:
        with contextlib.redirect_stdout(silent) if silent else contextlib.nullcontext():
            yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except BaseException as error:
        if args.traceback:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        _end(f"error: {text} If another process has ended, its output says why.", FAILED)


def find_sharding(args: argparse.Namespace) -> MLASharding | None:
    """How the run is spread, over all devices there are; None for one device.

    Raises:
        CliError: parts whose product is not the number of devices.
    """
    parts = {logical: getattr(args, option) for logical, option in AXES.items()}
    devices = jax.device_count()
    if not _asked(args) and not any(parts.values()):
        return None
    others = (parts["batch"] or 1) * (parts["context"] or 1)
    if parts["heads"] is None and devices % others == 0:
        parts["heads"] = devices // others
    sizes = [parts[logical] or 1 for logical in AXES]
    if sizes[0] * sizes[1] * sizes[2] != devices:
        raise CliError(
            f"--tensor-parallel x --data-parallel x --context-parallel must be the {devices} devices there are; got "
            f"{sizes[0]} x {sizes[1]} x {sizes[2]}. Leave --tensor-parallel out for the rest."
        )
    mesh = jax.make_mesh(sizes, tuple(AXES), axis_types=(AxisType.Auto,) * len(sizes))
    return MLASharding(mesh, heads="heads", batch="batch", context="context")


def _asked(args: argparse.Namespace) -> bool:
    given = {name: getattr(args, name) is not None for name in ("coordinator", "num_processes", "process_id")}
    if args.cluster:
        if any(given.values()):
            raise CliError("--cluster must come alone: it finds --coordinator, --num-processes and --process-id.")
        return True
    if any(given.values()) and not all(given.values()):
        raise CliError("--coordinator, --num-processes and --process-id must be given together, or --cluster alone.")
    if given["process_id"] and not 0 <= args.process_id < args.num_processes:
        raise CliError(
            f"--process-id must be 0 .. {args.num_processes - 1} with --num-processes {args.num_processes}; got "
            f"{args.process_id}. Every process has its own number."
        )
    return all(given.values())


def _join(args: argparse.Namespace) -> None:
    expected = "those of the cluster" if args.cluster else f"{args.num_processes} processes at {args.coordinator}"
    late = threading.Timer(
        args.timeout,
        _end,
        (
            f"error: after {args.timeout} s not all processes have joined; this one expects {expected}. Start as "
            "many as --num-processes says, all with the same two, and each with its own --process-id.",
            FAILED,
        ),
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=args.timeout + GRACE_SECONDS,
            heartbeat_timeout_seconds=max(args.timeout, GRACE_SECONDS),
        )
        jax.devices()  # which waits for every process to say what it has
    except (RuntimeError, ValueError) as error:
        late.cancel()
        _end(f"error: cannot join {expected}: {' '.join(str(error).split())}", FAILED)
    late.cancel()
    if not args.cluster and jax.process_count() != args.num_processes:
        _end(
            "error: --num-processes must be the same in every process; got "
            f"{args.num_processes}, process 0 says {jax.process_count()}.",
            FAILED,
        )


def _end(text: str, status: int) -> None:
    sys.stdout.flush()
    print(f"mla-fp4 demo: {text}", file=sys.stderr, flush=True)
    os._exit(status)
