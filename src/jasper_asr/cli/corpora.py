"""`jasper download` and `jasper prepare`: corpora and published checkpoints."""

from pathlib import Path

import click

from jasper_asr.cli.common import Variadic, note, progress


@click.group(no_args_is_help=False)
def download() -> None:
    """Fetch a corpus or a checkpoint. The only commands that use the network."""


@download.command("librispeech")
@click.argument("subset")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder that will hold LibriSpeech/SUBSET.")
@click.option("--mirror", help="Base address that holds SUBSET.tar.gz, in place of the official one.")
@click.option("--keep-archive", is_flag=True, help="Keep the .tar.gz after unpacking.")
def download_librispeech(subset: str, out: Path, mirror: str | None, keep_archive: bool) -> None:
    """Fetch and unpack a LibriSpeech SUBSET such as dev-clean; checks the published md5, resumes a broken transfer."""
    from jasper_asr.data import librispeech

    with (
        progress("downloading", None, "bytes") as advance,
        progress("unpacking", None, "bytes") as unpacked,
    ):
        folder = librispeech.download_librispeech(
            subset,
            out,
            mirror=mirror,
            keep_archive=keep_archive,
            progress=lambda done, total: advance(0, done, total),
            unpack_progress=lambda done, total: unpacked(0, done, total),
        )
    click.echo(str(folder))


@download.command("checkpoint")
@click.option("--url", help="Address of the .pt, or of a .zip that holds it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--sha256", help="Expected hash, hex.")
@click.option("--md5", help="Expected hash, hex.")
def download_checkpoint(url: str | None, out: Path, sha256: str | None, md5: str | None) -> None:
    """Fetch a published checkpoint. Without a hash it says that nothing was verified."""
    from jasper_asr.data import download as transfers

    with progress("downloading", None, "bytes") as advance:
        file = transfers.download_checkpoint(
            url, out, sha256=sha256, md5=md5, progress=lambda done, total: advance(0, done, total)
        )
    click.echo(str(file.download.path))
    checked = "hash verified" if file.download.verified else f"NOT verified, sha256 is {file.download.sha256}"
    members = f" holding {', '.join(file.members)}" if file.members else ""
    note(f"{file.kind}{members}, {file.download.bytes:,} bytes, {checked}")


@click.group(no_args_is_help=False)
def prepare() -> None:
    """Make manifests."""


@prepare.command("librispeech", cls=Variadic)
@click.argument("root", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    required=True,
    type=click.Path(path_type=Path),
    help="JSON file to write, in NVIDIA's layout.",
)
@click.option("--wav-dir", type=click.Path(path_type=Path), help="Write 16-bit WAVs here (default: use the FLACs).")
@click.option("--speed", "speeds", multiple=True, type=float, help="Also write these speeds; needs --wav-dir.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True)
def prepare_librispeech(root: Path, manifest: Path, wav_dir: Path | None, speeds: tuple[float, ...], jobs: int) -> None:
    """Manifest of a LibriSpeech folder."""
    from jasper_asr.data import librispeech

    with progress("preparing", None, "utterances") as advance:
        report = librispeech.prepare_librispeech(
            root,
            manifest,
            wav_dir=wav_dir,
            speeds=speeds,
            jobs=jobs,
            progress=lambda done, total: advance(0, done, total),
        )
    click.echo(str(report.manifest))
    note(
        f"{report.utterances} utterances, {report.seconds / 3600:.2f} h; "
        f"{report.unlisted} FLACs without transcript left out"
    )
    if report.outside:
        note("the audio lies outside the manifest's folder: read it with --allow-outside-root or --audio-root")
