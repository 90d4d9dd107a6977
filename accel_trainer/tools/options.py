"""Options as people write them: every field of `TrainConfig` on a command line, or in a YAML file."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from ..base.console import complain, is_first_rank, nearest
from ..config import TrainConfig
from ..errors import HardwareError

_LARGEST_CONFIG = 2**16  # characters
_DEEPEST_CONFIG = 10  # lists and dictionaries in one another
_YAML = "yaml without references"


def _load_yaml(text: str) -> Any:
    """Return what YAML holds, without references: a few lines of them stand for any amount of data.

    Raises:
        YAMLError: It has references, or is too large, or too deep.
    """
    if len(text) > _LARGEST_CONFIG:
        raise yaml.YAMLError(f"it has more than {_LARGEST_CONFIG} characters")
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"references such as *{event.anchor} are not taken")
        if depth > _DEEPEST_CONFIG:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST_CONFIG} deep")
    return get_loader("yaml")(text)


set_loader(_YAML, _load_yaml, (yaml.YAMLError,))


_WRONG = re.compile(r"nrecognized arguments: .*?(?P<option>--[\w-]+)|(invalid choice:|ption) '(?P<name>\w+)'")
# Words of jsonargparse and argparse -> what they are to the one who has typed the command.
_KEY = r'Parser key "(?:\w+\.)?(\w+)"(?: element \d+)?: '
_PLAIN = {
    rf"{_KEY}Not of type \w+: (.*) does not conform to restriction (.*)": r"--\1 must be \3, got \2",
    rf"{_KEY}(?:Not of type \w+: )?": r"--\1: ",
    r"\bv(?=[<>]=?\d)": "",
    r"Expected an? <class '(\w+)'>": r"Expected \1",
    r"\b(?:train|evaluate|predict|check|parity|export|report|runs)\.(?=run)": "",
    r"invalid _list_or_number value": "neither list nor a number",
    r"Unexpected config: *(#.*)?$": "The --config file is empty.",
    r"Unexpected config: ": "The --config file holds no options by name, but ",
}
_FIELDS = vars(TrainConfig())
# Fields that are true or false, or one word more: `--resume` alone, `--resume false`, `--resume auto`.
_YES_OR_NO = {name for name, kind in get_type_hints(TrainConfig).items() if kind is bool or True in get_args(kind)}


class OptionParser(ArgumentParser):
    """Take the fields of `TrainConfig` as options, beside those of a script.

    `--num-epochs` is `--num_epochs`, and no option can be abbreviated. A yes/no option alone means true; `--trackers`
    takes several words. A wrong argument gets one line with the nearest right one, on several processes once.

    Example:
        >>> parser = OptionParser(description="Train something.")
        >>> parser.add_config(num_epochs=40)
        >>> options = parser.parse_args(["--max-steps", "7", "--bitwise", "--trackers", "tensorboard", "wandb"])
        >>> options.num_epochs, options.max_steps, options.bitwise, options.trackers
        (40, 7, True, ['tensorboard', 'wandb'])
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, parser_mode=_YAML, **options)

    def add_config(self, **defaults: Any) -> None:
        """Add `--config` and the fields of `TrainConfig`, with other defaults where they are given."""
        self.add_argument("--config", action="config", help="a YAML file with any of these options")
        self.add_class_arguments(TrainConfig)
        for action in self._actions:
            if action.dest in _YES_OR_NO:
                action.nargs, action.const = "?", True
        self.set_defaults(**defaults)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Return the options, as `ArgumentParser` does, numbers of restricted types as plain ones."""
        spelled = list(self._spelled_out(sys.argv[1:] if args is None else args))
        parsed = super().parse_args(spelled, *others, **options)
        for name, value in vars(parsed).items():  # a checkpoint holds plain numbers only
            if isinstance(value, (int, float)) and type(value) not in (bool, int, float):
                parsed[name] = int(value) if isinstance(value, int) else float(value)
        return parsed

    def config_of(self, options: Namespace) -> TrainConfig:
        """Return the config that the options make; a wrong value ends the program in one line."""
        try:
            return config_of(options)
        except ValueError as error:
            raise SystemExit(fail(str(error))) from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with exit code 2 and one line that names the nearest right argument."""
        text = " ".join(message.split())
        refused = re.match(r'Parser key "(?:\w+\.)?(\w+)": .* value: (.*)', text)
        if refused is not None and refused[1] in _FIELDS:  # said in words of its own
            self.config_of(Namespace(_FIELDS | {refused[1]: refused[2]}))  # type: ignore[no-untyped-call]
        wrong = _WRONG.search(text)
        if wrong is not None:
            options = [word for word in self._words() if word.startswith("--")]
            names = [word.strip("-") for word in self._words()]  # commands, and fields in a YAML file
            near = nearest(wrong["option"], options) if wrong["option"] else nearest(wrong["name"], names)
            text += "" if near is None else f". Did you mean {near}?"
        for internal, plain in _PLAIN.items():
            text = re.sub(internal, plain, text)
        raise SystemExit(fail(text))

    def _words(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action.choices, dict):  # of subcommands
                yield from action.choices
                for parser in action.choices.values():
                    yield from parser._words()

    def _spelled_out(self, arguments: Sequence[str]) -> Iterator[str]:
        """Yield arguments as they are defined: names with their own dashes, the words of a list as one JSON list."""
        known = {word.replace("-", "_"): word for word in self._words()}
        groups = [[""]]  # an option and what follows it
        for argument in arguments:
            if argument.startswith("--"):
                groups.append([])
            groups[-1].append(argument)
        for option, *words in groups:
            name, equals, value = option.partition("=")
            name = known.get(name.replace("-", "_"), name)
            end = next((index for index, word in enumerate(words) if ":" in word), len(words))  # a run function
            if name == "--trackers" and not f"{value}{''.join(words[:1])}".startswith("["):
                names = [value] * bool(equals) + words[:end]
                equals, value, words = "=", json.dumps(names), words[end:]
            elif name[2:] in _YES_OR_NO and not equals and end == 0 < len(words):
                equals, value = "=", "true"
            yield from [name + equals + value, *words] if name else words


def config_of(options: Namespace, **choices: Any) -> TrainConfig:
    """Return the config that parsed options make; `choices` are fields to set otherwise."""
    return TrainConfig(**{field.name: options[field.name] for field in fields(TrainConfig)} | choices)


def fail(text: str) -> int:
    """Write why a command cannot do its work, once for all processes, and return its exit code."""
    if is_first_rank():
        complain(f"error: {text}")
    return 2


REFUSALS = (ValueError, TypeError, OSError, ImportError, HardwareError)


def is_raised_here(error: Exception) -> bool:
    """Return whether this package raised an error on purpose: its message is enough, others need their traceback."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return Path(__file__).parent.parent in Path(raised.filename).parents and str(raised.line).startswith("raise ")


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Let a script end in one line, with exit code 2, where this package refuses to do what it was asked for."""
    try:
        yield
    except REFUSALS as error:
        if not is_raised_here(error):
            raise
        raise SystemExit(fail(str(error))) from None
