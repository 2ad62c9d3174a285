"""`megalora plan` from its arguments to what it prints."""

import argparse
import json
import os
import sys
from pathlib import Path

from megalora.checkpoint.durable import write_whole
from megalora.model.megatron import megatron_flags
from megalora.model.presets import PRESETS, preset_shape
from megalora.plan.devices import DEVICES, NETWORKS
from megalora.plan.fit import proposals
from megalora.plan.floor import floor
from megalora.plan.job import Planned, plan_job
from megalora.plan.processes import OWN_SCRIPT, FailedError, Job
from megalora.plan.report import Found, table, to_dict
from megalora.printable import printable
from megalora.run import script_path


def plan(args: argparse.Namespace) -> int:
    """Plan what the arguments name, and print it; returns the exit status.

    It is 1 where the fullest rank does not fit. Raises ValueError where the input is wrong.
    """
    job = job_of(args)
    try:
        planned = plan_job(job, only=args.rank)
    except FailedError as error:
        if error.failure.output:
            print(error.failure.output, file=sys.stderr)
        if error.failure.is_end:
            return 0
        raise
    found = _judged(planned, args)
    if args.json == "-":
        print(_as_json(found))
    else:
        print("\n".join(map(printable, table(found))))
    if args.json not in (None, "-"):
        write_whole(Path(args.json), _as_json(found) + "\n")
    return int(not found.fits)


def job_of(args: argparse.Namespace) -> Job:
    """Return what is planned; ValueError where there is no such script, model, rank or place."""
    if args.rank is not None and not 0 <= args.rank < args.world_size:
        raise ValueError(f"rank is {args.rank}: give one from 0 to {args.world_size - 1}")
    if args.world_size > args.gpus_per_node and args.world_size % args.gpus_per_node:
        raise ValueError(
            f"world_size {args.world_size} does not fill nodes of {args.gpus_per_node} GPUs: give "
            "a multiple, or --gpus-per-node"
        )
    if args.json not in (None, "-"):
        _check_file(Path(args.json))
    script = OWN_SCRIPT if args.script is None else script_path(args.script)
    flags = list(args.rest)
    if args.model is not None:
        # It says which there are.
        preset_shape(args.model)
        flags = [*megatron_flags(PRESETS[args.model]), *flags]
    return Job(script, tuple(flags), args.world_size, args.gpus_per_node)


def _judged(planned: Planned, args: argparse.Namespace) -> Found:
    """Return a plan with what a device makes of it."""
    device, network = DEVICES[args.device], NETWORKS[args.network]
    memory = int(args.gpu_memory * 2**30) if args.gpu_memory else device.memory
    facts = planned.facts
    least = floor(
        planned.ranks,
        device,
        network,
        tokens=facts.batch.tokens,
        num_gpus=facts.layout.world_size,
        stages=facts.layout.pipeline,
        virtual=facts.layout.virtual,
    )
    fits = planned.fullest.memory.peak <= memory
    others = [] if fits else proposals(planned.job, planned, memory)
    return Found(planned, memory, least, others)


def _as_json(found: Found) -> str:
    return json.dumps(to_dict(found), indent=2)


def _check_file(path: Path) -> None:
    """Raise ValueError where a file cannot be written, before anything is planned."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"json {str(path)!r} is a directory: give a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written to" if folder.is_dir() else "is no directory"
        raise ValueError(f"json {str(path)!r}: {folder} {what}: give another file")
