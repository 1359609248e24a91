"""build(): from a node to an object, by way of the allowlist, without OmegaConf in between."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from ftlab.config.build import build
from ftlab.config.targets import MOVED, in_todays_names, locate
from ftlab.errors import ConfigError


class Probe:
    """Keeps what it was built with."""

    def __init__(self, *, value: Any, other: Any = None):
        if value == "wrong":
            raise ConfigError("probe.value", "is wrong")
        self.value, self.other = value, other


@pytest.fixture(autouse=True)
def _probe_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "__module__", "ftlab.losses")
    monkeypatch.setattr("ftlab.losses.Probe", Probe, raising=False)


PROBE = {"_target_": "ftlab.losses.Probe"}


def test_lists_and_mappings_arrive_as_pythons_own() -> None:
    value = build(PROBE | {"value": {"a": [1, {"b": 2}]}}).value
    assert (type(value), type(value["a"]), type(value["a"][1])) == (dict, list, dict)


def test_text_that_looks_like_an_interpolation_stays_text() -> None:
    assert build(PROBE | {"value": ["Q: ${question}"]}).value == ["Q: ${question}"]


def test_a_node_inside_is_built_first() -> None:
    assert isinstance(build(PROBE | {"value": [PROBE | {"value": 1}]}).value[0], Probe)


def test_what_arrives_at_run_time_is_passed_on_untouched() -> None:
    runtime = {"tensor": torch.zeros(2), "list": [1]}
    built = build(PROBE | {"_partial_": True, "value": 1}, other=runtime)
    assert built.other is runtime


def test_a_partial_waits_for_the_rest() -> None:
    waiting = build(PROBE | {"_partial_": True, "value": 1})
    assert isinstance(waiting, functools.partial)
    assert waiting(other=2).other == 2


def test_an_optimizer_takes_groups_and_its_betas_are_plain() -> None:
    node = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1, "betas": [0.9, 0.95]}
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build(node, params=[{"params": [parameter], "weight_decay": 0.5}])
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert list(optimizer.param_groups[0]["betas"]) == [0.9, 0.95]
    assert isinstance(optimizer.param_groups[0]["betas"], tuple | list)


@pytest.mark.parametrize("node", [PROBE, PROBE | {"_partial_": True}])
def test_a_config_error_of_the_constructor_reaches_the_user_as_it_is(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^probe\.value: is wrong$"):
        build(node | {"value": "wrong"}, other=1)


def test_a_config_error_of_a_node_inside_does_too() -> None:
    with pytest.raises(ConfigError, match=r"^probe\.value: is wrong$"):
        build(PROBE | {"value": PROBE | {"value": "wrong"}})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",  # the name is not allowed
        "ftlab.outputs.secrets.mask_secrets",  # ours, but a function
        "ftlab.outputs.folder.Path",  # a class, but another's
        "ftlab.losses.Tensor",
        "ftlab.outputs.folder.os.system",
    ],
)
def test_only_classes_that_ftlab_itself_defines_are_built(target: str) -> None:
    for node in ({"_target_": target}, PROBE | {"value": [{"_target_": target}]}):
        with pytest.raises(ConfigError, match=r"not in the allowlist|cannot be imported"):
            build(node)


@pytest.mark.parametrize(("before", "now"), MOVED.items())
def test_a_name_that_moved_leads_to_the_class_of_today(before: str, now: str) -> None:
    assert locate(now, "key").__name__ == before.rpartition(".")[2]
    kept = {"key": {"_target_": before, "more": [{"_target_": before}], "text": before}}
    assert in_todays_names(kept) == {"key": {"_target_": now, "more": [{"_target_": now}], "text": before}}


def test_who_still_writes_a_name_that_moved_is_told_where_to() -> None:
    with pytest.raises(ConfigError, match=r"has no TrainerConfig\n  try: ftlab\.training\.\w+\.TrainerConfig$"):
        build({"_target_": "ftlab.training.loop.TrainerConfig"})


def test_a_node_without_a_target_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        build({"value": 1})
