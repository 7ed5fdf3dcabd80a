"""`mlx-afm toolkit produce_asset_pack`."""

from __future__ import annotations

from pathlib import Path

import click

from .asset_pack_options import names_of
from .output import json_option, note, show
from .parameters import PATH, example


@click.command(
    "produce_asset_pack",
    epilog=example("mlx-afm toolkit produce_asset_pack --fmadapter-path titles.fmadapter"),
)
@click.option("--fmadapter-path", type=PATH, required=True, help="The package.")
@click.option("--output-path", type=PATH, default=Path("."), show_default=True, help="A folder, or the .aar itself.")
@click.option("--platforms", metavar="LIST", help="Some of iOS,macOS,visionOS.  [default: all]")
@click.option("--download-policy", metavar="NAME", help="ON_DEMAND, PREFETCH or ESSENTIAL.  [default: ON_DEMAND]")
@click.option("--installation-event-type", metavar="LIST", help="FIRST_INSTALLTION (so spelled), SUBSEQUENT_UPDATE.")
@json_option
def command(
    fmadapter_path: Path,
    output_path: Path,
    platforms: str | None,
    download_policy: str | None,
    installation_event_type: str | None,
    as_json: bool,
) -> None:
    """Make an asset pack with Xcode's ba-package; without Xcode, say the command."""
    from mlx_afm.workflows.toolkit_export import asset_pack_of, produce_pack

    pack = asset_pack_of(
        fmadapter_path,
        platforms=names_of(platforms),
        policy=download_policy and download_policy.upper(),
        events=names_of(installation_event_type),
    )
    if pack.policy == "ON_DEMAND":
        note('If the upload is refused (ITMS-91140): "onDemand": null; see mlx-afm adapter repair-manifest')
    show({"archive": str(produce_pack(pack, output_path)), "id": pack.identifier}, as_json)
