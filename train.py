"""Fine-tune a language model:   python train.py [group=option ...] [key=value ...]      python train.py --help"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlab.distributed.started import group_of_this_process, leads
from ftlab.errors import FtlabError, Interrupted

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> int:
    """Compose, check, run; the process's exit code is the worst of its jobs'."""
    # Imported here, where Ctrl-C is quiet already; and nothing of the run's own before the check has passed.
    import hydra

    from ftlab.config.check import check_command_line
    from ftlab.config.compose import PRIMARY, VERSION_BASE, hydra_errors, prepare

    exit_codes: list[int] = []

    def job(cfg: DictConfig) -> None:
        exit_codes.append(run_job(cfg))

    prepare()
    with hydra_errors():
        elsewhere = check_command_line(sys.argv[1:], leads=_leads)
        if elsewhere is not None:
            from ftlab.jobs import launch

            return launch(elsewhere, own_process=False)
        hydra.main(version_base=VERSION_BASE, config_path="conf", config_name=PRIMARY)(job)()
    return max(exit_codes, default=0)


def _leads(config: dict[str, Any]) -> bool:
    """Whether the run's folder is made here: not on a machine that only takes part in another's run."""
    parallelism = config["parallelism"]
    return group_of_this_process() is not None or leads(parallelism.get("nnodes", 1), parallelism.get("rdzv_endpoint"))


def run_job(cfg: DictConfig) -> int:
    """Run one composed configuration: the only one, or one job of a sweep, whose failure must not stop the rest."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ftlab import outputs
    from ftlab.config.check import check_job
    from ftlab.jobs import launch

    runtime = HydraConfig.get()
    sweeps = runtime.mode == RunMode.MULTIRUN
    outputs.mask_files(Path(runtime.runtime.output_dir) / (runtime.output_subdir or ""))
    if sweeps:
        outputs.mask_files(Path(runtime.sweep.dir))  # the sweep's own multirun.yaml
    try:
        # A process of its own for each job of a sweep: nothing of one run is left for the next to trip over.
        return launch(check_job(cfg), own_process=sweeps)
    except FtlabError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def exit_code_of(run: Callable[[], int]) -> int:
    """The exit code of ``run``, with the user's own mistakes told in a line or two."""
    try:
        return run()
    except FtlabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupt:
        return 128 + interrupt.number
    except KeyboardInterrupt:
        return 130


def start() -> int:
    """Run ``main``, or take part in what it does in the first of the processes that torchrun or Slurm started."""
    group = group_of_this_process()
    if group is None or group.world_size == 1:
        return exit_code_of(main)
    if group.rank > 0:
        from ftlab.jobs import follow

        return exit_code_of(follow)
    exit_code = exit_code_of(main)
    from ftlab.jobs import dismiss

    dismiss(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(exit_code_of(start))
