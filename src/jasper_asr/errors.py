"""Every error that this package raises on purpose.

    JasperError            what callers may catch; `exit_code` is what the command line ends with
      UsageError           2   options that contradict each other
      AudioError           3   a sound that cannot be read or is out of bounds
      ManifestError        3   a manifest row or file that is wrong
      ConfigError          4   a model configuration with unknown, missing or contradictory keys
      ModelError           4   weights or a graph that do not fit
      CompileError         4   a compiler for another chip that is missing or failed
      StorageError         5   a file that cannot be read or written, a full disk
      DownloadError        6   a transfer that failed, or a hash that differs

A message names the file first, then the cause, then the cure: `clip.wav: holds no samples; record it again`.
Each class is also the builtin that a caller would expect, so `except ValueError` works too.
"""


class JasperError(Exception):
    """Base of all errors raised on purpose; the message is one line: `file: cause; cure`."""

    exit_code = 1


class UsageError(JasperError, ValueError):
    """Options or arguments that contradict each other."""

    exit_code = 2


class AudioError(JasperError, ValueError):
    """A sound that cannot be decoded, is empty, not finite, or over a limit."""

    exit_code = 3


class ManifestError(JasperError, ValueError):
    """A manifest that cannot be parsed, or one of its rows is wrong: names file, line and key."""

    exit_code = 3


class ConfigError(JasperError, ValueError):
    """A model configuration with unknown, missing or contradictory keys: names file and key."""

    exit_code = 4


class ModelError(JasperError, ValueError):
    """Weights or a graph that do not fit: wrong names, shapes, dtypes, values that are not finite."""

    exit_code = 4


class CompileError(JasperError, RuntimeError):
    """A compiler for another chip (atc) that is not installed, failed, or did not deliver its file."""

    exit_code = 4


class StorageError(JasperError, OSError):
    """A file that is missing, cannot be read or written, or a full disk."""

    exit_code = 5


class DownloadError(JasperError, OSError):
    """A transfer that failed for good, or whose hash differs from the one that was asked for."""

    exit_code = 6
