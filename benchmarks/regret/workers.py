"""Run the experiments' jobs in worker processes, and keep their results on disk."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

from benchmarks.regret.job import Base, Job, Result

PRETRAIN_LR = 4e-3
PRETRAIN_BATCH_SIZE = 32
# The last part of pretraining in which the rate falls to zero.
PRETRAIN_DECAY = 0.3
HELD_OUT_SEED, HELD_OUT_SEQUENCES = 999, 128


def run_all(
    jobs: Sequence[Job],
    folder: Path,
    workers: int,
    start_method: str = "spawn",
    *,
    hf_model: Path | None = None,
) -> dict[Job, Result]:
    """Run what is not on disk yet, each job in one of the worker processes; return all results.

    start_method: of multiprocessing; Megatron's state must not be inherited. hf_model: directory of
    the pretrained base, where jobs have one.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    jobs = list(dict.fromkeys(jobs))
    missing = [job for job in jobs if not _file(folder, job).exists()]
    wanted: list[tuple[Base, int]] = [
        (job.base, job.pretrain_steps) for job in missing if job.base != "pretrained"
    ]
    bases = [base for base in dict.fromkeys(wanted) if not _base_file(folder, *base).exists()]
    if missing:
        pool = ProcessPoolExecutor(
            workers, get_context(start_method), _start_worker, (hf_model is None,)
        )
        try:
            for pretrained in [pool.submit(_pretrain, folder, *base) for base in bases]:
                pretrained.result()
            futures = [pool.submit(_run, folder, job, hf_model) for job in missing]
            _tell(as_completed(futures), len(futures))
        finally:
            pool.shutdown(cancel_futures=True)
    return stored(jobs, folder)


def _tell(done: Iterator[Future[Job]], number: int) -> None:
    """Print each run as it ends, and about how long the others will take."""
    began = monotonic()
    for at, run in enumerate(done, start=1):
        left = (monotonic() - began) / at * (number - at)
        print(
            f"run {at}/{number}: {_label(run.result())}; {left / 60:.0f} minutes left", flush=True
        )


def stored(jobs: Sequence[Job], folder: Path) -> dict[Job, Result]:
    """Return the results of those jobs that have run."""
    files = {job: _file(folder, job) for job in jobs}
    return {j: Result.from_json(f.read_text()) for j, f in files.items() if f.exists()}


def _start_worker(is_toy: bool) -> None:
    """Prepare a process for one thread, on a GPU where there is one and the model is no toy."""
    logging.disable(logging.INFO)
    Thread(target=end_with_parent, daemon=True).start()
    import torch

    from megalora import cpu, mends

    torch.set_num_threads(1)
    if is_toy or not torch.cuda.is_available():
        cpu.install_if_wanted(["--cpu"])
    else:
        mends.install()
    # Only now may megatron be imported, here and in the functions below.
    from benchmarks.regret.model import start_megatron

    start_megatron()


def end_with_parent() -> None:
    """End this process where its parent does: nobody would take a killed one's results."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pretrain(folder: Path, base: Base, steps: int) -> None:
    import torch

    from benchmarks.regret import rl, task
    from benchmarks.regret.model import Trainer, build, token_loss

    model = build("moe" if base == "moe" else "dense")
    trainer = Trainer(model, None, PRETRAIN_LR, adam_eps=1e-8)
    tables = [task.base_table()] if base in ("dense", "moe") else rl.languages(base)
    generator = torch.Generator().manual_seed(task.BASE_SEED)
    for step in range(steps):
        trainer.set_lr(PRETRAIN_LR * min(1.0, (steps - step) / (steps * PRETRAIN_DECAY)))
        tokens = task.sequences(tables, PRETRAIN_BATCH_SIZE, generator)
        trainer.step([token_loss(trainer.logits(tokens[:, :-1]), tokens)])
    path = _base_file(folder, base, steps)
    torch.save(model.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _run(folder: Path, job: Job, hf_model: Path | None) -> Job:
    if job.base == "pretrained":
        from benchmarks.regret import answers, pretrained

        assert hf_model is not None
        result = (answers if job.is_rl else pretrained).run(job, hf_model)
    else:
        result = _run_toy(folder, job)
    path = _file(folder, job)
    path.with_suffix(".tmp").write_text(result.to_json())
    os.replace(path.with_suffix(".tmp"), path)
    return job


def _run_toy(folder: Path, job: Job) -> Result:
    import torch

    from benchmarks.regret.model import Trainer, build
    from benchmarks.regret.rl import reinforce
    from megalora import LoRAConfig

    model = build("moe" if job.base == "moe" else "dense")
    model.load_state_dict(torch.load(_base_file(folder, job.base, job.pretrain_steps)))
    # No adapter touches it, so full fine-tuning would have what LoRA has not.
    model.embedding.requires_grad_(False)
    lora = LoRAConfig(rank=job.rank, targets=job.targets, seed=job.seed) if job.rank else None
    trainer = Trainer(model, lora, job.lr, adam_eps=1e-8)
    curve = reinforce(trainer, job) if job.is_rl else _fine_tune(trainer, job)
    tail = curve[-max(1, len(curve) // 10) :]
    return Result(
        curve=curve,
        final=sum(tail) / len(tail) if job.is_rl else _held_out(trainer),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _fine_tune(trainer: Any, job: Job) -> list[float]:
    import torch

    from benchmarks.regret import task
    from benchmarks.regret.model import token_loss

    tables = [task.changed_table()]
    generator = torch.Generator().manual_seed(job.seed)
    curve = []
    for _ in range(job.steps):
        tokens = task.sequences(tables, job.batch_size, generator)
        loss = token_loss(trainer.logits(tokens[:, :-1]), tokens)
        curve.append(loss.item())
        trainer.step([loss])
    return curve


def _held_out(trainer: Any) -> float:
    import torch

    from benchmarks.regret import task
    from benchmarks.regret.model import token_loss

    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    tokens = task.sequences([task.changed_table()], HELD_OUT_SEQUENCES, generator)
    with torch.no_grad():
        return token_loss(trainer.logits(tokens[:, :-1]), tokens).item()


def _file(folder: Path, job: Job) -> Path:
    return folder / "runs" / f"{job.key}.json"


def _base_file(folder: Path, base: Base, steps: int) -> Path:
    return folder / f"{base}-{steps}.pt"


def _label(job: Job) -> str:
    how = f"rank {job.rank} on {' '.join(job.targets)}" if job.rank else "full fine-tuning"
    base = f"{job.model} in {job.precision}" if job.model else job.base
    return f"{base}: {how}, lr {job.lr:g}, batch {job.batch_size}, seed {job.seed}"
