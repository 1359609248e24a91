"""Fine-tune a language model:   python train.py [group=option ...] [key=value ...]      python train.py --help"""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlab import ctrl_c
from ftlab.distributed.started import group_of_this_process, leads
from ftlab.errors import FtlabError
from ftlab.exit_codes import exit_code_of

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> int:
    """Compose, check, run; the process's exit code is the worst of its jobs'."""
    # Imported here, where Ctrl-C is quiet already; and nothing of the run's own before the check has passed.
    import hydra

    from ftlab.config.check import check_command_line
    from ftlab.config.compose import PRIMARY, VERSION_BASE, hydra_errors, in_hydras_terms, prepare
    from ftlab.config.sweeps import with_one_shown, with_resumed_sweep

    prepare()
    with hydra_errors():
        sys.argv[1:] = in_hydras_terms(with_one_shown(with_resumed_sweep(sys.argv[1:])))
        elsewhere = check_command_line(sys.argv[1:], leads=_leads)
        if elsewhere is not None:
            from ftlab.jobs import launch

            return launch(elsewhere, own_process=False)
        try:
            hydra.main(version_base=VERSION_BASE, config_path="conf", config_name=PRIMARY)(run_job)()
        except SystemExit as end:
            ctrl_c.heed()
            return int(end.code or 0)
    return 0


def _leads(config: dict[str, Any]) -> bool:
    """Whether the run's folder is made here: not on a machine that only takes part in another's run."""
    parallelism = config["parallelism"]
    return group_of_this_process() is not None or leads(parallelism.get("nnodes", 1), parallelism.get("rdzv_endpoint"))


def run_job(cfg: DictConfig, *, own_process: bool | None = None) -> int:
    """Run one composed configuration: the only one, or one job of a sweep, whose failure must not stop the rest.

    Args:
        own_process: whether to start a process for it, so that nothing of one run is left for the next to trip over;
            None: where it is one of a sweep, whose launcher may use a process for several.

    Returns:
        The exit code of a sweep's job; a single run's ends the process, because Hydra would forget it.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ftlab.config.check import check_job
    from ftlab.jobs import launch
    from ftlab.outputs.folder import FolderInUseError
    from ftlab.outputs.secrets import mask_files
    from ftlab.outputs.sweep import fail

    runtime = HydraConfig.get()
    folder, sweeps = Path(runtime.runtime.output_dir), runtime.mode == RunMode.MULTIRUN
    if own_process is None:
        own_process = sweeps
    mask_files(folder / (runtime.output_subdir or ""))
    if sweeps:
        mask_files(Path(runtime.sweep.dir))  # the sweep's own multirun.yaml

    def check_and_launch() -> int:
        try:
            config = check_job(cfg)
        except FolderInUseError:  # whoever uses it says how that run ends
            raise
        except FtlabError as error:
            fail(folder, error)
            raise
        return launch(config, own_process=own_process)

    exit_code = exit_code_of(check_and_launch)
    return exit_code if sweeps else sys.exit(exit_code)


def start() -> int:
    """Run ``main``, or take part in what it does in the first of the processes that torchrun or Slurm started."""
    ctrl_c.remember()
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
    atexit.register(gc.freeze)  # else the end of the interpreter looks through all of torch: up to a second
    sys.exit(exit_code_of(start))
