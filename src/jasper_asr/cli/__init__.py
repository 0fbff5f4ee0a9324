"""The command `jasper`: parse, make one library call, print. The only room that prints.

Results go to stdout; progress, notes and errors go to stderr. Exit codes: 0 ok; 1 finished with failed items; 2 usage;
3 bad data; 4 bad model; 5 file or disk; 6 network or hash; 7 a gate not met; 130 and 143 interrupted.
"""

import signal
import sys
from io import TextIOWrapper
from typing import NoReturn

import click

from jasper_asr._version import __version__
from jasper_asr.cli.common import drop_unwritten, fail
from jasper_asr.cli.corpora import download, prepare
from jasper_asr.cli.live import listen
from jasper_asr.cli.measure import benchmark
from jasper_asr.cli.models import compile_model, export, info
from jasper_asr.cli.quantizing import quantize
from jasper_asr.cli.speech import demo, evaluate
from jasper_asr.cli.training import train
from jasper_asr.cli.transcribing import transcribe
from jasper_asr.cli.tuning import tune_lm
from jasper_asr.errors import JasperError


def main() -> NoReturn:
    """Entry point: turns every expected error into one line and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text
    try:
        # not command.main(), which answers a broken pipe and Ctrl-C in its own way
        with command.make_context("jasper", sys.argv[1:]) as context:
            code = command.invoke(context)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        fail(error.format_message() + hint, 2)
    except JasperError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader went away, as with `| head`
        drop_unwritten()
        sys.exit(0)
    except OSError as error:
        drop_unwritten()
        fail(f"{error.filename or 'I/O'}: {(error.strerror or str(error)).lower()}", 5)
    except MemoryError:
        fail("out of memory; use a smaller --batch-size or shorter audio", 5)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; pip install 'jasper-asr[train]'", 2)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(
    no_args_is_help=False,  # a missing command is one line and exit 2, as every wrong use
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="jasper")
def command() -> None:
    """Jasper speech models from checkpoint to deployment: transcribe, evaluate, export, train."""


COMMANDS = (
    *(transcribe, listen, evaluate, tune_lm, benchmark, demo),
    *(export, quantize, compile_model, info),
    *(train, download, prepare),
)
for subcommand in COMMANDS:
    command.add_command(subcommand)
