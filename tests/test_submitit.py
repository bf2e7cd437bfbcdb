"""run_with_submitit.py: what is submitted, and a job that runs on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit

import run_with_submitit
from models.checkpoints import read_run
from models.errors import UnknownNameError, UserError
from tests.tiny_run import TINY, options


class _Executor:
    """Stands in for submitit's; remembers what it was asked."""

    cluster = "slurm"
    made: list[_Executor]

    def __init__(self, folder: Path, cluster: str | None, **more: Any) -> None:
        self.folder, self.asked, self.more = folder, cluster, more
        _Executor.made.append(self)

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters = parameters

    def submit(self, job: Any) -> Any:
        self.job = job
        return SimpleNamespace(job_id="17")


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[_Executor]:
    _Executor.made = []
    monkeypatch.setattr(submitit, "AutoExecutor", _Executor)
    return _Executor.made


def test_options_of_the_readme(tmp_path: Path, executors: list[_Executor], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--distributed", "--gpus", "4", "--node", "2", "--timeout", "8", "--partition", "gpu", "--csv_logger"]
    run_with_submitit.main(options(tmp_path, "standard", *more))
    (executor,) = executors
    assert executor.folder == tmp_path / "Digits" / "standard" / TINY / "slurm_logs" / "%j"
    assert executor.more == {"slurm_max_num_timeout": 300}
    assert executor.parameters == {
        "name": TINY,
        "timeout_min": 484,
        "nodes": 2,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
        "cpus_per_task": 16,
        "mem_gb": None,
        "slurm_partition": "gpu",
        "slurm_signal_delay_s": 240,
    }
    assert executor.job.argv == options(
        tmp_path, "standard", "--distributed", "--csv_logger", "--devices", "4", "--num_nodes", "2"
    )
    assert "Submitted job 17" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_submitit_knows_every_parameter(tmp_path: Path, executors: list[_Executor]) -> None:
    run_with_submitit.main(options(tmp_path, "standard", "--timeout_min", "5", "--mem_gb", "3", "--partition", "x"))
    from submitit.auto.auto import AutoExecutor

    AutoExecutor(tmp_path, cluster="debug").update_parameters(**executors[0].parameters)


def test_one_gpu_is_not_distributed(tmp_path: Path, executors: list[_Executor]) -> None:
    run_with_submitit.main(options(tmp_path, "standard", "--gpus", "1", "--timeout_min", "30"))
    assert executors[0].job.argv == options(tmp_path, "standard")
    assert executors[0].parameters["timeout_min"] == 34


def test_wandb_keeps_its_run(tmp_path: Path, executors: list[_Executor]) -> None:
    more = ["--gpus", "1", "--timeout", "1", "--wandb_logger", "--wandb_project", "x"]
    for _ in range(2):
        run_with_submitit.main(options(tmp_path, "standard", *more))
    ids = [executor.job.argv[-1] for executor in executors]
    assert [executor.job.argv[-2] for executor in executors] == ["--wandb_id"] * 2
    assert ids[0] != ids[1]
    assert executors[0].job.checkpoint().function.argv[-1] == ids[0]


def test_queued_again_it_resumes(tmp_path: Path) -> None:
    job = run_with_submitit.Training(options(tmp_path, "standard", "--force-no-resume"))
    again = job.checkpoint().function
    assert isinstance(again, run_with_submitit.Training)
    assert again.argv == options(tmp_path, "standard")


def test_a_job_on_this_machine(tmp_path: Path) -> None:
    more = ["--gpus", "1", "--timeout_min", "5", "--max_epochs", "1", "--refresh_rate", "0", "--cluster", "debug"]
    before = dict(os.environ)
    job = run_with_submitit.main(options(tmp_path, "standard", *more))
    directory = Path(job.result())
    assert directory == tmp_path / "Digits" / "standard" / TINY
    assert read_run(directory / "last.ckpt")["epoch"] == 0
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--timeout", "0"], "--timeout must be a finite number above 0, got 0.0"),
        (["--timeout_min", "nan"], "--timeout_min must be a finite number above 0, got nan"),
        (["--timeout", "1", "--mem_gb", "-1"], "--mem_gb must be a finite number above 0, got -1.0"),
        (["--timeout", "1", "--list"], "--list is nothing to submit"),
        (["--timeout", "1", "--print_config"], "--print_config is nothing to submit"),
        (["--timeout", "1", "--devices", "2"], "follow from --gpus and --nodes"),
        (["--timeout", "1", "--num_nodes", "2"], "follow from --gpus and --nodes"),
        (["--timeout", "1", "--set", "optimiser.lr=x"], "must be a number"),
        (["--timeout", "1", "--jit"], "TorchScript cannot express"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, executors: list[_Executor], more: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        run_with_submitit.main(options(tmp_path, "standard", *more))
    assert sentence in str(caught.value)
    assert executors == []


def test_mistakes_are_found_before_anything_is_queued(
    tmp_path: Path, executors: list[_Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError):
        run_with_submitit.main([*options(tmp_path), "--timeout", "1", "--experiment_name", "resnet_11"])
    for more in (
        [],
        ["--timeout", "1", "--timeout_min", "1"],
        ["--timeout", "1", "--colour", "red"],
        ["--timeout", "1", "--gpus", "0"],
    ):
        with pytest.raises(SystemExit):
            run_with_submitit.main(options(tmp_path, "standard", *more))
    assert executors == []
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'bcos_kernels\[slurm\]'"):
        run_with_submitit.main(options(tmp_path, "standard", "--timeout", "1"))
