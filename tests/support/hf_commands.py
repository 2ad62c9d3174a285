"""Run several commands of `megalora` in one process, since importing megatron is slow.

python -m tests.support.hf_commands COMMANDS RESULTS, both JSON: a list of argument lists,
and a list of [exit status, standard output, standard error].
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from megalora.__main__ import main


def run(argv: list[str]) -> tuple[int, str, str]:
    """Run one command; a usage error's exit counts as its status."""
    if argv[0] == "compare-base":
        return compare_base(argv[1], argv[2])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def compare_base(hf_model: str, checkpoint: str) -> tuple[int, str, str]:
    """Load a written Megatron checkpoint and compare it with the directory that it came from."""
    import torch

    from megalora.hf import offline

    offline.prepare()
    from megalora.hf.base import load_hf_base
    from megalora.hf.one_process import build_base, one_process
    from megalora.model.config_json import read_config

    with one_process():
        from megatron.core import dist_checkpointing, parallel_state

        loaded, wanted = (build_base(read_config(hf_model), torch.float32) for _ in range(2))
        load_hf_base([wanted], hf_model)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = {"model": loaded.sharded_state_dict(metadata={"dp_cp_group": group})}
        state = dist_checkpointing.load(state, checkpoint + "/release")
        loaded.load_state_dict(state["model"])
        expected = dict(wanted.named_parameters())
        wrong = [n for n, p in loaded.named_parameters() if not torch.equal(p, expected[n])]
    return len(wrong), f"{len(expected)} compared", " ".join(wrong)


if __name__ == "__main__":
    commands, target = map(Path, sys.argv[1:])
    results = [run(argv) for argv in json.loads(commands.read_text())]
    target.write_text(json.dumps(results))
