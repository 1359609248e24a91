"""What a run will take of memory: foretold, refused where it is not there, and the batch chosen by it."""

from __future__ import annotations

import logging

from ftlab.config.build import Config
from ftlab.data.base import TrainingData
from ftlab.data.stream import Stream
from ftlab.distributed.env import WorkerEnv, describe_device
from ftlab.distributed.meeting import Team
from ftlab.forecast import CLEAR_EXCESS, Setting, available_bytes, forecast_up_to, with_batch_size
from ftlab.models.auto import AnyModelConfig
from ftlab.models.config import ModelConfig
from ftlab.remedies import refuse_unfit
from ftlab.training.rehearse import Rehearsal

log = logging.getLogger(__name__)


def _setting(data: TrainingData, worker: WorkerEnv) -> Setting:
    longest, longest_validation = data.longest()
    return Setting(
        longest=longest,
        longest_validation=longest_validation,
        rows=None if isinstance(data.train, Stream) else len(data.train),
        validation_rows=len(data.validation) if data.validation else None,
        n_ranks=worker.world_size,
        n_local_ranks=worker.local_world_size,
        on_cuda=worker.device.type == "cuda",
    )


def with_found_batch_size(
    config: Config, model: AnyModelConfig, data: TrainingData, worker: WorkerEnv, team: Team | None
) -> Config:
    """``config`` with a number for ``trainer.batch_size=auto``, the first rank's."""
    if config["trainer"]["batch_size"] != "auto":
        return config
    available = available_bytes(worker.device, worker.local_world_size)
    known = model if isinstance(model, ModelConfig) else None
    found = with_batch_size(config, known, _setting(data, worker), available)
    size: int = found["trainer"]["batch_size"]
    if team is not None:
        size = int(team.from_first("batch_size", str(size)))
    log.info("trainer.batch_size=%d: the largest that fits", size)
    return found | {"trainer": found["trainer"] | {"batch_size": size}}


def foretell_memory(config: Config, model: AnyModelConfig, data: TrainingData, worker: WorkerEnv) -> Rehearsal | None:
    """What the run will take of memory; refused where that is clearly not there."""
    if not isinstance(model, ModelConfig):  # what transformers' models do with memory is not rehearsed
        return None
    setting = _setting(data, worker)
    available = available_bytes(worker.device, worker.local_world_size)
    predicted = forecast_up_to(CLEAR_EXCESS * available, config, model, setting)
    if predicted is not None:
        refuse_unfit(predicted, available, config, model, setting, describe_device(worker.device))
    return predicted
