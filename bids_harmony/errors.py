"""Errors that a user can cure, each with its exit code (BIDS Apps execution specification)."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes (BIDS Apps execution specification, outputs chapter)."""

    OK = 0
    FAILURE = 1
    INVALID_DATASET = 16
    UNKNOWN_LEVEL = 17
    NOTHING_SELECTED = 18
    USAGE = 64
    DATA = 65
    NO_INPUT = 66
    CANNOT_CREATE = 73
    IO = 74
    TEMPORARY = 75


class HarmonyError(Exception):
    """A failure whose one-line message names the file and the cure."""

    exit_code = ExitCode.FAILURE


class UsageError(HarmonyError):
    """The command line asks for something impossible or ambiguous."""

    exit_code = ExitCode.USAGE


class DatasetError(HarmonyError):
    """The data set as a whole is not usable, e.g. without dataset_description.json."""

    exit_code = ExitCode.INVALID_DATASET


class NothingSelectedError(HarmonyError):
    """The filters leave no file."""

    exit_code = ExitCode.NOTHING_SELECTED


class ScanError(HarmonyError):
    """One scan cannot be harmonized; the others go on."""

    exit_code = ExitCode.DATA


class MissingInputError(HarmonyError):
    """A file or folder that the user named does not exist."""

    exit_code = ExitCode.NO_INPUT


class OutputError(HarmonyError):
    """An output cannot be created or written (no space, read-only)."""

    exit_code = ExitCode.CANNOT_CREATE
