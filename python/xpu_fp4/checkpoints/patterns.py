# SPDX-License-Identifier: Apache-2.0
"""Patterns of module names, which a checkpoint's author chose: matching them ends, whatever they are.

RE2 takes time linear in a name. It refuses what takes more, such as the look-ahead of published configurations: that goes to
`regex`, which has a second of computing for all of a checkpoint.
"""

import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import re2
import regex

from .errors import CheckpointError

PREFIX = "re:"
"""What an entry begins with that is a pattern and no name."""
MOST_PATTERNS = 1000
LONGEST = 1000
SECONDS = 1.0
_RE2_BYTES = 1 << 20  # of each pattern's automaton


class Patterns:
    """The patterns of one checkpoint, compiled when first asked for. where: what an error's message begins with.

    Raises CheckpointError: a pattern that is none, more than 1,000, one of more than 1,000 characters, more than a second spent
    on those that RE2 refuses.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._compiled: dict[str, Callable[[str], object]] = {}
        self._left = SECONDS

    def matches(self, name: str, pattern: str) -> bool:
        """Whether the regex, without its prefix, is there from the beginning of the name on."""
        if pattern not in self._compiled:
            self._compiled[pattern] = self._compile(pattern)
        return bool(self._compiled[pattern](name))

    def _compile(self, pattern: str) -> Callable[[str], object]:
        if len(pattern) > LONGEST:
            raise CheckpointError(f"{self._where} has a pattern of {len(pattern)} characters, expected at most {LONGEST}")
        if len(self._compiled) >= MOST_PATTERNS:
            raise CheckpointError(f"{self._where} has more than {MOST_PATTERNS} patterns")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = _RE2_BYTES
        try:
            match: Callable[[str], object] = re2.compile(pattern, options).match
            return match
        except re2.error:
            pass
        try:
            backtracking = regex.compile(pattern)
        except regex.error as error:
            raise CheckpointError(f"{self._where} has the pattern {pattern!r}, which is no regex: {error}") from None
        return lambda name: self._within_time(backtracking, name)

    def _within_time(self, pattern: "regex.Pattern[str]", name: str) -> object:
        begin = time.thread_time()
        try:
            return pattern.match(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise CheckpointError(
                f"{self._where} has the pattern {pattern.pattern!r}, which takes more than {SECONDS:g} s to match"
            ) from None
        finally:
            self._left -= time.thread_time() - begin


class NameSet:
    """Names and patterns: `name in names` for the name itself or a pattern of it. The many names cost nothing."""

    def __init__(self, entries: Iterable[str], patterns: Patterns) -> None:
        entries = list(entries)
        self._patterns = patterns
        self._names = frozenset(entry for entry in entries if not entry.startswith(PREFIX))
        self._regexes = [entry.removeprefix(PREFIX) for entry in entries if entry.startswith(PREFIX)]

    def __contains__(self, name: str) -> bool:
        return name in self._names or any(self._patterns.matches(name, regex) for regex in self._regexes)


class ShellPatterns:
    """Names and shell patterns (`*`, `?`, `[...]`), whose matching needs no limit but that of their number and length.

    Raises CheckpointError, which begins with where.
    """

    def __init__(self, entries: Iterable[str], where: str) -> None:
        self._places = {entry: place for place, entry in enumerate(entries)}
        self._patterns = [entry for entry in self._places if any(c in entry for c in "*?[")]
        if len(self._patterns) > MOST_PATTERNS or any(len(pattern) > LONGEST for pattern in self._patterns):
            raise CheckpointError(f"{where} has {len(self._patterns)} patterns, expected at most {MOST_PATTERNS} of {LONGEST}")

    def find(self, name: str) -> str | None:
        """The first entry that is the name or matches it."""
        found = [name] if name in self._places else []
        found += [p for p in self._patterns if fnmatchcase(name, p)]
        return min(found, key=lambda entry: self._places[entry], default=None)
