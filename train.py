"""Fine-tune a language model:   python train.py [group=option ...] [key=value ...]      python train.py --help"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.errors import FtlabError

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
        check_command_line(sys.argv[1:])
        hydra.main(version_base=VERSION_BASE, config_path="conf", config_name=PRIMARY)(job)()
    return max(exit_codes, default=0)


def run_job(cfg: DictConfig) -> int:
    """Run one composed configuration: the only one, or one job of a sweep, whose failure must not stop the rest."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ftlab import outputs
    from ftlab.config.check import check_job
    from ftlab.run import launch

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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FtlabError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
