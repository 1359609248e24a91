"""``resume=RUN``: the configuration of a run that goes on.

The checkpoint's own configuration is the base, whatever ``conf/`` says by now. What the user types beside ``resume``
is laid over it: not as text, but as the difference that it makes to the composition of all that the run was started
and resumed with before. So a changed option brings its other values along, and keys that follow from one another
(``trainer.epochs`` makes way for ``trainer.max_steps``) still do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ftlab.config.compose import Composition, compose, hydra_globals
from ftlab.config.layers import leaves
from ftlab.config.overrides import given_values
from ftlab.config.resolve import resolve
from ftlab.config.stored import stored_config
from ftlab.config.unread import unread
from ftlab.errors import CheckpointError, ConfigError, ConfigErrors
from ftlab.outputs.files import read_yaml
from ftlab.outputs.folder import read_record
from ftlab.storage.addresses import Address, candidates, find_run, told
from ftlab.typed import override

KEY = "resume"
_CACHE = "paths.cache_dir"
_MISSING = object()

# What decides the data order, the architecture or the optimizer's state; a run that went on with another would be
# neither the old one nor a new one.
_SETTLED = (
    *("seed", "seq_len", "model.", "tokenizer.", "dataset.", "precision.param_dtype", "optimizer._target_"),
    *("trainer.max_steps_per_epoch", "trainer.gradient_accumulation_steps", "trainer.global_batch_size"),
)
# Where the same things are by now: fingerprints are compared when they have been read.
_MOVABLE = ("model.checkpoint", "tokenizer.path", "dataset.data_files", "dataset.source")
# Of a resolver: ${oc.env:NAME}, whose name may come from elsewhere: ${oc.${name}:NAME}.
_CALL = re.compile(r"\$\{[^}]*[:$]")
# Of a run's own, not of its configuration.
_OWN = ("resume", "paths.")
# What only a new run can be told.
_OF_A_NEW_RUN = ("init_from", "init_optimizer", "paths.output_dir", "hydra.", "hydra/")
_TELLING = ("logger.", "run_name", "sweep.")  # what it is called, and who hears of it


def resume_in(overrides: Sequence[str]) -> str | None:
    """The run that ``overrides`` ask to go on with; None when they do not."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            given = parser.parse_override(text)
            if given.key_or_group == KEY and not given.is_sweep_override() and given.value() is not None:
                return str(given.value())
        except (HydraException, ValueError):
            continue  # check_command_line says so
    return None


def resumed_config(overrides: Sequence[str], search: dict[str, Any]) -> tuple[dict[str, Any], Composition | None]:
    """The run's configuration with what ``overrides`` change, and the composition that those are known from, if any.

    ``resume`` in it holds where the run goes on from and what was changed, for the record.

    Raises:
        ConfigError: there is nothing to go on from.
        ConfigErrors: for overrides that cannot be, or that would make it another run.
    """
    text = resume_in(overrides)
    assert text is not None
    if problems := list(_for_a_new_run(overrides)):
        raise ConfigErrors(problems)
    address = find_run(text, KEY)
    _require_record(address.run)
    config = upgraded(_own_config(address), address.run, **search)
    now = [override for override in overrides if _key(override) != KEY]
    composition = _lay_over(config, now, address.run, search) if now else None
    config["paths"] = {**config.get("paths", {}), "output_dir": str(address.run)}
    if _CACHE in (given := given_values(now)):  # of this machine: no run is another for it
        config["paths"]["cache_dir"] = given[_CACHE]
    config[KEY] = {"run": str(address.run), "at": address.at, "overrides": now}
    return config, composition


def _for_a_new_run(overrides: Sequence[str]) -> Iterator[ConfigError]:
    """What beside ``resume`` would be ignored."""
    if len([text for text in overrides if _key(text) == KEY]) > 1:
        yield ConfigError(KEY, "is given twice, but one run goes on at a time", f"{KEY}=RUN")
    for text in overrides:
        if (key := _key(text)).startswith(_OF_A_NEW_RUN):
            yield ConfigError(key, f"is for a new run, but {KEY} goes on with one, in its folder", f"leave out {text}")


def _require_record(run: Path) -> None:
    try:
        record = read_record(run)
        sound = isinstance(record["status"], str) and isinstance(record.get("resumed", []), list)
    except (OSError, ValueError, KeyError):
        sound = False
    if not sound:
        raise CheckpointError(run / "run.json", "is damaged", f"a new run from these weights: init_from={run}")


def upgraded(config: dict[str, Any], run: Path, **search: Any) -> dict[str, Any]:
    """A copy of a run's ``config`` with the keys that have come since an earlier version wrote it.

    They get the values that the run's own command line would give them today: a new key's default is what was done
    before there was a key. All else stays as it was, and so does a node that the run did without, such as a logger.
    """
    config = copy.deepcopy(config)
    composition = compose(_overrides_before(run), **search)
    if composition.problems:  # an option that is no more: what is stored must do, and the checks will say if not
        return config
    today, held, groups = _leaves(composition), dict(leaves(config)), set(config)
    for key, value in today.items():
        target = f"{key.rpartition('.')[0]}._target_"
        same_node = target in held and held[target] == today.get(target)
        if key not in held and not key.startswith(_OWN) and (same_node or key.partition(".")[0] not in groups):
            _set(config, key, value)
    return config


def todays_config(stored: Any, run: Path, where: Path, to_build: Sequence[str]) -> dict[str, Any]:
    """The configuration that the run in ``run`` has ``stored``, in today's terms, for looking at what it trained.

    Args:
        where: it was found, for errors.
        to_build: the groups that will be built.

    Raises:
        ConfigErrors: it is none that ftlab could have composed, or its groups cannot be built.
    """
    return stored_config(upgraded(stored_config(stored, where), run), where, to_build)


def overlaid(
    config: dict[str, Any],
    overrides: Sequence[str],
    run: Path,
    may_change: tuple[str, ...],
    extra_dir: Path | None = None,
) -> dict[str, Any]:
    """``config`` of the run in ``run`` with the difference that ``overrides`` make, for looking at what it trained.

    Args:
        may_change: the beginnings of keys that overrides may change.
        extra_dir: a further folder to search for options.

    Raises:
        ConfigErrors: for overrides that cannot be, and for those of other keys.
    """
    changed, composition = _changes(config, list(overrides), run, {"extra_dir": extra_dir}, afresh=True)
    # What only tells of a run, such as W&B's tags, follows an option and is nothing here; typed, it is a mistake.
    typed = {_key(override) for override in overrides}
    changed = {key: value for key, value in changed.items() if not key.startswith(_TELLING) or _within(key, typed)}
    wrong = [key for key in changed if not key.startswith(may_change)]
    if wrong:
        allowed = ", ".join(f"{key}…" if key.endswith(".") else key for key in may_change)
        problem = f"was settled by the run in {run}; what can be changed here is {allowed}"
        raise ConfigErrors([ConfigError(key, problem) for key in wrong])
    config = copy.deepcopy(config)
    for key, value in changed.items():
        _set(config, key, value)
    # Only of what is changed: the run itself did without whatever it did not read.
    if problems := [problem for problem in unread(dict(leaves(config)), composition) if problem.key in changed]:
        raise ConfigErrors(problems)
    return config


def _lay_over(config: dict[str, Any], now: list[str], run: Path, search: dict[str, Any]) -> Composition:
    """Change ``config`` by the difference that the overrides ``now`` make."""
    changed, composition = _changes(config, now, run, search)
    if problems := list(_unsettling(changed, dict(leaves(config)), run)):
        raise ConfigErrors(problems)
    for key, value in changed.items():
        _set(config, key, value)
    return composition


def _changes(
    config: dict[str, Any], now: list[str], run: Path, search: dict[str, Any], *, afresh: bool = False
) -> tuple[dict[str, Any], Composition]:
    """The keys of ``config`` that the overrides ``now`` change and their values, and the composition with them.

    Args:
        afresh: an option that is chosen now has its own values, but for what is typed now; else those that the run
            was given for the former one as well, as far as it has such keys.
    """
    before = _overrides_before(run)
    again = {_key(override) for override in now}
    options = {key for key in again if "." not in key}
    kept = [text for text in before if _key(text) not in again and not (afresh and _within(_key(text), options))]
    composition = compose([*kept, *now], **search)
    # What was typed for an option that another one has taken the place of may have nothing to be said of there.
    lacking = {problem.key for problem in composition.problems}
    fitting = [text for text in kept if not (_key(text) in lacking and _within(_key(text), options))]
    if fitting != kept:
        composition = compose([*fitting, *now], **search)
    if composition.problems:
        raise ConfigErrors(composition.problems)
    held, with_them, without = dict(leaves(config)), _leaves(composition), _leaves(compose(before, **search))
    # The composition of before knows nothing of an option that is no longer to be found, nor of any in a folder that
    # no command line made: where it says the default, that was not the run's. What is typed for the first time is
    # therefore compared with what the run holds.
    new = {_key(override) for override in now if override not in before}
    without = {key: value for key, value in without.items() if not _within(key, new)}
    without |= {key: value for key, value in held.items() if _within(key, new)}
    changed = {}
    for key in {**without, **with_them}:  # what goes before what comes: a mapping may take the place of its own keys
        value = with_them.get(key, _MISSING)
        if value not in (without.get(key, _MISSING), held.get(key, _MISSING)) and not key.startswith(_OWN):
            changed[key] = value
    return changed, composition


def _within(key: str, parents: Collection[str]) -> bool:
    """Whether ``key`` is one of ``parents`` or below one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _own_config(address: Address) -> dict[str, Any]:
    """The configuration in the first of the address's checkpoints of which that much is sound."""
    found = candidates(address)
    for number, one in enumerate(found):
        try:
            return stored_config(told(one)["config"], one.path)
        except CheckpointError:
            if number == len(found) - 1:
                raise
    raise AssertionError("find_run found at least one")


def _overrides_before(run: Path) -> list[str]:
    """All that the user typed for this run so far."""
    typed: list[str] = []
    try:
        first = read_yaml(run / ".hydra" / "overrides.yaml")
        typed += [str(override) for override in first or []]
        for session in read_record(run).get("resumed", []):
            typed += [str(override) for override in session.get("overrides", [])]
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # a run that was not started from a command line
    # Whoever wrote this folder does not get to ask this machine's environment, nor to name folders of options.
    believed = [text for text in typed if not _calls(text) and not _key(text).startswith("hydra.")]
    return [text for text in believed if _key(text) not in (KEY, "")]


def _key(override: str) -> str:
    try:
        return OverridesParser.create().parse_override(override).key_or_group
    except (HydraException, ValueError):
        return "" if "=" not in override else override.partition("=")[0].lstrip("+~")


def _calls(override: str) -> bool:
    """Whether a resolver is called in it, as it stands there or once Hydra has read it (``$\\{`` is ``${`` then)."""
    return bool(_CALL.search(override) or any(_CALL.search(str(value)) for value in given_values([override]).values()))


def _leaves(composition: Composition) -> dict[str, Any]:
    with hydra_globals(composition.cfg):
        config, _ = resolve(composition.cfg)
    return dict(leaves(config))


def _unsettling(changed: dict[str, Any], held: dict[str, Any], run: Path) -> Iterator[ConfigError]:
    """The changes that would make it another run."""
    for key, value in changed.items():
        # Weights that were random have no place, and none can be given to them.
        moves = key.startswith(_MOVABLE) and (key != "model.checkpoint" or None not in (held.get(key), value))
        if key.startswith(_SETTLED) and not moves:
            new = "nothing" if value is _MISSING else repr(value)
            yield ConfigError(
                key,
                f"is {held.get(key)!r} in this run, and decides its data order, model or optimizer state; "
                f"it cannot go on with {new}",
                f"a new run from these weights: {override('init_from', str(run))}",
            )


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key``, or take it away, and with it the mappings that it leaves empty."""
    name, _, rest = key.partition(".")
    if rest:
        node = config.get(name)
        inner = node if isinstance(node, dict) else {}
        _set(inner, rest, value)
        value = inner or _MISSING
    if value is _MISSING:
        config.pop(name, None)
    else:
        config[name] = value
