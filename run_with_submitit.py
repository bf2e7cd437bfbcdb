"""Trains an experiment as a job of a SLURM cluster. Takes train.py's options too.

A job that is preempted or runs out of time is queued again, and resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import secrets
from typing import Any

import train
from models import cli
from models.errors import UserError

# So long before its end a job is told to stop, minutes.
_NOTICE = 4


def get_parser() -> argparse.ArgumentParser:
    """The options of the job; train.py's follow them."""
    parser = argparse.ArgumentParser(
        description="Train an experiment as a SLURM job. All other options are train.py's.", allow_abbrev=False
    )
    parser.add_argument("--gpus", type=cli.positive, default=4, help="GPUs on each machine (default: %(default)s)")
    parser.add_argument("--nodes", "--node", type=cli.positive, default=1, help="machines (default: %(default)s)")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--timeout", type=float, metavar="HOURS", help="time limit of one job")
    limit.add_argument("--timeout_min", type=float, metavar="MINUTES", help="the same in minutes")
    parser.add_argument(
        "--requeue", type=cli.not_negative, default=300, help="queue it again so often (default: %(default)s)"
    )
    parser.add_argument("--partition", help="where to submit (default: the cluster's)")
    parser.add_argument("--job_name", help="default: the experiment's name")
    parser.add_argument(
        "--cpus_per_task", type=cli.positive, default=16, help="cores for each GPU (default: %(default)s)"
    )
    parser.add_argument("--mem_gb", type=float, help="memory of each machine (default: the cluster's)")
    parser.add_argument(
        "--cluster",
        choices=["slurm", "local", "debug"],
        help="default: slurm where there is one; local: on this machine",
    )
    return parser


class Training:
    """What the job does: train.py with these options."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> str:
        """Trains; returns the experiment's folder."""
        return str(train.main(self.argv))

    def checkpoint(self) -> Any:
        """What submitit queues when the job has to stop: the same, since training resumes by itself."""
        import submitit

        rest = [option for option in self.argv if option != "--force-no-resume"]
        return submitit.helpers.DelayedSubmission(Training(rest))


def main(argv: list[str] | None = None) -> Any:
    """Submits the job and prints its number.

    Args:
        argv: the options; default: the command line.

    Returns:
        submitit's job.

    Raises:
        models.errors.UserError: options that do not fit, or submitit is not installed.
    """
    args, training = get_parser().parse_known_args(argv)
    for option in ("timeout", "timeout_min", "mem_gb"):
        value = getattr(args, option)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{option} must be a finite number above 0, got {value}.")
    options = train.get_parser().parse_args(training)
    if options.devices is not None or options.num_nodes != 1:
        raise UserError("--devices and --num_nodes follow from --gpus and --nodes here.")
    for option in ("list", "print_config", "debug"):
        if getattr(options, option):
            raise UserError(f"--{option} is nothing to submit: give it to train.py.")
    experiment = train.chosen_experiment(options)
    try:
        import submitit
    except ImportError as error:
        raise UserError("run_with_submitit.py needs submitit: pip install 'bcos_kernels[slurm]'.") from error

    if options.wandb_logger and options.wandb_id is None:
        training = [*training, "--wandb_id", secrets.token_hex(4)]  # the same for every part of the run
    if options.distributed or args.gpus * args.nodes > 1:
        more = ["--devices", str(args.gpus), "--num_nodes", str(args.nodes)]
        training = [*training, *more, *([] if options.distributed else ["--distributed"])]
    folder = experiment.directory(options.base_directory) / "slurm_logs" / "%j"
    try:
        executor = submitit.AutoExecutor(folder, cluster=args.cluster, slurm_max_num_timeout=args.requeue)
    except RuntimeError as error:
        raise UserError(f"--cluster {args.cluster}: {error} Without --cluster the job runs on this machine.") from error
    minutes = args.timeout_min if args.timeout is None else args.timeout * 60
    executor.update_parameters(
        name=args.job_name or experiment.name,
        timeout_min=round(minutes) + _NOTICE,
        nodes=args.nodes,
        gpus_per_node=args.gpus,
        tasks_per_node=args.gpus if executor.cluster == "slurm" else 1,  # elsewhere Lightning starts the processes
        cpus_per_task=args.cpus_per_task,
        mem_gb=args.mem_gb,
        slurm_partition=args.partition,
        slurm_signal_delay_s=_NOTICE * 60,
    )
    job = executor.submit(Training(training))
    print(f"Submitted job {job.job_id}; its output goes to {folder}")
    return job


if __name__ == "__main__":
    cli.run(main)
