"""What all stages can be told, and how files and flags become arguments."""

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments


def option(default: Any, text: str) -> Any:
    """A field whose meaning `--help` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class DistillationArguments(TrainingArguments):
    """Arguments of transformers' `TrainingArguments`, and what every stage adds to them.

    Args:
        trained_parts: What is trained: names in `family.PARTS`, or patterns of weights.
        loss_weights: Factor of each loss term, in place of the stage's own.
        freeze_norms: Leave the statistics of batch norms as they are.
        sync_norms: Let batch norms see the batches of all processes; on GPUs.
        dropout: Leave units out as the student's configuration says. Then gradients depend on how a
            batch is shared out among processes and steps of accumulation.
        norm_learning_rate: Factor of the learning rate for weights of norms and biases.
        trunk_learning_rate: Factor of the learning rate for the trunk.
        ema_decay: Share of the old in the moving average of weights that is saved at the end and
            evaluated; 0 for none.
        pictures_every: Steps between pictures of what the model says of the same few samples; 0 for
            none.
        stop_on_nan: Raise when a loss is not a number, before anything is saved.
    """

    trained_parts: list[str] = field(
        default_factory=list, metadata={"help": "What is trained; empty for the stage's own list."}
    )
    loss_weights: dict | str | None = field(
        default=None, metadata={"help": "Factors of loss terms, as JSON: those given are replaced."}
    )
    freeze_norms: bool = field(
        default=False, metadata={"help": "Leave the statistics of batch norms as they are."}
    )
    sync_norms: bool = field(
        default=False, metadata={"help": "Let batch norms see the batches of all processes."}
    )
    dropout: bool = field(default=False, metadata={"help": "Use the configuration's dropout."})
    norm_learning_rate: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate for norms and biases."}
    )
    trunk_learning_rate: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate for the trunk."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of the moving average of weights; 0 for none."}
    )
    pictures_every: int = field(
        default=0, metadata={"help": "Steps between pictures of the model's answers; 0 for none."}
    )
    stop_on_nan: bool = field(default=True, metadata={"help": "Raise when a loss is not a number."})

    # Other defaults than transformers'. Records of datasets here are no columns to choose among.
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    logging_steps: float = 50
    max_grad_norm: float = 1.0
    weight_decay: float = 0.05
    lr_scheduler_type: str = "cosine"
    report_to: list[str] = field(default_factory=lambda: ["none"])

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_weights"]

    def __post_init__(self):
        super().__post_init__()
        if self.freeze_norms and self.sync_norms:
            raise ValueError("freeze_norms leaves batch norms nothing to share: drop sync_norms.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and less than 1.")


def read_values(
    path: str | Path | None, flags: Sequence[str], sections: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The settings of each section as they were written, flags before the file.

    A value in place of a section, such as `stage: stage1_text`, is that section's `name`.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if path is not None:
        values = {**values, **read_yaml(Path(path), sections)}
    for name, value in read_flags(flags):
        section, _, key = name.partition(".")
        if section not in sections:
            check_known(section, sections, f"section of settings (in --{name})")
        values[section][key or "name"] = value
    return values


def read_yaml(path: Path, sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The sections of a file, checked."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections: {', '.join(sections)}.")
    for name, section in content.items():
        check_known(name, list(sections), f"section of {path}")
        if isinstance(section, str):
            content[name] = {"name": section}
        elif section is None:
            content[name] = {}
        elif not isinstance(section, dict):
            raise ValueError(f"Section {name!r} of {path} must hold settings, not {section!r}.")
    return content


def read_flags(flags: Sequence[str]) -> list[tuple[str, Any]]:
    """`["--a.b", "1", "--c.d=x"]` as names and texts; several values make a list, as does none."""
    found: list[tuple[str, Any]] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} belongs to no flag: flags look like --section.field value.")
        name, has_value, value = flag[2:].partition("=")
        values = [value] if has_value else []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        found.append((name, values[0] if len(values) == 1 else values))
    return found


def build(section: str, values: Mapping[str, Any], kind: Any) -> Any:
    """A dataclass from values as YAML or flags give them, each turned into its type."""
    names = [entry.name for entry in fields(kind) if entry.init]
    for name in values:
        check_known(name, names, f"setting of {section}")
    parser = HfArgumentParser(kind, exit_on_error=False)
    hints, given = get_type_hints(kind), []
    for name, value in values.items():
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"Section {section}: {name} has no value.")
        if value is None or (value == [] and get_origin(hints[name]) is list):
            parser.set_defaults(**{name: value})  # a command line has no words for it
        else:
            given += as_words(name, value)
    try:
        (result,) = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"Section {section}: {error.doc!r} is no JSON: {error}.") from error
    except (argparse.ArgumentError, ValueError, SystemExit) as error:
        raise ValueError(f"Section {section}: {error}") from error
    return result


def as_words(name: str, value: Any) -> list[str]:
    """A setting as it would be written on a command line."""
    if isinstance(value, list | tuple):
        return [f"--{name}", *(str(each) for each in value)]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", str(value)]


def default_of(entry: Field) -> Any:
    """The default of a field."""
    factory: Any = entry.default_factory
    return entry.default if factory is MISSING else factory()


def check_known(name: str, known: Sequence[str], what: str) -> None:
    """Raise for a name that does not exist, with the nearest that does."""
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(sorted(known))}."
    raise ValueError(f"{name!r} is no {what}.{hint}")


def check_shares(**shares: float) -> None:
    """Raise for what is no share."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be a share, from 0 to 1.")
